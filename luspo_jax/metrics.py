"""Every metric declared once, how values are combined, and what is read back of a run.

A name may contain `*`, which matches one or more path segments (a dataset, a bin). The reducer
combines the values of one step over micro-batches, updates and processes.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from luspo_jax.hosts import guard
from luspo_jax.hosts.values import nearest


class MetricsError(ValueError):
    """Metrics cannot be read; the message has file and line."""


REDUCERS = ("mean", "sum", "max", "min", "last")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric's name or pattern, its reducer, unit and meaning."""

    name: str
    reducer: str
    unit: str
    meaning: str


def _spread(prefix: str, unit: str, of: str) -> list[Metric]:
    return [
        Metric(f"{prefix}/{reducer}", reducer, unit, f"{reducer} of {of}")
        for reducer in ("mean", "max", "min")
    ]


def _account() -> list[Metric]:
    """Lengths sampled, finished and consumed, the last being those trained on."""
    head, window = "length/account", "length/account/window"
    return [
        Metric(f"{head}/flag", "last", "", "1 while lengths consumed have parted from sampled"),
        Metric(f"{head}/*/count", "last", "responses", "responses of a population"),
        Metric(f"{head}/*/mean", "last", "tokens", "mean length of a population or an age"),
        *(
            Metric(f"{head}/*/p{level}", "last", "tokens", f"{level} % quantile of its lengths")
            for level in (10, 50, 90)
        ),
        Metric(f"{head}/sampled/unfinished", "last", "", "share that counts tokens so far"),
        Metric(f"{head}/finished/clip_ratio", "last", "", "share cut at the limit"),
        *(
            Metric(f"{head}/{of}{name}", "last", unit, f"{what}, consumed to {to}")
            for of, to in (("", "finished"), ("complete/", "all of complete cohorts"))
            for name, unit, what in (
                ("difference", "tokens", "difference of mean lengths"),
                ("w1", "tokens", "Wasserstein-1 distance of lengths"),
                ("w1_relative", "", "the same over the mean length"),
                ("ks", "", "Kolmogorov–Smirnov statistic of lengths"),
            )
        ),
        Metric(f"{window}/sampled_mean", "last", "tokens", "Kaplan–Meier mean up to the horizon"),
        Metric(f"{window}/sampled_p50", "last", "tokens", "Kaplan–Meier median"),
        Metric(f"{window}/consumed_mean", "last", "tokens", "mean of min(length, horizon)"),
        Metric(f"{window}/horizon", "last", "tokens", "most tokens seen in the window's cohorts"),
        Metric(f"{window}/relative_difference", "last", "", "mean consumed / sampled − 1"),
        Metric(f"{window}/standard_error", "last", "", "of log(consumed / sampled), jackknife"),
    ]


