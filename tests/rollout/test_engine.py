"""The engine: what it samples, when it stops, what it costs, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.models.forward import Forward
from luspo_jax.rollout import Cache, Engine, Request, Sampling, loop, schedule
from luspo_jax.rollout import engine as engine_module
from tests.rollout import rollout_cases as cases

MODEL = cases.config()
PARAMS = cases.random_params(MODEL)
RAGGED = cases.requests_of([3, 17, 1, 9, 12, 5], MODEL.vocab_size)
STOPS = (0, 11, 50)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Runs of at most two pages, so that most prompts are read in several."""
    monkeypatch.setattr(loop, "SMALLEST_RUN", 4)
    monkeypatch.setattr(loop, "LONGEST_RUN", 8)


def _engine(sampling=None, *, model=MODEL, dtype="float32", pages=None, **kwargs):
    """`pages` beyond those of the longest response; None for as many as can be used."""
    sampling = sampling or Sampling(max_response_length=31, stop_token_ids=STOPS)
    sizes = {"num_slots": 6, "max_prompt_length": 17, "chunk_length": 8, "cache": Cache(None, 4)}
    engine = Engine(Forward(model, dtype), sampling, **(sizes | kwargs))
    if pages is not None:
        engine.take_room(engine.least_bytes + pages * engine.page_bytes)
    return engine


def _generate(engine=None, requests=RAGGED, **kwargs):
    return (engine or _engine()).generate(
        PARAMS, requests, **({"group_size": 3, "seed": 5, "step": 2} | kwargs)
    )


def _by_id(responses):
    return {(r.prompt_id, r.sample_id): r for r in responses}


# What is sampled.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_full_forward_on_a_ragged_batch_with_refills(temperature):
    length = 31 if temperature == 1 else 14
    responses, stats = _generate(_engine(Sampling(length, STOPS, temperature=temperature)))
    assert stats.generated_tokens > 150
    for response, logits in zip(
        responses, cases.teacher_logits(MODEL, PARAMS, RAGGED, responses), strict=True
    ):
        expected = cases.log_softmax(logits / temperature)
        expected = expected[np.arange(len(response.tokens)), response.tokens]
        assert np.abs(response.logprobs - expected).max() <= 1e-5
        assert response.logprobs.dtype == np.float32
        assert (response.logprobs <= 0).all()


def test_tokens_are_what_the_noise_law_draws():
    """Token by token from a full forward and noise that only the ids and the position fix."""
    responses, _ = _generate()
    prompts = {request.prompt_id: request for request in RAGGED}
    ties = tokens = 0
    for response, logits in zip(
        responses, cases.teacher_logits(MODEL, PARAMS, RAGGED, responses), strict=True
    ):
        noise = cases.noise(5, 2, prompts[response.prompt_id], response)
        for token, logits_V, uniforms_2 in zip(response.tokens, logits, noise, strict=True):
            tokens += 1
            if token != cases.drawn_token(logits_V, uniforms_2):
                assert cases.boundary_distance(logits_V, uniforms_2) <= 1e-5
                ties += 1
    assert ties <= tokens / 1000


VARIANTS = [
    {"num_slots": 1, "chunk_length": 3},
    {"num_slots": 7, "pages": 5},
    {"num_slots": 64, "chunk_length": 64, "max_prefill_tokens": 1},
    {"num_slots": 64, "cache": Cache(None, 16)},
]


def test_slots_pages_order_and_chunks_change_no_noise():
    """With equal logits a token is its noise: other bits would be other tokens."""
    params = {**PARAMS, "embedding": jnp.zeros_like(PARAMS["embedding"])}

    def tokens(requests, **kwargs):
        responses, _ = _engine(**kwargs).generate(params, requests, group_size=3, seed=5, step=2)
        return {key: r.tokens.tolist() for key, r in _by_id(responses).items()}

    base = tokens(RAGGED)
    assert sum(map(len, base.values())) > 200
    for kwargs in VARIANTS:
        assert tokens(RAGGED[::-1], **kwargs) == base
    alone = {key: value for key, value in base.items() if key[0] == RAGGED[1].prompt_id}
    assert tokens(RAGGED[1:2]) == alone


