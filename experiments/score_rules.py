"""Measures the value of each rule of the mathematical verifier.

    python -m experiments.score_rules --data=../shared/data
    python -m experiments.score_rules --data=../shared/data --write=docs/rewards.md

It turns off one rule at a time, among those that gave an opinion on a verdict, and counts the
verdicts that change: on the labelled answers of `score_oracles`, on the table of the project's own
tests, and on the changed and rewritten golds of `score_mutations`. A rule mends a verdict that is
wrong without it, and spoils one that is right without it. A rule that mends nothing should be
dropped.
"""

import collections
import csv
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import NamedTuple

from absl import flags

from experiments import command
from experiments.verdicts.golds import SETS, golds
from experiments.verdicts.judging import boxed, judged
from experiments.verdicts.labelled import SETS as LABELLED
from experiments.verdicts.page import cell, table, write_section
from experiments.verdicts.trials import trials
from luspo_jax.rewards import Reward, Sample

_DATA = flags.DEFINE_string("data", "../shared/data", "folder of the public data files")
_GOLDS = flags.DEFINE_integer("golds", 300, "golds of each set that are changed and rewritten")
_SEED = flags.DEFINE_integer("seed", 0, "of the choice among the changes of a kind")
_WORKERS = flags.DEFINE_integer("workers", None, "worker processes; by default one a core")
_WRITE = flags.DEFINE_string("write", None, "also write the table into this Markdown file")
_CASES = pathlib.Path(__file__).parents[1] / "tests" / "rewards" / "answers" / "math_cases.tsv"
_REWARD = "experiments.verdicts.ablation:check"
_TIME_LIMIT = 60.0  # seconds; a sample is judged again for each rule with an opinion
_COMMAND = "    python -m experiments.score_rules --data=../shared/data --write=docs/rewards.md"
TITLE = "What each rule is worth"
GROUPS = ("labelled answers", "own cases", "changed golds", "rewritten golds")


class Labelled(NamedTuple):
    """An answer to judge, whether it is right, and its source."""

    group: str
    sample: Sample
    right: bool


def _with(sample: Sample, extract: str) -> Sample:
    return Sample(sample.response, sample.answer, meta={**sample.meta, "extract": extract})


def labelled(data: pathlib.Path) -> Iterable[Labelled]:
    """Yields the labelled answers that the mathematical verifier judges."""
    for folder, reader, rule, options in LABELLED.values():
        if rule == "math_answer" and (data / folder).is_dir():
            for sample, label in reader(data / folder):
                yield Labelled(GROUPS[0], _with(sample, options["extract"]), bool(label))


def cases(path: pathlib.Path) -> Iterable[Labelled]:
    """Reads the table of the tests: gold, answer, verdict, reason."""
    with path.open(encoding="utf-8") as lines:
        for row in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            if row and not row[0].startswith("#"):
                sample = _with(boxed(row[0], row[1]), "boxed")
                yield Labelled(GROUPS[1], sample, row[2] == "1")


def made(data: pathlib.Path, count: int, seed: int) -> Iterable[Labelled]:
    """Yields changed and rewritten golds, one of each kind."""
    for name in SETS:
        for trial in trials(golds(name, data)[:count], seed=seed, most=1)[0]:
            sample = _with(boxed(trial.gold.text, trial.answer), "boxed")
            yield Labelled(GROUPS[3] if trial.right else GROUPS[2], sample, trial.right)


def worth(samples: list[Labelled], rewards: list[Reward]) -> dict[str, collections.Counter]:
    """Counts verdicts by rule → (group, "mends" or "spoils")."""
    from experiments.verdicts.ablation import rules

    found = {name: collections.Counter() for name in rules()}
    for one, reward in zip(samples, rewards, strict=True):
        effect = "mends" if (reward.value > 0) == one.right else "spoils"
        for name in json.loads(reward.prediction or "[]"):
            found[name][one.group, effect] += 1
    return found


def markdown(samples: list[Labelled], found: dict[str, collections.Counter]) -> str:
    """Formats the table of rules, those that mend nothing last, and the number of answers."""
    sizes = collections.Counter(one.group for one in samples)
    rows = [
        [cell(name), *(f"{counts[g, 'mends']} / {counts[g, 'spoils']}" for g in GROUPS)]
        for name, counts in found.items()
    ]
    said = ", ".join(f"{sizes[group]:,} {group}" for group in GROUPS)
    idle = [cell(name) for name, counts in found.items() if not _mended(counts)]
    return "\n\n".join(
        (
            f"Verdicts that a rule mends / spoils, of {said}.",
            table(["rule", *GROUPS], rows),
            f"Rules that mend nothing here: {', '.join(idle) or 'none'}.",
        )
    )


def _mended(counts: collections.Counter) -> int:
    return sum(number for (_, effect), number in counts.items() if effect == "mends")


def main() -> None:
    """Runs the command that the flags select."""
    data = pathlib.Path(_DATA.value)
    samples = [
        *labelled(data / "oracles"),
        *cases(_CASES),
        *made(data, _GOLDS.value, _SEED.value),
    ]
    rewards = judged(
        _REWARD,
        [one.sample for one in samples],
        workers=_WORKERS.value,
        time_limit=_TIME_LIMIT,
    )
    late = sum(reward.status != "ok" for reward in rewards)
    text = markdown(samples, worth(samples, rewards))
    print(text, f"{late} answers without a verdict", sep="\n\n")
    if _WRITE.value:
        write_section(pathlib.Path(_WRITE.value), TITLE, f"{_COMMAND}\n\n{text}")


if __name__ == "__main__":
    sys.exit(command.call(main))
