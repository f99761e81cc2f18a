"""Batches sampled ahead: where there are two roles, those who train get what the others sampled."""

import dataclasses

from luspo_jax.experience.ahead import Beside, begun, take
from luspo_jax.experience.groups import Waiting
from luspo_jax.experience.rounds import Asker, Policy
from luspo_jax.experience.shaping import Shaping
from luspo_jax.hosts.roles import Roles
from luspo_jax.metrics import StepMetrics
from tests.experience.experience_cases import Judge, Sampler, prompt

POLICY = Policy("weights", 4)


class Stream:
    """Prompts 0, 1, …, each with an image; `read` counts the images that were read again."""

    def __init__(self):
        self.taken, self.read, self.metrics = 0, 0, {}

    def next_prompts(self, count):
        found = [prompt(self.taken + i) for i in range(count)]
        self.taken += count
        return self.pictured(found, 0)

    def pictured(self, records, again=1):
        self.read += again * len(records)
        return [dataclasses.replace(r, images=(f"image {r.prompt_id}",)) for r in records]

    def get_state(self):
        return {"taken": self.taken}

    def set_state(self, state):
        self.taken = state["taken"]


class Fake(Roles):
    """One process of two roles; `sent` is what passes between them."""

    split = True
    sent: list = []  # noqa: RUF012

    def begin(self, work, label):
        if self.samples:
            self.sent[:] = [work()]
        return lambda: self.sent[0]


class Trains(Fake):
    trains, samples = True, False


class Samples(Fake):
    trains, samples = False, True


def _asker(roles, **fields):
    return Asker(
        stream=Stream(),
        sampler=Sampler(lambda prompt_id, sample: 1 + (prompt_id + 3 * sample) % 4),
        scorer=Judge(lambda sample: float(sample.length > 1)),
        decode=lambda tokens: "y" * len(tokens),
        num_prompts=2,
        group_size=2,
        seed=17,
        shaping=Shaping(),
        metric="right",
        roles=roles,
        **fields,
    )


def _told(waiting):
    """All but times."""
    metrics = {k: v for k, v in waiting.metrics.items() if not k.startswith("timing_s/")}
    groups = [*waiting.surplus, *waiting.begun, *waiting.batch]
    tokens = [[r.tokens.tolist() for r in group.responses] for group in groups]
    return [g.prompt.prompt_id for g in groups], [g.prompt.images for g in groups], tokens, metrics


def test_who_trains_goes_on_with_what_the_others_sampled():
    pace = {"overlap": 2, "max_age": 3}
    samples, trains = _asker(Samples(), **pace), _asker(Trains(), **pace)
    first = begun(samples, POLICY, Waiting(), 4)()
    told = begun(trains, None, Waiting(), 4)()
    assert len(first.batch) == len(first.begun) == 2
    assert _told(told) == _told(first)
    assert all(image for image in _told(told)[1])
    assert all(not group.prompt.images for group in Fake.sent[0][0].batch)
    assert (samples.stream.taken, trains.stream.taken) == (4, 4)
    assert (samples.stream.read, trains.stream.read) == (0, 4)
    assert trains.sampler.calls == []
    with Beside() as beside:  # the next one, with what waits
        metrics = StepMetrics()
        rollouts, rest = take(trains, None, told, 4, metrics)
        assert rollouts.groups == told.batch
        assert (rest.batch, rest.metrics, list(rest.begun)) == ((), {}, list(told.begun))
        assert metrics.values == told.metrics
        following = beside.begin(samples, POLICY, dataclasses.replace(first, batch=()), 4)()
        assert _told(beside.begin(trains, None, rest, 4)()) == _told(following)
    assert trains.stream.taken == samples.stream.taken == 6


def test_one_process_samples_in_a_thread_what_it_would_sample_itself():
    alone, beside_training = _asker(Roles()), _asker(Roles())
    expected = begun(alone, POLICY, Waiting(), 5)()
    with Beside() as beside:
        found = beside.begin(beside_training, POLICY, Waiting(), 4)()
    assert _told(found) == _told(expected)
    rollouts, _ = take(_asker(Roles()), POLICY, Waiting(), 5, StepMetrics())
    assert [g.prompt.prompt_id for g in rollouts.groups] == _told(expected)[0]
