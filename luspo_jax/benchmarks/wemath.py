"""We-Math testmini: 525 problems, each with questions about its steps (arXiv:2407.01284).

A problem with its steps falls into insufficient knowledge (IK), inadequate generalization (IG),
complete mastery (CM) or rote memorization (RM); score = (N − IG/2 − RM − IK)/N.
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

KIT_PROBLEMS = 525  # VLMEvalKit always divides by this number
Problem = tuple[Sequence[bool], bool]  # (each step right, the whole right)


def read(item: Item, response: str) -> Reading:
    """Reads a response: every question has options."""
    gold = item.answer.strip().upper()
    options = labelled_options(item.meta["option"])
    options = options if gold in options else {}
    right, letter = option_read(response, options, {gold})
    return Reading(right, kit_letter(response) == gold, letter)


def kit_letter(response: str) -> str | None:
    """Returns VLMEvalKit's exact-matching letter: the first character after the last "Answer".

    `load_and_process_data` of vlmeval/dataset/utils/wemath.py at commit e8e78f05.
    """
    text = re.sub(r"[><:.]", "", response.rpartition("Answer")[2].strip()).strip()
    return text[0] if text[:1] and text[0] in "ABCDEFGH" else None


def state(problem: Problem, *, loose: bool) -> str:
    """Returns IK, IG, CM or RM.

    A wrong whole is IG if every step is right, else IK. A right whole is CM if every step (or,
    loosely, any step) is right, else RM.
    """
    steps, whole = problem
    if not whole:
        return "IG" if all(steps) else "IK"
    return "CM" if (any(steps) if loose else all(steps)) else "RM"


def metrics(problems: Sequence[Problem], *, loose: bool, total: int | None = None) -> dict:
    """Returns counts and rates of the four states, and the score.

    Args:
      problems: steps and whole of each problem.
      loose: whether CM and RM are read loosely.
      total: N, by default the number of problems.

    Returns:
      IK, IG, CM, RM as counts; their rates, RM's being RM/(CM + RM) and the others' by N; score. A
      rate with denominator 0 is None.
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
    """Groups items into the steps and whole of each problem.

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
    """Returns the authors' task, question and options, without the response format."""
    return f"{_TASK}\nQuestion: {item.problem}\nOption: {item.meta['option']}"


def caveats(items: Sequence[Item]) -> list[str]:
    """Returns caveats on the figures of these items."""
    found = []
    count = len({item.meta["problem_id"] for item in items})
    if count < KIT_PROBLEMS:
        found.append(
            f"the vlmevalkit column divides by {KIT_PROBLEMS} problems, of which these are {count}"
        )
    return found


def lines(items: Sequence[Item], verdicts: Sequence[ItemVerdict]) -> list[Line]:
    """Computes score, counts and rates, strict and loose, and accuracies by number of steps."""
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
    """Computes accuracy on single steps, and on wholes by their number of steps."""
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
