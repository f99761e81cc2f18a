"""We-Math testmini: 525 problems with the questions of their steps (arXiv:2407.01284).

A problem and its steps fall into insufficient knowledge (IK), inadequate generalization (IG),
complete mastery (CM) or rote memorization (RM), and score = (N − IG/2 − RM − IK)/N.
"""

import collections
import re
from collections.abc import Sequence

from luspo_jax.benchmarks.answer_extraction import labelled_options, option_read
from luspo_jax.benchmarks.free_form import VERIFIER
from luspo_jax.benchmarks.record import BenchmarkError
from luspo_jax.benchmarks.verdicts import (
    Item,
    ItemVerdict,
    Line,
    Reading,
    VisualBenchmark,
    share,
)

KIT_PROBLEMS = 525  # VLMEvalKit divides by this number whatever it was given
Problem = tuple[Sequence[bool], bool]  # (each step right, the whole right)


def read(item: Item, response: str) -> Reading:
    """The reading of a response: every question has options."""
    gold = item.answer.strip().upper()
    options = labelled_options(item.meta["option"])
    options = options if gold in options else {}
    right, letter = option_read(response, options, {gold})
    return Reading(right, kit_letter(response) == gold, letter)


def kit_letter(response: str) -> str | None:
    """What VLMEvalKit's exact matching reads: the first character after the last "Answer".

    `load_and_process_data` of vlmeval/dataset/utils/wemath.py at commit e8e78f05.
    """
    text = re.sub(r"[><:.]", "", response.rpartition("Answer")[2].strip()).strip()
    return text[0] if text[:1] and text[0] in "ABCDEFGH" else None


def state(problem: Problem, *, loose: bool) -> str:
    """IK, IG, CM or RM.

    A wrong whole is IG where every step is right, else IK. A right whole is CM where every step is
    right, or, loosely, where any is; else RM.
    """
    steps, whole = problem
    if not whole:
        return "IG" if all(steps) else "IK"
    return "CM" if (any(steps) if loose else all(steps)) else "RM"


def metrics(problems: Sequence[Problem], *, loose: bool, total: int | None = None) -> dict:
    """Counts and rates of the four states, and the score.

    Args:
      problems: steps and whole of each problem.
      loose: the reading of CM and RM.
      total: N, by default the number of problems.

    Returns:
      IK, IG, CM, RM as counts; their rates, where RM's is RM/(CM + RM) and the others' by N; score.
      A rate by nothing is None.
    """
    counts = collections.Counter(state(problem, loose=loose) for problem in problems)
    ik, ig, cm, rm = (counts[name] for name in ("IK", "IG", "CM", "RM"))
    n = total or len(problems)
    found = {"score": (n - 0.5 * ig - rm - ik) / n if n else None}
    for name, count, below in (("IK", ik, n), ("IG", ig, n), ("CM", cm, n), ("RM", rm, cm + rm)):
        found[name] = count
        found[f"{name} rate"] = count / below if below else None
    return found


def problems_of(items: Sequence[Item], rights: Sequence[bool]) -> list[Problem]:
    """Steps and whole of each problem that the items make up.

    Raises:
      BenchmarkError: a problem without its whole or without steps.
    """
    parts = collections.defaultdict(dict)
    for item, right in zip(items, rights, strict=True):
        parts[str(item.meta["problem_id"])][str(item.meta["step"]).rpartition("_")[2]] = right
    for name, found in parts.items():
        if "multi" not in found or len(found) < 2:
            raise BenchmarkError(
                f"wemath, problem {name}: it needs its steps and its whole ('…_multi'), there are "
                f"{sorted(found)}"
            )
    return [
        ([right for step, right in found.items() if step != "multi"], found["multi"])
        for found in parts.values()
    ]


_TASK = (
    "Now, we require you to solve a multiple-choice math question. Please briefly describe your "
    "thought process and provide the final answer(option)."
)


def question(item: Item) -> str:
    """Task, question and options as the authors put them, without the format of the response."""
    return f"{_TASK}\nQuestion: {item.problem}\nOption: {item.meta['option']}"


def caveats(items: Sequence[Item]) -> list[str]:
    """What to know of the figures of these items."""
    found = []
    count = len({item.meta["problem_id"] for item in items})
    if count < KIT_PROBLEMS:
        found.append(
            f"the vlmevalkit column divides by {KIT_PROBLEMS} problems, of which these are {count}"
        )
    return found


def lines(items: Sequence[Item], verdicts: Sequence[ItemVerdict]) -> list[Line]:
    """Score, counts and rates, strict and loose, and accuracies by number of steps."""
    ours = problems_of(items, [bool(v.strict) for v in verdicts])
    kits = problems_of(items, [v.vlmevalkit for v in verdicts])
    found = []
    for loose in (False, True):
        table = "four states, loose" if loose else "four states, strict"
        a, b = metrics(ours, loose=loose), metrics(kits, loose=loose, total=KIT_PROBLEMS)
        for name in a:
            unit = "count" if len(name) == 2 else "share"
            found.append(Line(table, name, len(ours), a[name], b[name], unit))
    return found + _by_steps(ours, kits)


def _by_steps(ours: Sequence[Problem], kits: Sequence[Problem]) -> list[Line]:
    """Accuracy of the single steps, and of the wholes by their number of steps."""
    both = [[right for steps, _ in problems for right in steps] for problems in (ours, kits)]
    found = [Line("accuracy", "1 step", len(both[0]), *map(share, both))]
    for size in sorted({len(steps) for steps, _ in ours}):
        both = [[whole for steps, whole in ps if len(steps) == size] for ps in (ours, kits)]
        found.append(Line("accuracy", f"{size} steps", len(both[0]), *map(share, both)))
    return found


WEMATH = VisualBenchmark(
    id="wemath",
    version=f"2+{VERIFIER}",
    read=read,
    lines=lines,
    question=question,
    note=(
        "its exact matching, which takes the first character after the last 'Answer' for the "
        "letter; rates by 525 whatever the number of problems"
    ),
    unit="problem_id",
    whole=True,
    caveats=caveats,
)