def test_slots_pages_order_and_chunks_change_no_token_but_at_ties():
    base = _by_id(_generate(group_size=5)[0])
    prompts = {request.prompt_id: request for request in RAGGED}
    found = []
    for kwargs in VARIANTS:
        others = _generate(_engine(**kwargs), RAGGED[::-1], group_size=5)[0]
        found += [_agree(base[key], other, prompts) for key, other in _by_id(others).items()]
    tokens = sum(same for same, _ in found)
    assert tokens > 1000
    assert sum(tie for _, tie in found) <= tokens / 1000


def _agree(mine, other, prompts, model=MODEL, params=PARAMS):
    """Number of tokens up to the first that differs, which must be a tie; log-probs alike."""
    length = min(len(mine.tokens), len(other.tokens))
    differ = np.flatnonzero(mine.tokens[:length] != other.tokens[:length])
    same = differ[0] if len(differ) else length
    np.testing.assert_allclose(mine.logprobs[:same], other.logprobs[:same], atol=1e-5)
    if len(differ):
        # Equal up to here, so the logits of this draw are those of `mine`.
        logits = cases.teacher_logits(model, params, prompts.values(), [mine])[0][same]
        noise = cases.noise(5, 2, prompts[mine.prompt_id], mine)[same]
        assert cases.boundary_distance(logits, noise) <= 1e-5
    else:
        assert len(mine.tokens) == len(other.tokens)
    return same, len(differ) > 0


# Pages: preemption, sharing, and that nobody notices.


@pytest.mark.parametrize("seed", range(4))
def test_preemption_at_random_changes_no_token_but_at_ties(seed, monkeypatch):
    """Responses lose their pages at any chunk, whether pages are short or not."""
    base, prompts = _by_id(_generate(group_size=5)[0]), {r.prompt_id: r for r in RAGGED}
    rng = np.random.default_rng(seed)
    real = schedule.Shard.most_steps

    def most_steps(shard, steps, record):
        if len(shard.admitted) > 1 and rng.random() < 0.3:
            return 0
        return real(shard, steps, record)

    monkeypatch.setattr(schedule.Shard, "most_steps", most_steps)
    engine = _engine(num_slots=12, pages=int(rng.integers(0, 30)))
    others, stats = _generate(engine, group_size=5)
    assert stats.preemptions > 10
    assert stats.recomputed_tokens > 50
    found = [_agree(base[key], other, prompts) for key, other in _by_id(others).items()]
    assert sum(same for same, _ in found) > 300
    assert sum(tie for _, tie in found) <= 1


def test_preemption_changes_no_noise(monkeypatch):
    """With equal logits a token is its noise: other bits would be other tokens."""
    params = {**PARAMS, "embedding": jnp.zeros_like(PARAMS["embedding"])}
    base, _ = _engine().generate(params, RAGGED, group_size=5, seed=5, step=2)
    others, stats = _engine(pages=0).generate(params, RAGGED, group_size=5, seed=5, step=2)
    assert stats.preemptions > 5
    assert [r.tokens.tolist() for r in others] == [r.tokens.tolist() for r in base]
    assert [len(r.logprobs) for r in others] == [len(r.tokens) for r in base]


def test_pages_in_use_are_those_of_the_tokens_and_all_come_back(monkeypatch):
    """A prompt's full pages once for all its responses; at most one more page a response."""
    pools = []
    real = loop.PagePool.__init__
    monkeypatch.setattr(
        loop.PagePool, "__init__", lambda self, n: (real(self, n), pools.append(self))[0]
    )
    requests = cases.requests_of([17, 17], MODEL.vocab_size)
    sampling = Sampling(20, ())
    _, stats = _generate(_engine(sampling, num_slots=16), requests, group_size=8)
    # 16 tokens of each prompt in 4 pages; 20 more, the last of which is never read, in 5.
    assert stats.pages_peak == 2 * (4 + 8 * 5)
    assert stats.preemptions == 0
    assert [pool.in_use for pool in pools] == [0]


def test_what_all_prompts_begin_with_is_read_once():
    rng = np.random.default_rng(3)
    system = rng.integers(0, MODEL.vocab_size, 9)
    requests = [
        Request(i, np.concatenate([system, rng.integers(0, MODEL.vocab_size, n)]))
        for i, n in enumerate([2, 8, 5, 1])
    ]
    responses, stats = _generate(requests=requests)
    # Two whole pages of four tokens once, the rest of each prompt but its last token.
    assert stats.prefill_tokens == 8 + sum(len(r.tokens) - 1 - 8 for r in requests)
    for response, logits in zip(
        responses, cases.teacher_logits(MODEL, PARAMS, requests, responses), strict=True
    ):
        expected = cases.log_softmax(logits)[np.arange(len(logits)), response.tokens]
        np.testing.assert_allclose(response.logprobs, expected, atol=1e-5)


