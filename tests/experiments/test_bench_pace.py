"""The bench of partial rollouts: its lengths, its slots, its model and its numbers."""

import json
import math

import jax
import numpy as np
import pytest
import scipy.stats

from experiments.bench import pace_report, pace_sides, pace_work
from experiments.bench.pace_work import Law, Pace, Sizes, Step
from luspo_jax.hosts.values import ConfigError
from luspo_jax.rollout import Request, loop

LAW = Law(6.0, 0.8, 24)
SIZES = Sizes(prompts=4, group=3, slots=5, chunk=3, steps=10, warmup=4)


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
def test_lengths_are_lognormal_rounded_and_cut(shared):
    law = Law(40.0, 1.0, 480, shared)
    rng = np.random.default_rng(0)
    medians_K = scipy.stats.norm.ppf((np.arange(16) + 0.5) / 16)
    medians_K = 40.0 * np.exp(np.sqrt(shared) * medians_K / np.std(medians_K))
    normal_KM = rng.normal(size=(16, 40_000))
    lengths_KM = medians_K[:, None] * np.exp(np.sqrt(1 - shared) * normal_KM)
    lengths_KM = np.clip(np.rint(lengths_KM), 1, 480)
    np.testing.assert_allclose(law.table_KN.sum(1), 1)
    np.testing.assert_allclose(law.table_KN @ np.arange(1, 481), lengths_KM.mean(1), rtol=0.025)
    assert law.mean == pytest.approx(lengths_KM.mean(), rel=0.01)
    # The variance of the logarithm that the kind has, and all of it, before lengths are cut.
    uncut = Law(400.0, 0.5, 40_000, shared)
    logs_N = np.log(np.arange(1, 40_001))
    means_K = uncut.table_KN @ logs_N
    assert np.var(means_K) == pytest.approx(0.25 * shared, abs=1e-3)
    all_N = uncut.table_KN.mean(0)
    assert all_N @ logs_N**2 - (all_N @ logs_N) ** 2 == pytest.approx(0.25, rel=1e-2)


@pytest.mark.parametrize("wrong", [{"sigma": 0.0}, {"shared": 1.0}, {"longest": 1}])
def test_no_law_is_refused(wrong):
    with pytest.raises(ConfigError, match="no law of lengths"):
        Law(**{"median": 6.0, "sigma": 0.8, "longest": 24} | wrong)


def test_drawn_lengths_are_those_of_the_law_and_depend_on_the_prompt_alone():
    length = pace_sides.drawn(LAW, 50, seed=3)
    kinds = np.array([LAW.kind(prompt_id, 3) for prompt_id in range(400)])
    lengths_PG = np.array([[length(0, p, s) for s in range(50)] for p in range(400)])
    for kind in (0, 7, 15):
        counts_N = np.bincount(lengths_PG[kinds == kind].ravel(), minlength=25)[1:]
        expected_N = LAW.table_KN[kind] * counts_N.sum()
        common_N = expected_N > 5
        _, p = scipy.stats.chisquare(
            [*counts_N[common_N], counts_N[~common_N].sum()],
            [*expected_N[common_N], expected_N[~common_N].sum()],
        )
        assert p > 1e-3
    assert length(9, 5, 1) == length(0, 5, 1)
    other = pace_sides.drawn(LAW, 50, seed=4)
    assert any(other(0, 5, sample) != length(0, 5, sample) for sample in range(50))


# --- slots ---------------------------------------------------------------------------------------


def _requests(count, group, step):
    nothing = np.zeros(0)
    return [
        Request(
            prompt_id,
            np.zeros(1, np.int32),
            step=step - prompt_id % 2,
            begun=tuple(
                pace_sides.Response(prompt_id, s, nothing, nothing, False, step - prompt_id % 2,
                                    False, versions=nothing)
                for s in range(group)
            ),
        )
        for prompt_id in range(count)
    ]  # fmt: skip


