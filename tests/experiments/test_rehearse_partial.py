"""Rehearsals of partial rollouts, and of rollouts on devices of their own."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.command import UsageError
from experiments.rehearsal import case as cases
from experiments.rehearsal import costs, partial, playing, programs, report, resident, search
from luspo_jax.experience.groups import Waiting
from luspo_jax.experience.rounds import Asker, Policy, collect
from luspo_jax.experience.shaping import Shaping
from luspo_jax.metrics import StepMetrics
from luspo_jax.models import decoder
from luspo_jax.models.forward import Forward
from luspo_jax.rollout import Cache, Engine, Sampling
from luspo_jax.rollout.cache import page_bytes
from tests.experience.experience_cases import Judge, prompt
from tests.experiments.test_rehearse import SMALL, machine, tiny

PARTIAL = {"rollout__overlap": 16, "rollout__max_age": 2}


class Stream:
    """Prompts of 21 tokens, no two of which begin alike."""

    def __init__(self):
        self.taken, self.metrics = 0, {}

    def next_prompts(self, count):
        first, self.taken = self.taken, self.taken + count
        return [prompt(i, np.r_[i % 20, i // 20, np.arange(19)]) for i in range(first, self.taken)]


def _engine(model, pages, **sizes):
    kept = {"num_slots": 24, "max_prompt_length": 21, "chunk_length": 8, "max_prefill_tokens": 256}
    return Engine(
        Forward(model, attention="reference"),
        Sampling(max_response_length=100, stop_token_ids=(3,)),
        cache=Cache(pages * page_bytes(model, "float32", 8) / 1e9, 8),
        **(kept | sizes),
    )


@pytest.mark.parametrize("pages", [400, 40])
def test_played_steps_are_what_the_engine_does(pages):
    """Statistics of a run's rounds, from the lengths of the responses that they drew."""
    model = cases.architecture(tiny())
    params = decoder.init_params(jax.random.key(0), model)
    engine, pace = _engine(model, pages), partial.Pace(4, 4, 2, 1)
    asker = Asker(
        stream=Stream(), sampler=engine, scorer=Judge(lambda sample: 1.0), metric="right",
        decode=lambda tokens: "y" * len(tokens), num_prompts=4, group_size=3, seed=0,
        shaping=Shaping(), overlap=4, max_age=2,
    )  # fmt: skip
    waiting, rows = Waiting(), []
    # What had not ended when the play stops is longer, by no matter how much.
    lengths_PG = np.full((4 * (pace.first + pace.counted + 1), 3), 100)
    for step in range(pace.first + pace.counted):
        metrics = StepMetrics()
        rollouts, waiting = collect(asker, Policy(params, step), waiting, step, metrics)
        rows.append(metrics.result())
        for group in [*rollouts.groups, *waiting.begun]:
            for response in group.responses:
                if response.ended:
                    place = response.prompt_id, response.sample_id
                    lengths_PG[place] = len(response.tokens)
    play = partial.steady(engine, 21, lambda n: lengths_PG[4 * n : 4 * n + 4], pace)

    def mean(name):
        return sum(row[f"rollout/{name}"] for row in rows[pace.first :]) / play.rollouts

    begun = 4 * (pace.first + pace.counted) + 4
    assert mean("generated_tokens") == pytest.approx(4 * lengths_PG[:begun].sum() / begun)
    assert play.rollouts == play.shares == pytest.approx(pace.counted, rel=0.3)
    assert mean("continued_tokens") > 0
    assert (mean("preemptions") > 0) == (pages == 40)
    assert play.steps == pytest.approx(mean("decode_steps"))
    assert play.continued == pytest.approx(mean("continued_tokens"))
    assert play.recomputed == pytest.approx(mean("recomputed_tokens"))
    assert play.preemptions == pytest.approx(mean("preemptions"))
    for found, name in ((play.utilisation, "slot_utilisation"), (play.age, "age/mean")):
        wanted = np.mean([row[f"rollout/{name}"] for row in rows[pace.first :]])
        assert found == pytest.approx(wanted)
    calls = sum(one.calls for one in play.prefills)
    assert calls == sum(row["rollout/prefill_calls"] for row in rows[pace.first :])
    assert sum(chunk.steps for chunk in play.chunks) == pytest.approx(play.steps * play.rollouts)