def test_int8_pages_are_near_and_alike_for_every_kernel_and_preemption():
    def sampled(kernel, pages=None):
        engine = Engine(
            Forward(MODEL, paged_attention=kernel), Sampling(31, STOPS), num_slots=12,
            max_prompt_length=17, chunk_length=8, cache=Cache(None, 4, "int8"),
        )  # fmt: skip
        if pages is not None:
            engine.take_room(engine.least_bytes + pages * engine.page_bytes)
        # Two layers, two heads, keys and values, four tokens: eight numbers and a scale each.
        assert engine.page_bytes == 2 * 2 * 2 * 4 * (8 + 4)
        return engine.generate(PARAMS, RAGGED, group_size=3, seed=5, step=2)

    base, _ = sampled("reference")
    gaps = []
    for response, logits in zip(
        base, cases.teacher_logits(MODEL, PARAMS, RAGGED, base), strict=True
    ):
        expected = cases.log_softmax(logits)[np.arange(len(logits)), response.tokens]
        gaps.append(np.abs(response.logprobs - expected))
    gaps = np.concatenate(gaps)
    assert 1e-4 < gaps.mean() < 0.1  # rounded, and no other model
    for kernel, pages in (("blocks", None), ("blocks", 3)):
        others, stats = sampled(kernel, pages)
        assert (stats.preemptions > 0) == (pages is not None)
        same = [a.tokens.tolist() == b.tokens.tolist() for a, b in zip(base, others, strict=True)]
        assert np.mean(same) >= 0.8  # a rounding of int8 may go the other way
        for a, b, alike in zip(base, others, same, strict=True):
            if alike:
                np.testing.assert_allclose(a.logprobs, b.logprobs, atol=0.05)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (Cache(None, 12), "page_size=12: the paged attention of tpu, 'tpu', takes no"),
        (Cache(None, 0, "int8"), "cache_dtype='int8': no kernel of tpu"),
    ],
)
def test_what_the_platforms_kernel_does_not_take_is_refused(cache, message):
    how = Forward(dataclasses.replace(MODEL, head_dim=128), "bfloat16")
    assert engine_module._kernel(how, Cache(), "tpu") == "tpu"
    assert engine_module._kernel(how, Cache(None, 12), "cpu") == "blocks"
    with pytest.raises(ValueError, match=message):
        engine_module._kernel(how, cache, "tpu")


def test_a_request_may_have_a_limit_of_its_own():
    requests = [dataclasses.replace(r, limit=n) for r, n in zip(RAGGED, range(1, 7), strict=True)]
    responses, _ = _generate(_engine(Sampling(31, ())), requests)
    assert [len(r.tokens) for r in responses] == [n for n in range(1, 7) for _ in range(3)]


def test_each_response_to_a_request_may_have_a_limit_of_its_own():
    requests = [dataclasses.replace(r, limit=(i + 2, 1, 40)) for i, r in enumerate(RAGGED)]
    responses, _ = _generate(_engine(Sampling(31, ())), requests)
    assert [len(r.tokens) for r in responses] == [n for i in range(6) for n in (i + 2, 1, 31)]
    whole = _generate(_engine(Sampling(31, ())), RAGGED)[0]
    for mine, other in zip(responses, whole, strict=True):  # a limit changes nothing before it
        np.testing.assert_array_equal(mine.tokens, other.tokens[: len(mine.tokens)])
    for limit, message in [((1, 2), "2 limits, not 3"), ((1, 0, 2), ">= 1")]:
        with pytest.raises(ValueError, match=message):
            _generate(requests=[dataclasses.replace(RAGGED[0], limit=limit)])


@pytest.mark.parametrize("other", [{"seed": 6}, {"step": 3}])
def test_seed_and_step_change_the_noise(other):
    mine, others = _generate()[0], _generate(**other)[0]
    assert all(
        len(a.tokens) != len(b.tokens) or (a.tokens != b.tokens).any()
        for a, b in zip(mine, others, strict=True)
        if len(a.tokens) > 3
    )


def test_greedy_takes_the_likeliest_token_of_a_full_forward():
    sampling = Sampling(12, (), temperature=0)
    responses, _ = _generate(_engine(sampling), group_size=2)
    for response, logits in zip(
        responses, cases.teacher_logits(MODEL, PARAMS, RAGGED, responses), strict=True
    ):
        np.testing.assert_array_equal(response.tokens, logits.argmax(-1))
        expected = cases.log_softmax(logits).max(-1)
        np.testing.assert_allclose(response.logprobs, expected, atol=1e-5)


