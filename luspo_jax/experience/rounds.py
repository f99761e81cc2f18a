"""Rounds of sampling: new prompts, the policy's responses, rewards.

A round ends when enough groups are complete. The others go on in the next round or step, under the
weights of then, and the oldest are taken first. How long a response is therefore does not decide
whether it is trained on, but when; and no group is trained on later than `max_age` steps after it
began, because a round does not end while that is in danger. (With `late="drop"` it does, and groups
that are too old are given up, as others do: then short responses are trained on.) What ends a round
is counted in decode steps and complete groups, never by a clock, so a run goes on alike after a
restart.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from luspo_jax.experience import accounts, outliers, shaping
from luspo_jax.experience.groups import Group, Rollouts, Waiting, compared, judged
from luspo_jax.experience.shaping import Shaping
from luspo_jax.hosts import processes
from luspo_jax.hosts.roles import Roles
from luspo_jax.length.accounting import Finished
from luspo_jax.length.settings import LengthSettings
from luspo_jax.metrics import StepMetrics, timed
from luspo_jax.prompts import PromptStream
from luspo_jax.rewards import Scorer
from luspo_jax.rewards.group import GroupScorer
from luspo_jax.rollout import Engine, Request, Response, RolloutStats


@dataclasses.dataclass(frozen=True)
class Asker:
    """Samples and rewards responses.

    Attributes:
      stream: of the prompts.
      sampler: of the responses.
      scorer: of the rewards.
      decode: tokens → text.
      num_prompts: prompts per round.
      group_size: responses per prompt.
      seed: of the sampling noise.
      shaping: selects the responses that a step trains on.
      metric: the reward part that counts as accuracy.
      overlap: prompts in flight beyond those of a round.
      max_age: most steps between the one that begins a group and the one that trains on it.
      late: what becomes of groups that grow too old: "wait" for them, or "drop" them.
      order: which complete groups a round takes, by `chosen`: "begun" or "shortest".
      compare: the rewards of a group.
      length: settings of the account of lengths.
      roles: which processes sample.
    """

    stream: PromptStream
    sampler: Engine
    scorer: Scorer
    decode: Callable[[np.ndarray], str]
    num_prompts: int
    group_size: int
    seed: int
    shaping: Shaping
    metric: str
    overlap: int = 0
    max_age: int = 0
    late: str = "wait"
    order: str = "begun"
    compare: GroupScorer = GroupScorer()  # noqa: RUF009  (never changed)
    length: LengthSettings = LengthSettings()  # noqa: RUF009  (frozen)
    roles: Roles = Roles()  # noqa: RUF009  (frozen)

    @property
    def chooses(self) -> bool:
        """Whether lengths trained on may differ from lengths sampled."""
        return self.overlap > 0 or self.shaping.chooses


@dataclasses.dataclass
class Flight:
    """The groups in flight, which rounds change, and what ended or was given up on the way.

    `duals` are the dual variables of group rewards, the same in all rounds of a step.
    """

    groups: list[Group]
    duals: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ended: list[Finished] = dataclasses.field(default_factory=list)
    dropped: list[Group] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Policy:
    """The policy that samples: its weights as the sampler reads them, and the number of rollout
    steps that it has taken."""

    weights: Any
    version: int


def collect(
    asker: Asker, policy: Policy, waiting: Waiting, step: int, metrics: StepMetrics
) -> tuple[Rollouts, Waiting]:
    """Returns a full batch of rewarded groups, and what waits for the next step.

    Args:
      asker: samples and rewards.
      policy: that samples.
      waiting: what the previous step left.
      step: rollout steps taken before the one that trains on the batch.
      metrics: receives times, costs of sampling, and what was left out.
    """
    flight = Flight(list(waiting.begun), duals=asker.compare.duals | dict(waiting.duals))
    found = shaping.collect(
        rounds(asker, policy, flight, step, metrics),
        waiting.surplus,
        shaping=asker.shaping,
        num_groups=asker.num_prompts,
        part=asker.metric,
    )
    metrics.update(found.counts)
    metrics.update(asker.stream.metrics)
    if asker.late == "drop":
        flight.dropped = [g for g in flight.groups if step - g.step >= asker.max_age]
        flight.groups = [g for g in flight.groups if step - g.step < asker.max_age]
    if asker.overlap:
        metrics.update(_ages(found.groups, flight, step))
    account = waiting.account
    if asker.chooses:
        account = accounts.account(
            account,
            asker.length,
            step,
            ended=flight.ended,
            begun=flight.groups,
            dropped=flight.dropped,
            taken=found.groups,
            metrics=metrics,
        )
    metrics.update({f"length/dual/{name}": value for name, value in flight.duals.items()})
    lengths = [n for group in found.groups for n in group.lengths.tolist()]
    duals = asker.compare.stepped(flight.duals, lengths)
    rest = Waiting(found.surplus, flight.groups, account=account, duals=duals)
    return Rollouts(found.groups, version=step), rest


def rounds(
    asker: Asker, policy: Policy, flight: Flight, step: int, metrics: StepMetrics
) -> Iterator[list[Group]]:
    """Yields rounds of rewarded groups, sampled on demand from new prompts and those in flight.

    All that sample see the same prompts; each samples and rewards its own share.

    Args:
      asker: samples and rewards.
      policy: that samples.
      flight: changed in place.
      step: rollout steps taken before the one that trains on them; it begins the new ones.
      metrics: receives times and costs of sampling.
    """
    used: list[int] = []
    while True:
        begun = flight.groups
        asked = asker.stream.next_prompts(asker.num_prompts + asker.overlap - len(begun))
        used.extend(prompt.prompt_id for prompt in asked)
        noise_ids = _noise_ids(used)[len(used) - len(asked) :]
        begun += [
            Group(prompt, _new_responses(noise_id, asker.group_size, step))
            for noise_id, prompt in zip(noise_ids, asked, strict=True)
        ]
        own = begun[processes.share(len(begun))]
        with timed(metrics, "gen"):
            responses, stats = asker.sampler.generate(
                policy.weights,
                [_request(group) for group in own],
                group_size=asker.group_size,
                seed=asker.seed,
                step=policy.version,
                until=_until(asker, begun, step) if asker.overlap else None,
            )
            own = [
                Group(group.prompt, responses[i : i + asker.group_size])
                for i, group in zip(range(0, len(responses), asker.group_size), own, strict=True)
            ]
            told = [(group.ended, float(group.lengths.mean())) for group in own]
            ended, lengths = zip(*processes.gathered(told), strict=True)
        taken = chosen(
            ended,
            [group.step for group in begun],
            asker.num_prompts,
            lengths=lengths if asker.order == "shortest" else None,
            last_step=step - asker.max_age if asker.late == "wait" else None,
        )
        share = processes.share(len(begun))
        # As they were sampled: what is judged may be cut.
        new = [accounts.newly_ended(*pair) for pair in zip(begun[share], own, strict=True)]
        with timed(metrics, "reward"):
            own, cut = _judged(asker, own, taken[share], flight.duals)
        with timed(metrics, "gather"):
            # Prompts are not sent: every process has them, and their images are large.
            parts = processes.gather(([group.responses for group in own], new, cut, stats))
        responses, new, cut, stats = zip(*parts, strict=True)
        metrics.update(_metrics(stats))
        if asker.shaping.dot:
            metrics.add("shaping/tokens_cut", sum(cut))
        groups = [
            Group(group.prompt, found)
            for group, found in zip(begun, processes.merged(responses), strict=True)
        ]
        flight.ended += [response for found in processes.merged(new) for response in found]
        flight.groups = [group for group, take in zip(groups, taken, strict=True) if not take]
        yield [group for group, take in zip(groups, taken, strict=True) if take]


def _new_responses(noise_id, group_size, step):
    nothing = {
        "tokens": np.zeros(0, np.int32),
        "logprobs": np.zeros(0, np.float32),
        "versions": np.zeros(0, np.uint32),
    }
    return [
        Response(noise_id, sample_id, stopped=False, step=step, ended=False, **nothing)
        for sample_id in range(group_size)
    ]


def _request(group):
    prompt, responses = group.prompt, tuple(group.responses)
    return Request(
        responses[0].prompt_id, prompt.tokens, prompt.images, step=group.step, begun=responses
    )


def _until(asker, begun, step):
    """Returns the `until` of a round: it looks at the groups of all processes."""
    size, ages = asker.group_size, [step - group.step for group in begun]

    def until(ended: Sequence[bool]) -> bool:
        own = [all(ended[i : i + size]) for i in range(0, len(ended), size)]
        return enough(
            processes.gathered(own),
            ages,
            num_groups=asker.num_prompts,
            max_age=asker.max_age if asker.late == "wait" else 0,
        )

    return until


def enough(ended: Sequence[bool], ages: Sequence[int], *, num_groups: int, max_age: int) -> bool:
    """Whether a round may end: `num_groups` groups are complete, and the next rounds can take the
    oldest of the others in time.

    A group of age a must be taken within max_age − a more steps. Of those with at most j left, all
    but j · num_groups must be complete now, since each later round takes num_groups. That can
    always be met if no more than (max_age + 1) · num_groups are in flight.

    Args:
      ended: whether each group in flight is complete.
      ages: steps since each began.
      num_groups: groups that a round takes.
      max_age: most steps between beginning and training; 0 lets groups grow as old as they do.
    """
    ended_N, left_N = np.asarray(ended, bool), max_age - np.asarray(ages)
    if ended_N.sum() < num_groups:
        return False
    for left in range(max_age):
        due_N = left_N <= left
        if (ended_N & due_N).sum() < due_N.sum() - left * num_groups:
            return False
    return True


def chosen(
    ended: Sequence[bool],
    steps: Sequence[int],
    num_groups: int,
    *,
    lengths: Sequence[float] | None = None,
    last_step: int | None = None,
) -> list[bool]:
    """Returns which groups a round takes of the complete ones, in the order in which they were
    asked: the `num_groups` that began first, or the shortest.

    The shortest come first (SortedRL, arXiv:2603.23414) only where later rounds can still take all
    others in time: of those with at most j steps left, all but j · num_groups are taken now, the
    shortest of them. There are as many if `enough` let the round end.

    Args:
      ended: whether each group is complete.
      steps: the step that began each.
      num_groups: groups that a round takes.
      lengths: mean tokens of the responses of each; None takes those that began first.
      last_step: groups that began then must be taken now; None lets groups grow as old as they do.
    """
    places = [place for place, whole in enumerate(ended) if whole]
    order = sorted(places, key=lambda place: steps[place] if lengths is None else lengths[place])
    taken: set[int] = set()
    if lengths is not None and last_step is not None:
        for left in range(max(steps) - last_step):
            due = [place for place, begun in enumerate(steps) if begun - last_step <= left]
            missing = len(due) - left * num_groups - sum(place in taken for place in due)
            open_ = [place for place in order if place in due and place not in taken]
            taken.update(open_[: max(0, missing)])
    rest = [place for place in order if place not in taken]
    taken.update(rest[: num_groups - len(taken)])
    return [place in taken for place in range(len(ended))]


def _judged(asker, groups, taken, duals):
    """Rewards the groups that are taken; the others are left as they are. Returns them and the
    number of tokens that were cut off outliers."""
    longest, cut = asker.sampler.sampling.max_response_length, 0

    def judge(chosen):
        return judged(
            [group.prompt for group in chosen],
            [response for group in chosen for response in group.responses],
            scorer=asker.scorer,
            decode=asker.decode,
            max_length=longest,
        )

    found = judge([group for group, take in zip(groups, taken, strict=True) if take])
    if asker.shaping.dot:
        found, cut = outliers.without_outliers(
            found,
            judge,
            margin=asker.shaping.dot_margin,
            deviations=asker.shaping.dot_deviations,
            part=asker.metric,
        )
    rewarded = iter(
        [compared(group, asker.compare, max_length=longest, duals=duals) for group in found]
    )
    return [
        next(rewarded) if take else group for group, take in zip(groups, taken, strict=True)
    ], cut


def _ages(taken, flight, step):
    ages = [step - group.step for group in taken]
    begun, dropped = (
        sum(len(r.tokens) for group in groups for r in group.responses)
        for groups in (flight.groups, flight.dropped)
    )
    return {
        "rollout/age/mean": float(np.mean(ages)),
        "rollout/age/max": max(ages),
        "rollout/in_flight/groups": len(flight.groups),
        "rollout/in_flight/complete": sum(group.ended for group in flight.groups),
        "rollout/in_flight/tokens": begun,
        "rollout/dropped/groups": len(flight.dropped),
        "rollout/dropped/tokens": dropped,
    }


def _metrics(stats: Sequence[RolloutStats]) -> dict[str, float]:
    """Sums the statistics of the processes' samplers; averages shares."""
    names = ("decode_steps", "prefill_tokens", "prefill_calls", "generated_tokens",
             "recomputed_tokens", "continued_tokens", "preemptions")  # fmt: skip
    return {
        **{f"rollout/{name}": sum(getattr(s, name) for s in stats) for name in names},
        "rollout/pages_peak": sum(s.pages_peak / max(1, s.pages_total) for s in stats) / len(stats),
        "rollout/slot_utilisation": sum(s.slot_utilisation for s in stats) / len(stats),
    }


def _noise_ids(prompt_ids: Sequence[int]) -> list[int]:
    """Returns ids that key the sampling noise: the prompt's own, or another one if a small dataset
    repeats a prompt within a step, so that its groups differ."""
    seen: dict[int, int] = {}
    stride = max(prompt_ids) + 1
    ids = []
    for prompt_id in prompt_ids:
        occurrence = seen.get(prompt_id, 0)
        seen[prompt_id] = occurrence + 1
        ids.append(prompt_id + occurrence * stride)
    return ids