def _transcribed(lengths_PG, pace, chunk):
    """(looks, decode steps and tokens of each host, ages of the groups taken) of each step.

    If all is read before anything is decoded and everything fits, each response becomes a token
    longer in every decode step.
    """
    left, found, flight, following = lengths_PG.copy(), [], [], 0
    for step in range(pace.first + pace.counted):
        count = pace.num_prompts + pace.overlap - len(flight)
        flight += [(step, following + i) for i in range(count)]
        following += count
        looks, taken = 0, None
        while taken is None:
            looks += 1
            whole = [one for one in flight if left[one[1]].max() <= chunk * looks]
            oldest = sorted(whole, key=lambda one: one[0])[: pace.num_prompts]
            rest = sorted(begun for begun, number in flight if (begun, number) not in oldest)
            # Later steps, which take the oldest first, are all in time.
            late = [
                b for i, b in enumerate(rest) if step + 1 + i // pace.num_prompts > b + pace.max_age
            ]
            taken = oldest if len(whole) >= pace.num_prompts and not late else None
        numbers = np.array([number for _, number in flight])
        shares = [
            left[numbers[np.arange(len(numbers)) % pace.hosts == h]] for h in range(pace.hosts)
        ]
        found.append((
            looks,
            [min(share.max(), chunk * looks) for share in shares],
            [np.minimum(share, chunk * looks).sum() for share in shares],
            [step - begun for begun, _ in taken],
        ))  # fmt: skip
        left[numbers] = np.maximum(0, left[numbers] - chunk * looks)
        flight = [one for one in flight if one not in taken]
    return found


@pytest.mark.parametrize("sizes", [(4, 4, 1, 2), (4, 8, 2, 3), (5, 3, 3, 2), (4, 2, 1, 1)])
def test_hosts_end_a_step_together_by_the_groups_of_all(sizes):
    pace, chunk = partial.Pace(*sizes), 8
    model = cases.architecture(tiny())
    engine = _engine(
        model, 4000, num_slots=100, max_prompt_length=1, chunk_length=chunk, max_prefill_tokens=8192
    )
    engine.by_row = False
    rng = np.random.default_rng(sum(sizes))
    count = (pace.first + pace.counted + 2) * pace.num_prompts + pace.overlap
    lengths_PG = np.ceil(100 * rng.random((count, 3)) ** 4).astype(int)
    play = partial.steady(
        engine, 1, lambda n: lengths_PG[n * pace.num_prompts : (n + 1) * pace.num_prompts], pace
    )
    steps = _transcribed(lengths_PG, pace, chunk)[pace.first :]
    assert len(play.stretches) == sum(looks for looks, *_ in steps)
    assert all(len(hosts) == pace.hosts for hosts in play.stretches)
    following = (pace.first + pace.counted) * pace.num_prompts + pace.overlap
    in_a_step = lengths_PG[:following].sum() * pace.num_prompts / following
    assert play.rollouts == pytest.approx(sum(sum(own) for _, _, own, _ in steps) / in_a_step)
    assert play.shares == pace.hosts * play.rollouts
    assert play.steps == pytest.approx(sum(sum(own) for _, own, _, _ in steps) / play.shares)
    assert play.age == pytest.approx(np.mean([ages for *_, ages in steps]))
    at = 0
    for looks, own, _, _ in steps:
        for host, total in enumerate(own):
            parts = [hosts[host] for hosts in play.stretches[at : at + looks]]
            assert sum(chunk.steps for part in parts for chunk in part.chunks) == total
        at += looks
    again = partial.steady(
        engine, 1, lambda n: lengths_PG[n * pace.num_prompts : (n + 1) * pace.num_prompts], pace
    )
    assert again.stretches == play.stretches


def test_the_slowest_host_decides_how_long_a_stretch_takes():
    case = cases.build(tiny(**SMALL), machine(1), mean_length=12)

    def part(steps, calls):
        return playing.Stretch(
            (playing.Read(8, 16, 0, calls),), (playing.Decoded(steps, 16, 16.0, 100.0 * steps),)
        )

    one = part(1, 1)
    stretches = ((part(5, 1), part(7, 0)), (part(4, 0), part(2, 3)))
    play = dataclasses.replace(case.sampled, stretches=stretches, rollouts=2)
    vars(case)["sampled"] = play  # a cached property
    rates = report.rates(case.topology)
    wanted = {"decode chunk": (7 + 4) / 2, "prefill": (1 + 3) / 2}
    found = {program.name: program for program in programs.programs(case)}
    alone = {
        "decode chunk": rates.roofline(programs.chunk_work(case, case.engine, one.chunks[0])),
        "prefill": rates.roofline(programs.prefill_work(case, case.engine, costs.Runs(8, 16))),
    }
    for name, times in wanted.items():
        assert report.seconds(case, found[name], rates) == pytest.approx(times * alone[name])
    # The table's calls are those of a host in a step, on average.
    assert found["prefill"].calls == (1 + 0 + 0 + 3) / 4


def test_without_overlap_a_step_is_one_rollout_that_waits_for_all():
    """Whatever max_age says."""
    plain, aged = (
        cases.build(tiny(rollout__max_age=age, **SMALL), machine(2), mean_length=12)
        for age in (0, 3)
    )
    lengths = np.random.default_rng(0).permutation(costs.power_lengths(12, 24, 128))
    alone = playing.played(plain.engine, 8, lengths, 8)
    assert len(alone.stretches) == alone.rollouts == 1
    for case in (plain, aged):
        assert case.sampled.stretches == alone.stretches
        found = report.step(case, programs.programs(case))
        assert found["response_tokens"] == sum(lengths)
        assert found["decode_steps"] == alone.steps
        both = [sum(one[by] for one in found["phases"].values())
                for by in ("roofline_s", "expected_s")]  # fmt: skip
        assert [found["roofline_s"], found["expected_s"]] == both
        assert not case.stale


