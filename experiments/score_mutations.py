"""Measures the verifier on changed golds, which are wrong, and rewritten ones, which are right.

    python -m experiments.score_mutations --data=../shared/data
    python -m experiments.score_mutations --data=../shared/data --sets=math500 --verifier=ours
    python -m experiments.score_mutations --data=../shared/data --out=/tmp/mutations \\
        --write=docs/rewards.md

It takes every distinct reference answer of the sets and changes one number, sign, exponent, name,
unit, operator, bracket, item or side of it (experiments/verdicts/mutations.py). Changes that keep
the value, proven by an independent reading (experiments/verdicts/truth.py), are left out and
counted. It also rewrites each answer in other ways (experiments/verdicts/rewritings.py). It prints
the accepted shares, for each set and kind, beside those of plain Math-Verify. `--out` saves our
mistakes as accepted.tsv and rejected.tsv.
"""

import pathlib
import sys

from absl import flags

from experiments import command
from experiments.verdicts.golds import SETS, golds
from experiments.verdicts.judging import VERIFIERS
from experiments.verdicts.page import write_section
from experiments.verdicts.trials import tables, trials, verdicts, write_mistakes
from luspo_jax.hosts import files

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


def main() -> None:
    """Runs the command that the flags select."""
    unknown = [n for n in _SETS.value if n not in SETS]
    unknown += [n for n in _VERIFIER.value if n not in VERIFIERS]
    if unknown:
        raise SystemExit(
            f"unknown {unknown[0]!r}: --sets are {', '.join(SETS)}; "
            f"--verifier {', '.join(VERIFIERS)}"
        )
    if _OUT.value:
        files.check_own(_OUT.value, ours=["accepted.tsv"], what="mistakes", flag="--out")
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
    sys.exit(command.call(main))
