"""Measures agreement of the verifiers with public sets of labelled answers.

    python -m experiments.score_oracles --data=../shared/data/oracles
    python -m experiments.score_oracles --write=docs/rewards.md

For each set in the folder it prints agreement, precision and recall on the answers labelled right,
verdicts per second, every disagreement, and the verdicts of plain Math-Verify. A label is no proof:
some sets carry the quirks of the program that wrote them. `--write` writes the committed section,
which says for each disagreement who is right; these opinions are in oracle_reviews.tsv, beside this
file.
"""

import collections
import csv
import pathlib
import sys
import time

from absl import flags

from experiments import command
from experiments.verdicts.judging import judged
from experiments.verdicts.labelled import SETS
from experiments.verdicts.page import cell, table, write_section
from luspo_jax.rewards import Reward, Sample, Scorer, verifier

_DATA = flags.DEFINE_string("data", "../shared/data/oracles", "folder of the labelled sets")
_WORKERS = flags.DEFINE_integer("workers", None, "worker processes; by default one a core")
_SHOWN = flags.DEFINE_integer("shown", 40, "disagreements printed for each set")
_WRITE = flags.DEFINE_string("write", None, "also write the results as this Markdown file")
_REVIEWS = pathlib.Path(__file__).with_name("oracle_reviews.tsv")
TITLE = "Verifiers against labelled answers"
_HEAD = """Written by

    python -m experiments.score_oracles --write=docs/rewards.md

Precision and recall are of the verdict "right"; beside them, those of plain
Math-Verify: `parse` of the gold in a box and of the response, as they are by default, and `verify`.
A label is no proof: below, each disagreement says who is right, and why.

Known limits of `math_answer` and `boxed_math`: `\\log` and `\\ln` are two functions; sums written
with dots, "Alice and Bob" in another order, thousands written 1.000.000 and `f(t)=t` for `f(x)=x`
are not recognised; a closed bracket at infinity, the case of a choice letter, and a wrong
calculation before the last "=" are overlooked; a decimal stands for a fraction or a root from four
correct places on."""


def score(name: str, data: pathlib.Path, workers: int | None = None):
    """Returns (samples, labels, rewards, seconds) of one set."""
    folder, reader, rule, options = SETS[name]
    samples, labels = zip(*reader(data / folder), strict=True)
    with Scorer(
        {rule: 1.0}, options={rule: options}, workers=workers, max_failure_rate=1.0
    ) as scorer:
        scorer.score_batch([Sample("1", "1")] * 64)  # start the workers
        start = time.perf_counter()
        rewards = scorer.score_batch(samples)
        return samples, labels, rewards, time.perf_counter() - start


def alone(name: str, samples, workers: int | None = None) -> list[Reward]:
    """Returns the verdicts of plain Math-Verify on a set."""
    what = "whole" if SETS[name][3].get("extract") == "whole" else "response"
    return judged(f"experiments.verdicts.plain_math_verify:{what}", samples, workers=workers)


def agreement(labels, rewards: list[Reward]) -> dict[str, float]:
    """Returns counts, and precision and recall on the answers labelled right."""
    found = [reward.value > 0 for reward in rewards]
    hits = sum(label and value for label, value in zip(labels, found, strict=True))
    return {
        "total": len(labels),
        "agree": sum(bool(a) == b for a, b in zip(labels, found, strict=True)),
        "precision": hits / max(1, sum(found)),
        "recall": hits / max(1, sum(map(bool, labels))),
    }


def disagreements(samples, labels, rewards: list[Reward]) -> list[tuple[Sample, bool, Reward]]:
    """Returns the samples whose verdict differs from their label, with both."""
    rows = zip(samples, labels, rewards, strict=True)
    return [(s, bool(label), r) for s, label, r in rows if bool(label) != (r.value > 0)]


def _print(name: str, scored, plain: list[Reward]) -> None:
    samples, labels, rewards, seconds = scored
    figures, others = agreement(labels, rewards), agreement(labels, plain)
    statuses = dict(collections.Counter(reward.status for reward in rewards))
    print(
        f"{name}: {figures['agree']} of {figures['total']} agree, "
        f"precision {figures['precision']:.4f}, recall {figures['recall']:.4f}, "
        f"{len(labels) / seconds:.0f} verdicts/s, {statuses}; plain Math-Verify: "
        f"{others['agree']}, {others['precision']:.4f}, {others['recall']:.4f}"
    )
    for sample, label, reward in disagreements(samples, labels, rewards)[: _SHOWN.value]:
        print(
            f"    labelled {'right' if label else 'wrong'}: gold {sample.answer[-60:]!r}, ", end=""
        )
        print(f"answer {reward.prediction!r} ({reward.status}), text {sample.response[-80:]!r}")


def _reviews() -> dict[tuple[str, str, str], tuple[str, str]]:
    """Reads (set, gold, answer) → (who is right, why)."""
    with _REVIEWS.open(encoding="utf-8") as lines:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {tuple(row[:3]): (row[3], row[4]) for row in rows if row and row[0][0] != "#"}


def _cell(text: str | None) -> str:
    return cell(text if text is not None else "(none)")


def _label(name: str) -> str:
    return "`" + repr(verifier(*SETS[name][2:]).label)[1:-1] + "`"


def markdown(results: dict[str, tuple]) -> str:
    """Formats the committed section, without its title."""
    rows = []
    for name, ((_, labels, rewards, _), plain) in results.items():
        row = [name, _label(name), len(labels)]
        for figures in (agreement(labels, rewards), agreement(labels, plain)):
            row += [figures["agree"], f"{figures['precision']:.4f}", f"{figures['recall']:.4f}"]
        rows.append(row)
    ours = ("set", "verifier", "of", "agree", "precision", "recall")
    head = [*ours, *(f"Math-Verify: {figure}" for figure in ours[3:])]
    differing = table(["set", "gold", "answer", "label", "right is", "why"], _differences(results))
    return "\n\n".join([_HEAD, table(head, rows), "## Disagreements", differing])


def _differences(results: dict[str, tuple]) -> list[list[str]]:
    rows, reviews = [], _reviews()
    for name, ((samples, labels, rewards, _), _) in results.items():
        for sample, label, reward in disagreements(samples, labels, rewards):
            gold, answer = _cell(sample.answer), _cell(reward.prediction)
            who, why = reviews.get((name, gold, answer), ("open", "not reviewed"))
            rows.append([name, gold, answer, "right" if label else "wrong", who, why])
    return rows


def main() -> None:
    """Scores the sets in the folder, prints, and writes if requested."""
    data = pathlib.Path(_DATA.value)
    present = [name for name, (folder, *_) in SETS.items() if (data / folder).is_dir()]
    if not present:
        raise SystemExit(f"--data={data} holds none of {', '.join(SETS)}")
    results = {}
    for name in present:
        scored = score(name, data, _WORKERS.value)
        results[name] = scored, alone(name, scored[0], _WORKERS.value)
        _print(name, *results[name])
    if _WRITE.value:
        write_section(pathlib.Path(_WRITE.value), TITLE, markdown(results))


if __name__ == "__main__":
    sys.exit(command.call(main))
