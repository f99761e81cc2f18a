"""Changed and rewritten golds, and counts and files of the verdicts on them."""

import collections
import csv
import pathlib
from typing import NamedTuple

from experiments.verdicts.golds import SETS, Gold
from experiments.verdicts.judging import VERIFIERS, boxed, judged
from experiments.verdicts.mutations import MUTATIONS, mutants
from experiments.verdicts.page import table
from experiments.verdicts.rewritings import REWRITINGS, rewritings


class Trial(NamedTuple):
    """An answer to judge: its gold, its kind of change, and whether it is right."""

    gold: Gold
    kind: str
    answer: str
    right: bool


def trials(found: list[Gold], *, seed: int = 0, most: int = 3) -> tuple[list[Trial], int]:
    """Returns the changes and rewritings of golds, and how many changes kept the value."""
    made, dropped = [], 0
    for gold in found:
        changed, same = mutants(gold.text, seed=seed, most=most)
        dropped += same
        made += [Trial(gold, kind, text, False) for kind, text in changed]
        made += [
            Trial(gold, kind, text, True)
            for kind, text in rewritings(gold.text, seed=seed, most=most)
        ]
    return made, dropped


def verdicts(verifier: str, made: list[Trial], workers: int | None = None) -> list[bool]:
    """Returns whether a verifier accepts each answer."""
    samples = [boxed(trial.gold.text, trial.answer) for trial in made]
    return [r.value > 0 for r in judged(VERIFIERS[verifier], samples, workers=workers)]


def shares(made: list[Trial], accepted: dict[str, list[bool]], right: bool, by) -> list[list]:
    """Returns rows of (group, number, accepted number and share per verifier), total last."""
    counts = collections.Counter()
    for place, trial in enumerate(made):
        if trial.right == right:
            for group in (by(trial), "all"):
                counts[group, "n"] += 1
                counts.update((group, name) for name, a in accepted.items() if a[place])
    groups = dict.fromkeys([*(by(trial) for trial in made if trial.right == right), "all"])
    return [
        [group, counts[group, "n"]]
        + [
            cell
            for name in accepted
            for cell in (counts[group, name], f"{counts[group, name] / counts[group, 'n']:.2%}")
        ]
        for group in groups
        if counts[group, "n"]
    ]


def _head(first: str, accepted: dict) -> list[str]:
    return [
        first,
        "answers",
        *(cell for name in accepted for cell in (f"{name}: accepted", "share")),
    ]


def tables(made: list[Trial], accepted: dict[str, list[bool]]) -> str:
    """Formats the accepted shares of changes and of rewritings, for each set and kind."""
    orders = {name: k for k, name in enumerate([*SETS, *MUTATIONS, *REWRITINGS])}
    text = []
    for right, title in ((False, "changes accepted"), (True, "rewritings accepted")):
        for what, by in (("set", lambda t: t.gold.set), ("kind", lambda t: t.kind)):
            rows = shares(made, accepted, right, by)
            rows.sort(key=lambda row: orders.get(row[0], len(orders)))
            text.append(table(_head(f"{title}: {what}", accepted), rows))
    return "\n\n".join(text)


def write_mistakes(folder: pathlib.Path, made: list[Trial], accepted: dict) -> None:
    """Writes accepted changes to accepted.tsv, rejected rewritings to rejected.tsv.

    The first verifier decides which rows there are; each row has the verdicts of all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(accepted.values()))
    for name, right in (("accepted", False), ("rejected", True)):
        with (folder / f"{name}.tsv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(["set", "id", "kind", "gold", "answer", *accepted])
            for place, trial in enumerate(made):
                if trial.right == right and first[place] != right:
                    found = ["right" if a[place] else "wrong" for a in accepted.values()]
                    row = [trial.gold.set, trial.gold.id, trial.kind, trial.gold.text, trial.answer]
                    writer.writerow(row + found)