_DECLARED = [
    Metric("training/global_step", "last", "steps", "rollout steps done"),
    Metric("training/epoch", "last", "epochs", "passes over the prompts"),
    Metric("num_tokens", "last", "tokens", "prompt and response tokens trained on so far"),
    # Over judged responses: a response whose verifier failed has no reward and counts as unjudged.
    Metric("reward", "mean", "", "mean reward of the step's judged responses"),
    Metric(
        "reward_std", "mean", "", "mean over compared groups of the rewards' standard deviation"
    ),
    Metric("reward/part/*", "mean", "", "mean of one part of the reward, before its weight"),
    Metric("reward/status/*", "sum", "responses", "responses whose reward has this status"),
    Metric("reward/unjudged", "sum", "responses", "responses whose verifier failed or timed out"),
    Metric(
        "reward/groups_not_compared", "sum", "groups", "groups with fewer than two judged responses"
    ),
    Metric("frac_reward_zero_std", "mean", "", "share of compared groups with equal rewards"),
    *_spread("critic/score", "", "the judged responses' rewards"),
    *_spread("critic/rewards", "", "the responses' rewards, KL included"),
    *_spread("critic/advantages", "", "the responses' advantages"),
    *_spread("critic/returns", "", "the responses' returns"),
    *_spread("response_length", "tokens", "response length, stop token included"),
    Metric("response_length/clip_ratio", "mean", "", "share of responses cut at the limit"),
    *_spread("prompt_length", "tokens", "prompt length"),
    Metric("prompt_length/clip_ratio", "mean", "", "share of prompts at the limit"),
    Metric("prompts/dropped", "last", "prompts", "prompts dropped as longer than the limit"),
    Metric("prompts/refused/*", "last", "prompts", "prompts passed over for what their images are"),
    Metric("completions/clipped_ratio", "mean", "", "as response_length/clip_ratio, TRL's name"),
    Metric("sft/loss", "mean", "", "negative log-likelihood by train.aggregation; a mean: nats"),
    Metric("sft/tokens", "sum", "tokens", "tokens of the step's demonstrations"),
    Metric("sft/trained_tokens", "sum", "tokens", "those of them that are trained on"),
    Metric("held_out/loss", "last", "nats", "mean −log p of a trained token, held out"),
    Metric("held_out/perplexity", "last", "", "exp of that"),
    Metric("held_out/sequence_loss", "last", "nats", "mean over demonstrations of their means"),
    Metric("answers/length/mean", "last", "tokens", "length of answers to held-out prompts"),
    Metric("answers/length/std", "last", "tokens", "standard deviation of that"),
    Metric("answers/reference_length/mean", "last", "tokens", "length of the demonstrated answers"),
    Metric("answers/clip_ratio", "last", "", "share of these answers cut at the limit"),
    Metric("answers/exact", "last", "", "share of these answers equal to the demonstrated one"),
    Metric("actor/pg_loss", "mean", "", "value of the surrogate; its gradient is what counts"),
    Metric("actor/loss", "mean", "", "the whole loss, KL and entropy terms included"),
    Metric("actor/pg_clipfrac", "mean", "", "share of tokens or sequences that are clipped"),
    Metric("actor/pg_clipfrac_lower", "mean", "", "share that the dual clip holds"),
    Metric("actor/ppo_kl", "mean", "nats", "mean of old minus new log-prob"),
    Metric("actor/entropy", "mean", "nats", "mean entropy of the next-token distribution"),
    Metric("actor/kl_loss", "mean", "nats", "estimated KL to the reference policy"),
    Metric("actor/grad_norm", "mean", "", "global norm of the gradient before clipping"),
    Metric("actor/grad_clip_rate", "mean", "", "share of updates whose gradient was clipped"),
    Metric("actor/skipped_updates", "last", "updates", "updates skipped as not finite so far"),
    Metric("actor/lr", "last", "", "learning rate of the last update"),
    Metric("actor/update_norm", "mean", "", "global norm of the parameter change"),
    *_spread("actor/ratio", "", "the importance ratio"),
    *_spread("actor/log_ratio", "nats", "the log importance ratio"),
    Metric("actor/log_ratio_squared/token", "mean", "nats²", "squared log ratio of a token"),
    Metric(
        "actor/log_ratio_squared/sequence", "mean", "nats²", "squared mean log ratio of a response"
    ),
    Metric("actor/ratio_deviation", "mean", "", "mean |importance ratio − 1|"),
    Metric("actor/clipfrac/pos", "mean", "", "clipped share where A > 0"),
    Metric("actor/clipfrac/neg", "mean", "", "clipped share where A < 0"),
    Metric("actor/clipfrac/pos/*", "mean", "", "clipped share, A > 0, in a length bin"),
    Metric("actor/clipfrac/neg/*", "mean", "", "clipped share, A < 0, in a length bin"),
    Metric("actor/clip_lre", "mean", "", "length reweighting error of clipping; 0 = even"),
    Metric("clip_ratio/low_mean", "mean", "", "share clipped at the lower bound"),
    Metric("clip_ratio/high_mean", "mean", "", "share clipped at the upper bound"),
    Metric("clip_ratio/region_mean", "mean", "", "share clipped at either bound"),
    Metric("rollout_corr/kl", "mean", "nats", "mean of sampler minus trainer log-prob"),
    Metric("rollout_corr/k3_kl", "mean", "nats", "k3 estimate of KL(sampler, trainer)"),
    Metric("rollout_corr/log_ppl_abs_diff", "mean", "nats", "|difference of mean log-probs|"),
    Metric("rollout_corr/max_abs_diff", "max", "nats", "largest |sampler − trainer| log-prob"),
    Metric("rollout_corr/*", "mean", "", "another measure of sampler against trainer"),
    # Of tokens of age 0, 1, 2, 3, and 4 or more; 0 where there are none. Only in steps that train
    # on tokens of an earlier policy.
    Metric("staleness/share/*", "mean", "", "share of trained tokens that have an age, in steps"),
    Metric("staleness/ratio/*", "mean", "", "mean importance ratio of tokens of an age"),
    Metric("staleness/clipfrac/*", "mean", "", "clipped share of tokens of an age"),
    Metric("staleness/kl/*", "mean", "nats", "mean of sampler minus old log-prob, of an age"),
    Metric("staleness/weight/*", "mean", "", "mean ratio to the policy that sampled, of an age"),
    Metric("staleness/ess/*", "mean", "", "effective sample size of those ratios, a share"),
    Metric(
        "router/agreement/*", "mean", "", "share of a token's experts that two passes both chose"
    ),
    Metric(
        "router/max_violation", "mean", "", "fullest expert's load over even, − 1; layers' mean"
    ),
    Metric("router/max_violation/worst_layer", "mean", "", "the same of the layer with the most"),
    Metric("router/max_violation/*", "mean", "", "the same of one layer with experts"),
    Metric("router/avg_violation", "mean", "", "mean |expert's load over even − 1|; layers' mean"),
    Metric("router/avg_violation/*", "mean", "", "the same of one layer with experts"),
    Metric("router/aux_loss", "mean", "", "load-balancing loss before its coefficient; even: K"),
    Metric("rollout/decode_steps", "sum", "steps", "decode steps of the sampler"),
    Metric("rollout/prefill_tokens", "sum", "tokens", "prompt tokens prefilled"),
    Metric(
        "rollout/recomputed_tokens", "sum", "tokens", "tokens of preempted responses read again"
    ),
    Metric("rollout/continued_tokens", "sum", "tokens", "tokens of earlier steps, read again"),
    Metric("rollout/age/mean", "mean", "steps", "mean age of the groups of the step"),
    Metric("rollout/age/max", "max", "steps", "age of the oldest"),
    Metric("rollout/in_flight/groups", "last", "groups", "groups that wait for the next step"),
    Metric("rollout/in_flight/complete", "last", "groups", "those of them that are complete"),
    Metric("rollout/dropped/groups", "sum", "groups", "groups given up as too old"),
    Metric("rollout/dropped/tokens", "sum", "tokens", "tokens of their responses"),
    Metric("rollout/in_flight/tokens", "last", "tokens", "tokens of their responses so far"),
    Metric("rollout/preemptions", "sum", "", "responses that gave their pages back for a while"),
    Metric("rollout/pages_peak", "mean", "", "most of the pages in use at a time, as a share"),
    Metric("rollout/prefill_calls", "sum", "calls", "prefill calls of the sampler"),
    Metric("rollout/generated_tokens", "sum", "tokens", "tokens sampled"),
    Metric("rollout/slot_utilisation", "mean", "", "share of decoded rows that made a token"),
    Metric("shaping/sampled_reward", "mean", "", "mean judged reward before any group is left out"),
    Metric("shaping/tokens_cut", "sum", "tokens", "tokens cut off outliers of groups all right"),
    Metric("shaping/*", "sum", "", "rounds, groups or responses of the step's data shaping"),
    Metric("packing/padding", "mean", "", "share of the computed tokens that is padding"),
    Metric("packing/microbatches", "mean", "", "micro-batches of an optimizer step"),
    Metric("packing/shared", "mean", "", "share of the tokens not computed, as a prompt is shared"),
    Metric("packing/rows", "mean", "rows", "packed rows of an optimizer step"),
    Metric("timing_s/*", "sum", "s", "seconds spent in a phase of the step"),
    Metric("perf/total_num_tokens", "sum", "tokens", "prompt and response tokens of the step"),
    Metric("perf/throughput", "mean", "tokens/s/device", "tokens of the step per device second"),
    Metric("perf/time_per_step", "mean", "s", "wall time of the step"),
    Metric("perf/mfu/*", "mean", "", "model flops utilisation"),
    Metric("perf/max_memory_allocated_gb", "max", "GB", "peak memory"),
    Metric("length/pressure/taken", "mean", "tokens", "first-order change by the last update"),
    Metric(
        "length/pressure/*", "mean", "tokens/lr", "change of mean length by an objective's step"
    ),
    Metric("length/reward_pressure/taken", "mean", "", "first-order change by the last update"),
    Metric("length/reward_pressure/*", "mean", "1/lr", "change of the reward by the same step"),
    Metric(
        "length/sign_reversal", "last", "", "share of advantages whose sign control of length turns"
    ),
    Metric("length/lambda", "last", "", "λ of the length scale lambda-grpo"),
    Metric("length/degeneration/growth", "last", "", "growth of length over the last window"),
    Metric("length/degeneration/accuracy_gain", "last", "", "growth of accuracy over it"),
    Metric("length/degeneration/flag", "last", "", "1 while length grows and accuracy does not"),
    Metric(
        "length/degeneration/collapse", "last", "", "1 while it falls and accuracy does not grow"
    ),
    *_account(),
    Metric("length/advantage_corr", "mean", "", "within-group correlation of A and length"),
    Metric("length/correct_mean", "mean", "tokens", "mean length of responses judged right"),
    Metric("length/incorrect_mean", "mean", "tokens", "mean length of responses judged wrong"),
    Metric("length/solved_mean", "mean", "tokens", "mean length where all of a group are right"),
    # q1 = pass rates in (0, 1/4] … q4 = (3/4, 1].
    Metric("length/by_pass_rate/*", "mean", "tokens", "mean length in a quartile of pass rates"),
    Metric("length/gradient_share/*", "mean", "", "a length bin's share of |coefficients|"),
    Metric("length/accuracy/*", "mean", "", "accuracy in a length bin"),
    Metric("length/dual/*", "last", "", "dual variable of a group reward, as the step used it"),
    Metric("length/scale_alpha", "last", "", "exponent of the adaptive length scale"),
    Metric("response/repetition", "mean", "", "share of repeated n-grams"),
    Metric("response/compress_ratio", "mean", "", "plain over compressed size of the text"),
    Metric("val-core/*", "last", "", "validation: accuracy of a dataset"),
    Metric("val-aux/*/acc/ci95_low", "last", "", "lower end of the accuracy's 95 % interval"),
    Metric("val-aux/*/acc/ci95_high", "last", "", "upper end of the accuracy's 95 % interval"),
    Metric("val-aux/*/unjudged", "last", "responses", "held-out responses without a verdict"),
    Metric("val-aux/*/completed", "last", "", "share of responses right and not cut at the limit"),
    Metric("val-aux/*/tokens_per_right", "last", "tokens", "tokens of all over the right ones"),
    # Its names end in budget/TOKENS/acc.
    Metric("val-aux/*/acc", "last", "", "accuracy of the same responses cut at a budget"),
    Metric("val-aux/*/budget/area", "last", "", "mean of these accuracies over log2 of the budget"),
    Metric("val-aux/*", "last", "", "validation: lengths, truncation, statuses of a dataset"),
]