def _token_by_token(wanted, began, slots, chunk, leave, until):
    """Decode steps and lengths, a step at a time: who has a slot gets a token."""
    queue = sorted(range(len(wanted)), key=lambda i: (began[i], i))
    growing, had, now, since, look = [], [0] * len(wanted), 0, 0, chunk
    while True:
        left = [i for i in growing if had[i] < wanted[i]]
        gone = len(growing) - len(left)
        if since == 0 or gone >= (leave if queue else len(growing)) or since == chunk:
            growing, since = left, 0
            if now >= look or not (growing or queue):
                if until([h == w for h, w in zip(had, wanted, strict=True)]):
                    return now, had
                look = now + chunk - now % chunk
            while queue and len(growing) < slots:
                growing.append(queue.pop(0))
        for i in growing:
            had[i] += had[i] < wanted[i]
        now, since = now + 1, since + 1


@pytest.mark.parametrize(("slots", "enough"), [(3, 10), (40, 25), (64, 30), (5, 36)])
def test_slots_against_a_play_of_every_token(slots, enough):
    rng = np.random.default_rng(slots)
    wanted_PG = rng.integers(1, 30, (12, 3))
    sizes = Sizes(12, 3, slots, 4, 1, 0)
    sampler = pace_sides.Slots(lambda step, p, s: wanted_PG[p, s], sizes, longest=30)
    asked = []

    def until(ended):
        asked.append(list(ended))
        return sum(ended) >= enough

    requests = _requests(12, 3, step=7)
    found, stats = sampler.generate(None, requests, group_size=3, seed=0, step=7, until=until)
    calls = []
    now, had = _token_by_token(
        wanted_PG.ravel().tolist(),
        np.repeat([request.step for request in requests], 3).tolist(),
        slots,
        4,
        max(1, slots // 16),
        lambda ended: calls.append(ended) or sum(ended) >= enough,
    )
    assert (stats.decode_steps, [len(r.tokens) for r in found]) == (now, had)
    assert asked == calls
    assert stats.generated_tokens == sum(had)
    assert [r.ended for r in found] == (np.array(had) == wanted_PG.ravel()).tolist()


def test_slots_go_on_where_responses_stood_and_count_what_is_read_again():
    sampler = pace_sides.Slots(lambda step, p, s: 9, Sizes(1, 2, 4, 4, 1, 0), longest=9)
    requests = _requests(1, 2, step=0)
    first, stats = sampler.generate(
        None, requests, group_size=2, seed=0, step=0, until=lambda ended: True
    )
    assert (stats.decode_steps, stats.continued_tokens) == (4, 0)
    request = Request(0, requests[0].tokens, step=0, begun=tuple(first))
    last, stats = sampler.generate(None, [request], group_size=2, seed=0, step=1)
    assert [len(response.tokens) for response in last] == [9, 9]
    assert (stats.decode_steps, stats.generated_tokens, stats.continued_tokens) == (5, 10, 8)


def test_slots_are_refilled_when_an_engines_are():
    assert pace_sides._REFILL == loop._REFILL


# --- the engine ----------------------------------------------------------------------------------


class _Kept:
    """An engine that keeps its last responses by key."""

    def __init__(self, engine):
        self.engine, self.sampling, self.responses = engine, engine.sampling, {}

    def generate(self, *arguments, **named):
        found, stats = self.engine.generate(*arguments, **named)
        self.responses |= {(r.step, r.prompt_id, r.sample_id): r for r in found}
        return found, stats


@pytest.fixture(scope="module")
def model():
    return pace_sides.model_of(LAW, layers=1, mlp_dim=8)


@pytest.mark.parametrize("which", [Pace(0, 1), Pace(4, 2)], ids=str)
def test_an_engine_takes_the_decode_steps_that_slots_say(model, which):
    """Of the same lengths; an engine looks up a little more often."""
    config, params = model
    engine = _Kept(pace_sides.engine_of(LAW, SIZES, config))
    steps = list(pace_work.play(engine, LAW, SIZES, which, seed=1, params=params))
    for response in engine.responses.values():
        tokens = response.tokens
        np.testing.assert_array_equal(tokens, tokens[:1] - np.arange(len(tokens)))
        assert (tokens[-1] == 0) == response.ended
    lengths = {key: int(r.tokens[0]) + 1 for key, r in engine.responses.items()}
    slots = pace_sides.Slots(lambda *key: lengths.get(key, 1), SIZES, longest=LAW.longest)
    counted = list(pace_work.play(slots, LAW, SIZES, which, seed=1))
    for name in ("decode_steps", "generated"):
        ours, theirs = (sum(getattr(step, name) for step in own) for own in (counted, steps))
        assert ours == pytest.approx(theirs, rel=0.05), name
    if which.overlap:
        assert sum(step.continued for step in steps) > 0


def test_the_model_draws_lengths_by_the_law(model):
    """Its first token's probabilities, by its own log-probs."""
    config, params = model
    engine = pace_sides.engine_of(LAW, SIZES, config)
    prompts = pace_work.Prompts(LAW, seed=0).next_prompts(40)
    with jax.default_matmul_precision("highest"):
        found, _ = engine.generate(
            params, [Request(p.prompt_id, p.tokens) for p in prompts], group_size=2, seed=0
        )
    for response in found:
        kind = LAW.kind(response.prompt_id, 0)
        assert prompts[response.prompt_id].tokens[-1] == LAW.longest + kind
        expected = math.log(LAW.table_KN[kind, response.tokens[0]])
        assert response.logprobs[0] == pytest.approx(expected, abs=1e-3)
        np.testing.assert_allclose(response.logprobs[1:], 0, atol=1e-6)


# --- numbers -------------------------------------------------------------------------------------


def test_numbers_of_steps():
    steps = [
        Step(10, 30, 4, 1.0, 0, (5, 7), (0, 1), math.nan),
        Step(20, 50, 12, 2.0, 8, (9, 3), (2, 1), -0.2),
    ]
    assert pace_work.summary(steps, slots=4) == pytest.approx(
        {
            "busy": 80 / 120,
            "used": 24 / 120,
            "decode steps": 15,
            "seconds": 1.5,
            "age": 1.0,
            "oldest": 2,
            "read again": 16 / 80,
            "given up": 8 / 80,
            "length": 6.0,
            "account": -0.2,
        }
    )


def test_paces_keep_their_ages():
    assert [(p.overlap, p.max_age, p.late) for p in pace_work.paces(16)] == [
        (0, 1, "wait"), (8, 1, "wait"), (16, 2, "wait"), (32, 3, "wait"),
        (8, 0, "drop"), (16, 0, "drop"), (32, 0, "drop"),
    ]  # fmt: skip


def test_partial_rollouts_fill_slots_and_only_dropping_shortens():
    """Mean age is overlap over prompts a step (Little's law)."""
    law, sizes = Law(20.0, 1.0, 240), Sizes(8, 4, slots=8, chunk=4, steps=16, warmup=6)
    found = pace_report.measure(law, sizes, seeds=range(2))
    means = {
        pace: {name: np.mean([numbers[name] for numbers in own]) for name in own[0]}
        for pace, own in found.items()
    }
    plain, partial, drop = (
        means[name] for name in ("synchronous", "overlap 8, max_age 2", "overlap 8, drop")
    )
    assert plain["× synchronous"] == 1
    assert partial["busy"] > 0.93 > plain["busy"] + 0.2
    assert partial["× synchronous"] == pytest.approx(plain["busy"] / partial["busy"], rel=0.1)
    assert partial["age"] == pytest.approx(1, abs=0.1)
    assert partial["length"] == pytest.approx(plain["length"], rel=0.05)
    assert drop["length"] < 0.9 * plain["length"]
    assert drop["used"] < 0.8 * drop["busy"]
    text = pace_report.table(found, pace_report.COLUMNS)
    assert text.count("\n") == 2 + 7
    assert f"{plain['busy']:.4f} ± " in text
    record = json.loads(json.dumps(pace_report.record(law, sizes, found), allow_nan=False))
    assert record["paces"]["synchronous"][1]["account"] is None
    assert record["paces"]["overlap 8, drop"][0]["account"] < 0
    assert record["mean_length"] == law.mean