def test_top_p_and_top_k_draw_from_what_they_keep():
    sampling = Sampling(14, STOPS, temperature=0.9, top_p=0.5, top_k=5)
    responses, _ = _generate(_engine(sampling))
    for response, logits in zip(
        responses, cases.teacher_logits(MODEL, PARAMS, RAGGED, responses), strict=True
    ):
        logprobs = cases.log_softmax(logits / 0.9)
        chosen = logprobs[np.arange(len(response.tokens)), response.tokens]
        np.testing.assert_allclose(response.logprobs, chosen, atol=1e-5)  # over all tokens
        likelier = logprobs > chosen[:, None] + 1e-5
        assert (likelier.sum(-1) < 5).all()
        top_5 = np.exp(np.sort(logprobs)[:, -5:]).sum(-1)
        assert (np.exp(np.where(likelier, logprobs, -np.inf)).sum(-1) < 0.5 * top_5).all()


def test_bfloat16_samples_and_scores_in_float32():
    responses, _ = _generate(_engine(Sampling(10, STOPS), dtype="bfloat16"))
    logprobs = np.concatenate([r.logprobs for r in responses])
    assert logprobs.dtype == np.float32
    assert (logprobs <= 0).all()
    # Scores keep more bits than bfloat16 has.
    assert (logprobs.astype(jnp.bfloat16).astype(np.float32) != logprobs).mean() > 0.9


# Where responses end, and in which order they come.


def test_responses_end_at_every_stop_token_or_at_the_longest_length():
    responses, stats = _generate(group_size=30)
    ends = set()
    for response in responses:
        stops = np.isin(response.tokens, STOPS)
        assert not stops[:-1].any()
        assert response.stopped == stops[-1]
        assert response.stopped or len(response.tokens) == 31
        assert len(response.tokens) == len(response.logprobs) <= 31
        assert response.tokens.dtype == np.int32
        ends.add(int(response.tokens[-1]) if response.stopped else None)
    assert ends == {*STOPS, None}
    assert stats.generated_tokens == sum(len(r.tokens) for r in responses)


def test_without_stop_tokens_every_response_is_cut():
    responses, stats = _generate(_engine(Sampling(12, (), temperature=0)))
    assert {len(r.tokens) for r in responses} == {12}
    assert not any(r.stopped for r in responses)
    assert stats.generated_tokens == 12 * 18


def test_responses_are_request_major():
    responses, _ = _generate()
    expected = [(request.prompt_id, i) for request in RAGGED for i in range(3)]
    assert [(r.prompt_id, r.sample_id) for r in responses] == expected


def test_prompts_may_be_tuples_and_there_may_be_none():
    as_tuples = [Request(r.prompt_id, tuple(int(t) for t in r.tokens)) for r in RAGGED]
    for mine, other in zip(_generate()[0], _generate(requests=as_tuples)[0], strict=True):
        np.testing.assert_array_equal(mine.tokens, other.tokens)
    responses, stats = _generate(requests=[])
    assert responses == []
    assert stats.decode_steps == stats.generated_tokens == 0


# What it costs.


def test_each_prompt_is_prefilled_once():
    read = sum(len(request.tokens) - 1 for request in RAGGED)  # the last by each response
    for kwargs in [VARIANTS[0], *VARIANTS[2:], {"max_prefill_tokens": 20}]:
        _, stats = _generate(_engine(**kwargs), group_size=5)
        assert stats.prefill_tokens == read
        assert stats.recomputed_tokens == stats.preemptions == 0
        assert stats.prefill_calls >= 1


def _list_schedule(lengths, slots):
    """Steps until every job is done when each free slot takes the next job at once."""
    ends = np.zeros(slots, int)
    for length in lengths:
        ends[ends.argmin()] += length
    return ends.max()