def test_a_step_of_a_partial_rollout_is_a_steady_one():
    """Shorter than one that waits for all, and it reads tokens of earlier steps again."""
    whole = cases.build(tiny(), machine(), mean_length=100)
    case = cases.build(tiny(**PARTIAL), machine(), mean_length=100)
    assert case.responses() == (16 + 16) * 8
    play, found = case.sampled, report.step(case, programs.programs(case))
    assert play.steps < whole.sampled.steps / 2
    assert found["continued_tokens"] > 0
    assert 0 < found["age"] <= 2
    assert play.rollouts == pytest.approx(9, rel=0.1)
    assert found["response_tokens"] == sum(whole.response_lengths)
    tokens = found["expected_tokens_a_second"] * found["expected_s"]
    assert tokens == pytest.approx(found["response_tokens"])
    before = report.step(whole, programs.programs(whole))
    for phase, less in (("decode chunk", True), ("prefill", False)):
        now, then = (one["phases"][phase]["roofline_s"] for one in (found, before))
        assert (now < then) == less
    assert found["phases"]["update"] == before["phases"]["update"]
    text = report.text(report.times(case, programs.programs(case)))
    assert "Partial rollouts, 16 prompts in flight beyond those of a step" in text
    assert "No program was compiled." in text
    # Read: prompts of 15 tokens a step, and the tokens that go on; padding is computed too.
    rows = sum(one.rows * one.length * one.calls for one in play.prefills) / play.rollouts
    assert rows >= 16 * 15 + found["continued_tokens"]


def test_responses_of_other_policies_are_scored_before_one_update():
    config = tiny(train__num_minibatches=1, **PARTIAL)
    case = cases.build(config, machine(), mean_length=100)
    names = [program.name for program in programs.programs(case)]
    assert "log-probs" in names
    assert programs.train_batch(case)[0].responses.old_logprobs_BT is not None
    config.rollout.overlap = 0
    case = cases.build(config, machine(), mean_length=100)
    assert "log-probs" not in [program.name for program in programs.programs(case)]


def test_a_search_compares_settings_by_whole_rollouts(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(partial, "steady", refuse)
    case = cases.build(tiny(**PARTIAL, **SMALL), machine(1), mean_length=12)
    whole = cases.build(tiny(**SMALL), machine(1), mean_length=12)
    for name in ("decode chunk", "update"):
        assert search._speed(case, name) == search._speed(whole, name) > 0


def test_responses_that_are_given_up_are_refused():
    config = tiny(**PARTIAL, rollout__late="drop")
    with pytest.raises(UsageError, match=r"rollout\.late='drop'"):
        cases.build(config, machine(), mean_length=100)


APART = SMALL | {"rollout_mesh__apart": 4, "rollout__max_age": 1}


def test_beside_training_a_rollout_costs_what_it_takes_longer():
    case = cases.build(tiny(**APART), machine(), mean_length=12)
    assert [layout.mesh.size for layout in case.layouts] == [4, 4]
    assert case.engine.layout.mesh.size == 4
    assert case.stale
    found = programs.programs(case)
    step = report.step(case, found)
    phases = {name: one["roofline_s"] for name, one in step["phases"].items()}
    sampling = sum(phases.pop(name) for name in ("prefill", "copy pages", "decode chunk"))
    between = phases.pop("hand-over")
    assert set(phases) == {"log-probs", "update"}
    for faster in (1e-6, 1.0, 1e6):
        longer = max(sampling, sum(phases.values()) * faster)
        updated = {name: seconds * faster for name, seconds in phases.items()}
        parts = {"prefill": sampling, "copy pages": 0.0, "decode chunk": 0.0}
        total = report._total(case, {"hand-over": between, **parts, **updated})
        assert total == pytest.approx(between + longer)
    assert step["roofline_s"] == pytest.approx(between + max(sampling, sum(phases.values())))
    text = report.text(report.rehearse(case, say=lambda _: None))
    assert "4 device(s) only sample" in text


def test_the_train_state_is_not_on_devices_that_only_sample():
    case = cases.build(tiny(**APART), machine(), mean_length=12)
    beside = {program.name: program.resident for program in programs.programs(case)}
    assert beside["prefill"] == beside["decode chunk"] == {}
    assert beside["copy pages"].keys() == {"rollout weights"}
    state = resident.state_bytes(case, "opt_state")
    assert beside["hand-over"] == state
    # All of what a device samples with comes from the others.
    hand_over = next(p for p in programs.programs(case) if p.name == "hand-over")
    assert hand_over.work.links == resident.weights_bytes(case) > 0


def test_several_hosts_that_sample_apart_are_refused():
    devices = [_Elsewhere(number // 4) for number in range(8)]
    topology = dataclasses.replace(machine(), devices=tuple(devices))
    with pytest.raises(UsageError, match="apart=4 on 2 hosts"):
        cases.build(tiny(**APART), topology, mean_length=12)


@dataclasses.dataclass(frozen=True)
class _Elsewhere:
    """A device of some process."""

    process_index: int
