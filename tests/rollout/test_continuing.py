"""Responses that go on in a later call: what they are does not depend on where a call ended."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax.models.forward import Forward
from luspo_jax.rollout import Cache, Engine, Sampling
from tests.models import expert_cases
from tests.rollout import rollout_cases as cases

MODEL = cases.config()
PARAMS = cases.random_params(MODEL)
RAGGED = cases.requests_of([3, 9, 1, 12], MODEL.vocab_size)
STOPS = (0, 11, 50)
EXPERTS = expert_cases.config(8, 2, vocab_size=98, num_layers=3, dense_layers=(1,))


def _engine(model=MODEL, pages=None, **kwargs):
    """`pages` beyond those of the longest response; None for as many as can be used."""
    sizes = {"num_slots": 5, "max_prompt_length": 12, "chunk_length": 4, "cache": Cache(None, 4)}
    engine = Engine(Forward(model), Sampling(15, STOPS), **(sizes | kwargs))
    if pages is not None:
        engine.take_room(engine.least_bytes + pages * engine.page_bytes)
    return engine


def _stops_after(turns):
    """Ends a call at the given look."""
    left = [turns]

    def until(ended):
        left[0] -= 1
        return left[0] <= 0 or all(ended)

    return until


def _in_calls(engine, params, turns, begun=2, group_size=3):
    """Responses of calls that end after some looks each, the last of which ends them all."""
    requests, step, stats = list(RAGGED), begun, []
    for until in [*map(_stops_after, turns), None]:
        responses, found = engine.generate(
            params, requests, group_size=group_size, seed=5, step=step, until=until
        )
        stats.append(found)
        requests = [
            dataclasses.replace(
                request, step=begun, begun=tuple(responses[i * group_size : (i + 1) * group_size])
            )
            for i, request in enumerate(requests)
        ]
        step += 1
    return responses, stats


def _equal(mine, other):
    """Whether the tokens are equal; log-probs up to the first that differs, a tie, are alike."""
    length = min(len(mine.tokens), len(other.tokens))
    differ = np.flatnonzero(mine.tokens[:length] != other.tokens[:length])
    same = differ[0] if len(differ) else length
    np.testing.assert_allclose(mine.logprobs[:same], other.logprobs[:same], atol=1e-5)
    return not len(differ) and len(mine.tokens) == len(other.tokens)


@pytest.mark.parametrize("pages", [None, 3])
@pytest.mark.parametrize("turns", [(1, 1), (2, 1, 3)])
def test_where_calls_end_changes_no_token_but_at_ties(turns, pages):
    whole, _ = _engine().generate(PARAMS, RAGGED, group_size=3, seed=5, step=2)
    parts, stats = _in_calls(_engine(pages=pages), PARAMS, turns)
    assert sum(not _equal(*pair) for pair in zip(whole, parts, strict=True)) <= 1
    assert stats[0].continued_tokens == 0 < stats[1].continued_tokens
    assert sum(s.generated_tokens for s in stats) == sum(len(r.tokens) for r in parts)
    if pages:
        assert sum(s.preemptions for s in stats) > 0
    for response in parts:
        assert (np.diff(response.versions.astype(int)) >= 0).all()
        assert len(response.versions) == len(response.tokens)
        assert (response.step, response.ended) == (2, True)
    assert {v for r in parts for v in r.versions} > {2}


def test_where_calls_end_changes_no_noise():
    """With equal logits a token is its noise: other bits would be other tokens."""
    params = {**PARAMS, "embedding": jnp.zeros_like(PARAMS["embedding"])}
    whole, _ = _engine().generate(params, RAGGED, group_size=3, seed=5, step=2)
    for turns, pages in [((1, 2), None), ((1, 1, 1), 2)]:
        parts, _ = _in_calls(_engine(pages=pages), params, turns)
        assert [r.tokens.tolist() for r in parts] == [r.tokens.tolist() for r in whole]


def test_a_response_that_goes_on_has_the_log_probs_of_the_weights_that_drew_each_token():
    other = {**PARAMS, "embedding": PARAMS["embedding"][::-1]}
    engine = _engine()
    first, _ = engine.generate(PARAMS, RAGGED, group_size=2, seed=5, step=7, until=_stops_after(1))
    assert any(not r.ended and len(r.tokens) for r in first)
    assert any(r.ended for r in first) or any(not len(r.tokens) for r in first)
    requests = [
        dataclasses.replace(request, step=7, begun=tuple(first[2 * i : 2 * i + 2]))
        for i, request in enumerate(RAGGED)
    ]
    last, _ = engine.generate(other, requests, group_size=2, seed=5, step=8)
    for before, after in zip(first, last, strict=True):
        assert before.ended <= (before is after)
        kept = len(before.tokens)
        np.testing.assert_array_equal(after.tokens[:kept], before.tokens)
        np.testing.assert_array_equal(after.logprobs[:kept], before.logprobs)
        assert after.versions.tolist() == [7] * kept + [8] * (len(after.tokens) - kept)
    for params, version in ((PARAMS, 7), (other, 8)):
        found = cases.teacher_logits(MODEL, params, RAGGED, last)
        for response, logits in zip(last, found, strict=True):
            expected = cases.log_softmax(logits)
            expected = expected[np.arange(len(response.tokens)), response.tokens]
            own = response.versions == version
            np.testing.assert_allclose(response.logprobs[own], expected[own], atol=1e-5)


def test_expert_ids_are_those_of_one_call():
    params = expert_cases.params(EXPERTS)
    engine = _engine(EXPERTS, record_experts=True)
    whole, _ = engine.generate(params, RAGGED, group_size=3, seed=5, step=2)
    parts, _ = _in_calls(_engine(EXPERTS, record_experts=True), params, (1, 1))
    equal = 0
    for mine, other in zip(whole, parts, strict=True):
        if not _equal(mine, other):
            continue
        equal += 1
        for name in ("expert_ids", "prompt_expert_ids"):
            one, two = getattr(mine, name), getattr(other, name)
            assert one.shape == two.shape
            assert np.mean(one != two) <= 0.01  # near ties of routers
    assert equal >= len(whole) - 1


def test_it_is_asked_every_so_many_steps_and_again_when_all_have_ended():
    looks = []

    def until(ended):
        looks.append(sum(ended))
        return len(looks) == 30

    engine = _engine(num_slots=12)
    _, stats = engine.generate(PARAMS, RAGGED, group_size=3, seed=5, until=until)
    assert len(looks) == 30
    assert looks == sorted(looks)
    asked = -(-stats.decode_steps // 4)
    assert looks.index(12) + 1 == asked
    responses, stats = engine.generate(
        PARAMS, RAGGED, group_size=3, seed=5, until=lambda ended: sum(ended) >= 2
    )
    assert 2 <= sum(r.ended for r in responses) < 12
    assert stats.decode_steps % 4 == 0


def test_calls_of_one_size_compile_nothing_more():
    engine = _engine(num_slots=7)
    _in_calls(engine, PARAMS, (1, 1))
    _, stats = _in_calls(engine, PARAMS, (1, 1), begun=9)
    assert sum(s.compilations for s in stats) == 0


def test_what_cannot_go_on_is_refused_by_name():
    engine = _engine()
    some, _ = engine.generate(PARAMS, RAGGED, group_size=2, seed=5, until=_stops_after(1))
    short = dataclasses.replace(RAGGED[0], begun=tuple(some[:1]))
    wrong = dataclasses.replace(RAGGED[0], step=-1)
    with pytest.raises(ValueError, match="1 responses begun, not 2"):
        engine.generate(PARAMS, [short], group_size=2, seed=5)
    with pytest.raises(ValueError, match="has step -1"):
        engine.generate(PARAMS, [wrong], group_size=2, seed=5)
    params = expert_cases.params(EXPERTS)
    plain, _ = _engine(EXPERTS).generate(
        params, RAGGED, group_size=2, seed=5, until=_stops_after(2)
    )
    index = next(i for i, r in enumerate(plain) if not r.ended and len(r.tokens)) // 2
    begun = dataclasses.replace(RAGGED[index], begun=tuple(plain[2 * index : 2 * index + 2]))
    with pytest.raises(ValueError, match="record_experts=True"):
        _engine(EXPERTS, record_experts=True).generate(params, [begun], group_size=2, seed=5)