def test_heavy_tailed_lengths_keep_the_slots_busy():
    """64 responses on 16 slots; lengths lognormal (σ = 1, median 12) cut at 31, 17 % of them."""
    model, params = cases.countdown(31)
    engine = Engine(
        Forward(model),
        Sampling(31, (0,), temperature=0),
        num_slots=16,
        max_prompt_length=1,
        chunk_length=16,
    )
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(6):
        lengths = np.clip(np.ceil(12 * np.exp(rng.normal(size=64))), 1, 31).astype(int)
        requests = [Request(i, (n,)) for i, n in enumerate(lengths)]
        responses, stats = engine.generate(params, requests, group_size=1, seed=0)
        assert [len(r.tokens) for r in responses] == lengths.tolist()
        assert stats.decode_steps == _list_schedule(lengths, 16)
        ratios.append(stats.decode_steps / (lengths.sum() / 16))
        # Fewer rows are decoded when few responses are left.
        assert 1 / ratios[-1] <= stats.slot_utilisation <= 1
    assert np.mean(ratios) <= 1.3, ratios


def test_a_second_call_compiles_nothing():
    sampling = Sampling(11, STOPS)
    _, first = _generate(_engine(sampling))
    other = cases.requests_of([3, 17, 1, 9, 12, 5], MODEL.vocab_size, seed=9)
    _, second = _generate(_engine(sampling), other, seed=77, step=3)
    assert first.compilations > 0
    assert first.compile_seconds > 0
    assert second.compilations == 0
    assert second.compile_seconds == 0
    assert second.seconds > 0


def test_progress_counts_up_to_the_total():
    calls = []
    _generate(progress=lambda finished, total: calls.append((finished, total)))
    assert calls == sorted(set(calls))
    assert calls[-1] == (18, 18)


# What it refuses.


@pytest.mark.parametrize(
    ("kwargs", "field"),
    [
        ({"num_slots": 0}, "num_slots"),
        ({"chunk_length": 0}, "chunk_length"),
        ({"max_prompt_length": 0}, "max_prompt_length"),
        ({"max_prefill_tokens": 0}, "max_prefill_tokens"),
        ({"cache": Cache(1e-9)}, r"cache_gb=1e-09 is too small.*17 \+ .*31 tokens needs 3 pages"),
        ({"max_prompt_length": 500}, "max_position"),
        ({"sampling": Sampling(4, (97,))}, "stop_token_ids"),
    ],
)
def test_senseless_engines_are_refused_by_name(kwargs, field):
    with pytest.raises(ValueError, match=field):
        _engine(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"group_size": 0}, "group_size"),
        ({"seed": -1}, "seed"),
        ({"step": 2**32}, "step"),
        ({"requests": [Request(4, np.arange(18))]}, "prompt_id 4 has 18 tokens"),
        ({"requests": [Request(4, ())]}, "prompt_id 4 has 0 tokens"),
        ({"requests": [Request(4, (1, 97))]}, "prompt_id 4 has tokens outside"),
        ({"requests": [Request(4, (-1,))]}, "prompt_id 4 has tokens outside"),
        ({"requests": [Request(4, (1.5,))]}, "prompt_id 4 must hold a list of token ids"),
        ({"requests": [Request(4, ((1,),))]}, "prompt_id 4 must hold a list of token ids"),
        ({"requests": [Request(-4, (1,))]}, "prompt_id -4"),
        ({"requests": [Request(4, (1,)), Request(4, (2,))]}, r"repeat: \[4\]"),
    ],
)
def test_senseless_calls_are_refused_by_name(kwargs, message):
    with pytest.raises(ValueError, match=message):
        _generate(**kwargs)


def test_weights_that_are_not_finite_are_refused():
    params = {**PARAMS, "embedding": PARAMS["embedding"].at[3].set(jnp.nan)}
    with pytest.raises(FloatingPointError, match=r"prompt_id \d+, sample_id \d"):
        _engine().generate(params, RAGGED, group_size=3, seed=0)


def test_nothing_but_params_holds_weights():
    """Other weights, same programs: they are arguments, not constants."""
    engine = _engine()
    mine, _ = _generate(engine)
    params = jax.tree.map(lambda x: x * 1.5, PARAMS)
    responses, stats = engine.generate(params, RAGGED, group_size=3, seed=5, step=2)
    assert stats.compilations == 0
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(mine, responses, strict=True))
    logits = cases.teacher_logits(MODEL, params, RAGGED, responses[:1])[0]
    expected = cases.log_softmax(logits)[np.arange(len(logits)), responses[0].tokens]
    np.testing.assert_allclose(responses[0].logprobs, expected, atol=1e-5)


def test_stats_are_a_record():
    _, stats = _generate()
    assert set(dataclasses.asdict(stats)) >= {"decode_steps", "prefill_tokens", "slot_utilisation"}
