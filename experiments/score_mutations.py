"""What the verifier says of changed golds, which are wrong, and of rewritten ones, which are right.

    python -m experiments.score_mutations --data=../shared/data
    python -m experiments.score_mutations --data=../shared/data --sets=math500 --verifier=ours
    python -m experiments.score_mutations --data=../shared/data --out=/tmp/mutations \\
        --write=docs/rewards.md

Takes every distinct reference answer of the sets and changes one number, sign, exponent, name,
unit, operator, bracket, item or side of it (experiments/verdicts/mutations.py); a change that an
independent reading (experiments/verdicts/truth.py) proves to be none is left out and counted. Its
mirror writes each answer in other ways (experiments/verdicts/rewritings.py). Prints the shares that
are accepted, for each set and kind, beside those of plain Math-Verify. `--out` keeps every mistake
of ours as accepted.tsv and rejected.tsv.
"""

import collections
import csv
import pathlib
from typing import NamedTuple

from absl import app, flags

from experiments.verdicts.golds import SETS, Gold, golds
from experiments.verdicts.judging import VERIFIERS, boxed, judged
from experiments.verdicts.mutations import MUTATIONS, mutants
from experiments.verdicts.page import table, write_section
from experiments.verdicts.rewritings import REWRITINGS, rewritings

_DATA = flags.DEFINE_string("data", "../shared/data", "folder of the public data files")
_SETS = flags.DEFINE_list("sets", list(SETS), "sets of golds")
_VERIFIER = flags.DEFINE_list("verifier", list(VERIFIERS), "whose verdicts to show")
_SEED = flags.DEFINE_integer("seed", 0, "of the choice among the changes of a kind")
_MOST = flags.DEFINE_integer("most", 3, "changes of one kind to one gold", lower_bound=1)
_GOLDS = flags.DEFINE_integer("golds", None, "golds of each set; by default all")
_WORKERS = flags.DEFINE_integer("workers", None, "worker processes; by default one a core")
_OUT = flags.DEFINE_string("out", None, "folder for accepted.tsv and rejected.tsv")
_WRITE = flags.DEFINE_string("write", None, "also write the tables into this Markdown file")
_COMMAND = "    python -m experiments.score_mutations --data=../shared/data --write=docs/rewards.md"
TITLE = "Changed and rewritten golds"


class Trial(NamedTuple):
    """One answer to be judged: what it was made of, how, and whether it is right."""

    gold: Gold
    kind: str
    answer: str
    right: bool


def trials(found: list[Gold], *, seed: int = 0, most: int = 3) -> tuple[list[Trial], int]:
    """The changes and rewritings of golds; and how many changes were none in truth."""
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
    """Whether a verifier accepts each answer."""
    samples = [boxed(trial.gold.text, trial.answer) for trial in made]
    return [r.value > 0 for r in judged(VERIFIERS[verifier], samples, workers=workers)]


def shares(made: list[Trial], accepted: dict[str, list[bool]], right: bool, by) -> list[list]:
    """Rows of (group, number, accepted and share of each verifier), the last one of all."""
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
    """The shares of accepted answers, of changes and of rewritings, for each set and kind."""
    orders = {name: k for k, name in enumerate([*SETS, *MUTATIONS, *REWRITINGS])}
    text = []
    for right, title in ((False, "changes accepted"), (True, "rewritings accepted")):
        for what, by in (("set", lambda t: t.gold.set), ("kind", lambda t: t.kind)):
            rows = shares(made, accepted, right, by)
            rows.sort(key=lambda row: orders.get(row[0], len(orders)))
            text.append(table(_head(f"{title}: {what}", accepted), rows))
    return "\n\n".join(text)


def write_mistakes(folder: pathlib.Path, made: list[Trial], accepted: dict) -> None:
    """accepted.tsv has the changes that are accepted, rejected.tsv the rewritings that are not.

    The first verifier decides which rows there are; the verdicts of all stand in each row.
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


def main(argv) -> None:
    del argv
    unknown = [n for n in _SETS.value if n not in SETS]
    unknown += [n for n in _VERIFIER.value if n not in VERIFIERS]
    if unknown:
        raise SystemExit(
            f"unknown {unknown[0]!r}: --sets are {', '.join(SETS)}; "
            f"--verifier {', '.join(VERIFIERS)}"
        )
    data = pathlib.Path(_DATA.value)
    found = [gold for name in _SETS.value for gold in golds(name, data)[: _GOLDS.value]]
    made, dropped = trials(found, seed=_SEED.value, most=_MOST.value)
    accepted = {name: verdicts(name, made, _WORKERS.value) for name in _VERIFIER.value}
    summary = (
        f"{len(found):,} golds, {sum(not t.right for t in made):,} changes "
        f"({dropped:,} more were the gold in truth), {sum(t.right for t in made):,} rewritings."
    )
    print(summary, tables(made, accepted), sep="\n\n")
    if _OUT.value:
        write_mistakes(pathlib.Path(_OUT.value), made, accepted)
    if _WRITE.value:
        body = "\n\n".join([_COMMAND, summary, tables(made, accepted)])
        write_section(pathlib.Path(_WRITE.value), TITLE, body)


if __name__ == "__main__":
    app.run(main)
