"""Would drafts by prompt lookup pay? `python -m experiments.bench.ngram`.

A draft is what followed the last n tokens where they stood before, in the prompt or the response:
no model makes it. A token's noise is fixed by its position, so a drafted token is accepted exactly
if it is the one that would be sampled anyway, and responses as they are say how many would have
been. One verification runs a row over its newest token and the draft, w tokens in all, and gains
the accepted ones and one more. What a step over w tokens a row costs is measured as a step over w
times the rows. Both are of SmolLM2-135M-Instruct, on CPU or whatever jax runs on.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags

from experiments import command
from luspo_jax.hosts import files

ROOT = pathlib.Path(__file__).resolve().parents[2]

_PROMPTS = flags.DEFINE_integer("prompts", 16, "Prompts of each kind.", 1)
_GROUP = flags.DEFINE_integer("group", 4, "Responses to each; one of them at temperature 0.", 1)
_RESPONSE = flags.DEFINE_integer("response_length", 256, "Most tokens.", 1)
_TEMPERATURES = flags.DEFINE_list("temperatures", ["1.0", "0.6", "0"], "Of sampling.")
_WIDTHS = flags.DEFINE_list("widths", ["2", "4", "8"], "Tokens a row of one verification.")
_NGRAMS = flags.DEFINE_list("ngrams", ["3", "2"], "Tokens that must have stood before.")
_BATCHES = flags.DEFINE_list("batches", ["1", "4", "16", "64"], "Rows decoded together.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Measurements of each step; the least counts.", 1)
_DATA = flags.DEFINE_string(
    "data", os.environ.get("LUSPO_TEST_DATA", str(ROOT.parent / "shared" / "data")),
    "Folder with math_eval/gsm8k/test.jsonl.",
)  # fmt: skip
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.", 0)
_JSON = flags.DEFINE_string("json", None, "File for everything measured.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace that file if it exists.")

_STEPS = 8, 24  # response lengths whose difference in time is that of their steps
_SHORT = 16  # prompt tokens where a step is timed


def drafted(tokens: Sequence[int], ngram: int, count: int) -> list[int]:
    """Returns up to `count` tokens that followed the last `ngram` tokens where they stood before.

    That is the last such place that `count` tokens follow, else the one that most follow.
    """
    tail, found = list(tokens[-ngram:]), []
    for end in range(len(tokens) - 1, ngram - 1, -1):
        if list(tokens[end - ngram : end]) == tail:
            found = list(tokens[end : end + count])
            if len(found) == count:
                break
    return found


@dataclasses.dataclass(frozen=True)
class Gains:
    """What drafts would have done for some responses.

    Attributes:
      tokens: of the responses.
      verifications: model steps a row.
      drafts: those with a draft.
      positions: tokens that these steps ran over.
    """

    tokens: int
    verifications: int
    drafts: int
    positions: int

    @property
    def gain(self) -> float:
        """Returns tokens a verification; 1 without drafts."""
        return self.tokens / self.verifications

    @property
    def width(self) -> float:
        """Returns tokens that a verification runs over; 1 without drafts."""
        return self.positions / self.verifications


def simulated(prompt: Sequence[int], response: Sequence[int], *, ngram: int, width: int) -> Gains:
    """Replays one response with drafts of up to `width` − 1 tokens.

    Each step takes a row's newest token, whose successor is not known yet, and the draft after it.
    """
    text, at = [*prompt, *response], len(prompt)
    steps = drafts = positions = 0
    while at < len(text):
        draft = drafted(text[:at], ngram, width - 1)
        right = 0
        while right < len(draft) and at + right < len(text) and draft[right] == text[at + right]:
            right += 1
        steps, drafts = steps + 1, drafts + bool(draft)
        positions += 1 + len(draft)
        at += right + 1
    return Gains(len(response), steps, drafts, positions)


def total(gains: Sequence[Gains]) -> Gains:
    """Adds up the responses."""
    return Gains(*(sum(getattr(g, f.name) for g in gains) for f in dataclasses.fields(Gains)))


def speed_ups(gains: Gains, batch: int, width: int, cost: Mapping[int, float]) -> dict[str, float]:
    """Returns expected speed-ups of decoding `batch` rows: gain · cost(batch) / cost of the step.

    `packed`: a step costs what its tokens cost, as if drafts of different lengths were laid out
    without padding. `padded`: every row has `width` tokens, unless no row has a draft.

    Args:
      gains: of the responses.
      batch: rows.
      width: most tokens a row.
      cost: rows → seconds of a step.
    """
    rows = sorted(cost)
    packed = float(np.interp(batch * gains.width, rows, [cost[r] for r in rows]))
    plain = (1 - gains.drafts / gains.verifications) ** batch
    padded = plain * cost[batch] + (1 - plain) * cost[batch * width]
    return {
        name: gains.gain * cost[batch] / of for name, of in (("packed", packed), ("padded", padded))
    }


def sampled(problems: Sequence[str], temperature: float) -> list[tuple[tuple[int, ...], list[int]]]:
    """Returns (prompt, response) pairs of the model at a temperature."""
    from transformers import AutoTokenizer

    from experiments.bench import sampling_work
    from experiments.bench.sampling_sides import Engine

    work = sampling_work.real(pathlib.Path(), prompts=1, group=1, limit=_RESPONSE.value)
    tokenizer = AutoTokenizer.from_pretrained(work.folder)
    prompts = tuple(sampling_work.chat_tokens(tokenizer, problem) for problem in problems)
    group = _GROUP.value if temperature else 1
    work = dataclasses.replace(
        work, prompts=prompts, group=group, limits=work.limits * len(prompts)
    )
    side = Engine(work)
    side.engine.sampling = dataclasses.replace(side.engine.sampling, temperature=temperature)
    responses, _ = side.generate(_SEED.value)
    return [(prompts[r.prompt_id], r.tokens.tolist()) for r in responses]


def step_seconds(rows: Sequence[int]) -> dict[int, float]:
    """Measures a decode step over each number of rows: the least of several, taken in turns."""
    from experiments.bench import sampling_work
    from experiments.bench.sampling_sides import Engine

    real = sampling_work.real(pathlib.Path(), prompts=1, group=1, limit=1)
    prompt = real.prompts[0][:_SHORT]
    found = {count: [] for count in rows}
    sides, params = {}, None
    for count in rows:
        for length in _STEPS:
            work = dataclasses.replace(
                real, prompts=(prompt,), group=count, limits=(length,), stops=()
            )
            fields = {"rollout.num_slots": count, "rollout.chunk_length": 64}
            sides[count, length] = Engine(work, fields_set=fields, params=params)
            params = sides[count, length].params
            sides[count, length].sample(_SEED.value)  # compiles
    for repeat in range(_REPEATS.value):
        for count in rows:
            low, high = (sides[count, length].sample(repeat) for length in _STEPS)
            steps = high.stats.decode_steps - low.stats.decode_steps
            found[count].append((high.seconds - low.seconds) / steps)
    return {count: min(seconds) for count, seconds in found.items()}


def measure(say=print) -> dict:
    """Samples, replays and times; returns everything as JSON values."""
    from experiments.bench import report, sampling_work

    environment = report.environment()
    say(report.environment_lines(environment))
    real, name = sampling_work.real_problems(pathlib.Path(_DATA.value), _PROMPTS.value)
    kinds = {name: real, "chain_sum": sampling_work.sums(_PROMPTS.value)}
    found = []
    for kind, problems in kinds.items():
        for temperature in map(float, _TEMPERATURES.value):
            found += replayed(kind, problems, temperature, say)
    batches = [int(x) for x in _BATCHES.value]
    widths = sorted({1, *(replay["width"] for replay in found)})
    cost = step_seconds(sorted({b * w for b in batches for w in widths}))
    say("\nrows   milliseconds a step")
    for rows, seconds in cost.items():
        say(f"{rows:4}   {seconds * 1e3:8.2f}")
    say(f"\nspeed-up (packed, padded) by rows: {', '.join(map(str, batches))}")
    for replay in found:
        gains = Gains(**replay["gains"])
        ups = {batch: speed_ups(gains, batch, replay["width"], cost) for batch in batches}
        replay["speed_up"] = ups
        shown = "   ".join(f"{up['packed']:.2f}, {up['padded']:.2f}" for up in ups.values())
        say(f"{_named(replay)}   {shown}")
    return {"environment": environment, "step_seconds": cost, "replays": found}


def replayed(kind: str, problems: Sequence[str], temperature: float, say) -> list[dict]:
    """Replays responses to one kind of problem at one temperature, with every draft."""
    pairs = sampled(problems, temperature)
    mean = statistics.fmean(len(response) for _, response in pairs)
    say(f"{kind}, temperature {temperature:g}: {len(pairs)} responses, mean {mean:.0f} tokens")
    found = []
    for ngram in map(int, _NGRAMS.value):
        for width in map(int, _WIDTHS.value):
            gains = total([simulated(*pair, ngram=ngram, width=width) for pair in pairs])
            replay = {"problems": kind, "temperature": temperature, "ngram": ngram, "width": width}
            found.append(replay | {"gains": dataclasses.asdict(gains)})
            say(
                f"{_named(replay)}   {gains.gain:.3f} tokens a step over {gains.width:.3f}; "
                f"{gains.drafts / gains.verifications:.1%} have a draft"
            )
    return found


def _named(replay):
    return (
        f"{replay['problems']:9} temperature {replay['temperature']:<3g} n {replay['ngram']} "
        f"w {replay['width']}"
    )


def main() -> None:
    """Measures and prints."""
    if _JSON.value:
        files.check_file(_JSON.value, flag="--json", overwrite=_OVERWRITE.value)
    found = measure()
    if _JSON.value:
        text = json.dumps(found, indent=2) + "\n"
        files.write_new(_JSON.value, text, flag="--json", overwrite=_OVERWRITE.value)


if __name__ == "__main__":
    sys.exit(command.call(main))