METRICS = {metric.name: metric for metric in _DECLARED}


@functools.cache
def declared(name: str) -> Metric:
    """Returns the declaration of a metric: its own, else that of the first matching pattern.

    Raises:
      KeyError: no declaration; the message has the nearest name, or all.
    """
    if name in METRICS and "*" not in name:
        return METRICS[name]
    for pattern, metric in METRICS.items():
        head, star, tail = pattern.partition("*")
        if star and re.fullmatch(f"{re.escape(head)}.+{re.escape(tail)}", name):
            return metric
    raise KeyError(
        f"metric {name!r} is not declared in luspo_jax/metrics.py: {nearest(name, METRICS)}"
    )


class StepMetrics:
    """Collects one step's values and combines them by each metric's reducer."""

    def __init__(self):
        self._values: dict[str, list[tuple[float, float]]] = {}

    def add(self, name: str, value: float, count: float | None = None) -> None:
        """Adds a value; with a count, `value` is a sum over that many items (mean metrics only)."""
        reducer = declared(name).reducer
        if count is not None and reducer != "mean":
            raise ValueError(f"{name} is reduced by {reducer}: it takes no count")
        pair = (float(value), 1.0 if count is None else float(count))
        self._values.setdefault(name, []).append(pair)

    def update(self, values: Mapping[str, Any]) -> None:
        """Adds several values: name → value or (sum, count)."""
        for name, value in values.items():
            self.add(name, *(value if isinstance(value, tuple) else (value,)))

    @property
    def values(self) -> dict[str, list[list[float]]]:
        """Name → [value, count] pairs as they were added: JSON values."""
        return {name: [list(pair) for pair in pairs] for name, pairs in self._values.items()}

    def merge(self, values: Mapping[str, Sequence[Sequence[float]]]) -> None:
        """Adds the `values` of another."""
        for name, pairs in values.items():
            self._values.setdefault(name, []).extend((value, count) for value, count in pairs)

    def result(self) -> dict[str, float]:
        """Returns name → combined value, in order of first appearance; an empty mean is NaN."""
        return {name: _reduce(declared(name).reducer, v) for name, v in self._values.items()}


