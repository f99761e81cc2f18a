"""Held-out figures of a supervised run: losses of demonstrations, answers to their prompts."""

import dataclasses
import math

import numpy as np

from luspo_jax.hosts import processes
from luspo_jax.learner.demonstrations import losses
from luspo_jax.metrics import AnswerRecord
from luspo_jax.rollout import Request
from luspo_jax.run.sft.build import SftRun
from luspo_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out figures of a policy; None where nothing was measured.

    Attributes:
      loss: mean −log p of a trained token, in nats.
      sequence_loss: mean over demonstrations of the mean of their trained tokens.
      num_examples, num_tokens: demonstrations and trained tokens measured.
      length: mean tokens of the answers to held-out prompts, stop token included.
      length_std: their standard deviation.
      reference_length: mean tokens of the answers demonstrated to the same prompts.
      truncated: share of answers cut at the limit.
      exact: share of answers equal to the demonstrated one.
      num_answers: answers.
    """

    loss: float | None = None
    sequence_loss: float | None = None
    num_examples: int = 0
    num_tokens: int = 0
    length: float | None = None
    length_std: float | None = None
    reference_length: float | None = None
    truncated: float | None = None
    exact: float | None = None
    num_answers: int = 0

    @property
    def metrics(self) -> dict[str, float]:
        """Values by their metric names."""
        values = {
            "held_out/loss": self.loss,
            "held_out/perplexity": None if self.loss is None else perplexity(self.loss),
            "held_out/sequence_loss": self.sequence_loss,
            "answers/length/mean": self.length,
            "answers/length/std": self.length_std,
            "answers/reference_length/mean": self.reference_length,
            "answers/clip_ratio": self.truncated,
            "answers/exact": self.exact,
        }
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        if self.loss is None:
            return "nothing is held out (data.held_out_path or data.held_out_fraction)"
        text = (
            f"{self.loss:.4f} nats a token (perplexity {perplexity(self.loss):.3f}; "
            f"{self.num_examples:,} demonstrations, {self.num_tokens:,} tokens)"
        )
        if self.num_answers:
            text += (
                f", answers of {self.length:.1f} tokens (demonstrated: "
                f"{self.reference_length:.1f}), {100 * self.exact:.1f} % equal to the "
                f"demonstrated, {100 * self.truncated:.1f} % cut"
            )
        return text


def perplexity(loss: float) -> float:
    """Returns exp(loss), infinity where that is no float."""
    return math.exp(loss) if loss < 700 else math.inf


def measure(run: SftRun, state: TrainState) -> tuple[HeldOut, list[AnswerRecord]]:
    """Measures the policy on held-out demonstrations, with the same noise every time."""
    if not run.data.held_out:
        return HeldOut(), []
    sums_N, counts_N = losses(
        run.held_out_pass,
        run.planner,
        state,
        run.data.held_out,
        at_once=run.settings.train.batch_size,
    )
    found = HeldOut(
        loss=float(sums_N.sum() / counts_N.sum()),
        sequence_loss=float((sums_N / counts_N).mean()),
        num_examples=len(sums_N),
        num_tokens=int(counts_N.sum()),
    )
    records = answers(run, state)
    if not records:
        return found, records
    lengths = np.array([record.length for record in records])
    return dataclasses.replace(
        found,
        length=float(lengths.mean()),
        length_std=float(lengths.std()),
        reference_length=float(np.mean([record.reference_length for record in records])),
        truncated=float(np.mean([record.truncated for record in records])),
        exact=float(np.mean([record.exact for record in records])),
        num_answers=len(records),
    ), records


def answers(run: SftRun, state: TrainState) -> list[AnswerRecord]:
    """Samples answers to held-out prompts; each process takes its share and gets those of all."""
    if run.sampler is None:
        return []
    asked, settings = run.data.asked, run.settings.eval
    own = asked[processes.share(len(asked))]
    requests = [Request(d.prompt.prompt_id, d.prompt.tokens, d.images) for d in own]
    found = []
    if requests:
        weights = run.rollout_params(run.policy(state))
        found, _ = run.sampler.generate(
            weights, requests, group_size=settings.num_samples, seed=settings.seed
        )
    shown = {d.prompt.prompt_id: d for d in own}
    records = [_record(run, shown[response.prompt_id], response) for response in found]
    size = settings.num_samples
    by_prompt = [records[i : i + size] for i in range(0, len(records), size)]
    return [record for part in processes.gathered(by_prompt) for record in part]


def _record(run, demonstration, response) -> AnswerRecord:
    given, decode = len(demonstration.prompt.tokens), run.model.decode
    text, reference = decode(response.tokens), decode(demonstration.tokens[given:])
    return AnswerRecord(
        prompt_id=response.prompt_id,
        sample_id=response.sample_id,
        prompt=demonstration.prompt.text,
        response=text,
        reference=reference,
        tokens=response.tokens.tolist(),
        length=len(response.tokens),
        reference_length=demonstration.answer_length,
        truncated=not response.stopped,
        exact=text == reference,
    )