@contextlib.contextmanager
def timed(metrics: StepMetrics, phase: str) -> Iterator[None]:
    """Adds the seconds inside to `timing_s/{phase}`, and marks the phase for the guard."""
    started = time.perf_counter()
    with guard.phase("rollout" if phase == "gen" else phase), _annotation(phase):
        yield
    metrics.add(f"timing_s/{phase}", time.perf_counter() - started)


# What a phase is entered as, besides being timed; here, and not jax's, which is not imported.
_annotation: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext


@contextlib.contextmanager
def phases_in(annotation: Callable[[str], contextlib.AbstractContextManager]) -> Iterator[None]:
    """Enters `annotation(phase)`, too, in each phase of `timed` inside, in any thread."""
    global _annotation
    outer, _annotation = _annotation, annotation
    try:
        yield
    finally:
        _annotation = outer


def _reduce(reducer: str, pairs: list[tuple[float, float]]) -> float:
    values, counts = zip(*pairs, strict=True)
    if reducer == "mean":
        total = math.fsum(counts)
        return sum(values) / total if total else math.nan
    return {"sum": sum, "max": max, "min": min, "last": lambda v: v[-1]}[reducer](values)


def json_line(step: int, values: Mapping[str, float]) -> str:
    """Formats a line of metrics.jsonl. JSON lacks NaN: such values are null and in `nonfinite`."""
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    odd = {name: str(values[name]) for name, value in finite.items() if value is None}
    return json.dumps({"step": step, **finite, **({"nonfinite": odd} if odd else {})}) + "\n"


def read_metrics(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields the steps of a metrics.jsonl, with each null restored to its non-finite value.

    A last line truncated by a crash is left out.

    Raises:
      MetricsError: another line is damaged.
    """
    for _, record in lines_and_records(path):
        yield record


def lines_and_records(path: pathlib.Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line of a metrics.jsonl as it is there, and what `read_metrics` makes of it."""
    return whole_lines(path.read_bytes(), str(path))


def whole_lines(content: bytes, path: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """As `lines_and_records`, of a file's bytes; errors name the path."""
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            odd = record.pop("nonfinite", {})
            record |= {name: float(text) for name, text in odd.items()}
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MetricsError(
                f"{path}, line {number}: no metrics of a step ({type(error).__name__}: {error}); "
                "delete that line to go on without its figures"
            ) from error
        yield line, record


@dataclasses.dataclass(frozen=True)
class AnswerRecord:
    """An answer to a held-out prompt, written for reading.

    Attributes:
      prompt_id, sample_id: identify the answer.
      prompt, response, reference: the texts; the reference is the demonstrated answer.
      tokens: response token ids.
      length, reference_length: tokens, stop token included.
      truncated: whether it was cut at the limit.
      exact: whether it is the reference, character by character.
    """

    prompt_id: int
    sample_id: int
    prompt: str
    response: str
    reference: str
    tokens: list[int]
    length: int
    reference_length: int
    truncated: bool
    exact: bool


@dataclasses.dataclass(frozen=True)
class RolloutRecord:
    """One response, written for reading.

    Attributes:
      prompt_id, sample_id: identify the response.
      prompt, response, answer: the texts; the answer is the reference.
      tokens: response token ids.
      reward: the weighted sum.
      parts: name → value of each part.
      status, prediction: from the verifiers.
      advantage: the response's advantage.
      length: response tokens, stop token included.
      truncated: whether it was truncated at the limit.
      images: names of the prompt's images, in order.
    """

    prompt_id: int
    sample_id: int
    prompt: str
    response: str
    answer: str
    tokens: list[int]
    reward: float
    parts: dict[str, float]
    status: str
    prediction: str | None
    advantage: float
    length: int
    truncated: bool
    images: list[str] = dataclasses.field(default_factory=list)
