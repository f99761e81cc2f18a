"""LogicVista: 448 questions answered by one letter or several, by skill (arXiv:2407.04973)."""

from luspo_jax.benchmarks.answer_extraction import chosen_labels, labels_in, stated_answer
from luspo_jax.benchmarks.verdicts import Item, Reading, VisualBenchmark, accuracy


def read(item: Item, response: str) -> Reading:
    """Reads a response: right if it names the same set of labels.

    An annotation without an answer is unusable: one of the 448 is.
    """
    gold, labels = labels_in(item.answer), chosen_labels(response)
    extracted = None if labels is None else ", ".join(sorted(labels))
    strict = None if gold is None else labels == gold
    return Reading(strict, _kit(item.answer, response, extracted), extracted)


def _kit(gold: str, response: str, extracted: str | None) -> bool:
    """Applies `LogicVista_auxeval`, vlmeval/dataset/utils/logicvista.py at commit e8e78f05.

    Kept from it: letters must be upper case, with nothing else. Our extraction replaces its
    judge's, in the case in which the response wrote the letters.
    """
    if extracted is None:
        return False
    stated = stated_answer(response) or ""
    written = labels_in(stated) is not None and extracted.lower() == stated.strip().lower()
    answer = (stated.strip() if written else extracted).replace(", ", "")
    if not answer.isupper() or not answer.isalpha():
        return False
    return sorted(answer.lower()) == sorted("".join(gold.split(", ")).lower())


def question(item: Item) -> str:
    """Returns the question unchanged: it or its image contains the choices."""
    return item.problem


def lines(items, verdicts) -> list:
    """Computes accuracy overall and by skill."""
    return [
        *accuracy("accuracy", items, verdicts),
        *accuracy("accuracy by skill", items, verdicts, lambda item: item.meta["skill"]),
    ]


LOGICVISTA = VisualBenchmark(
    id="logicvista",
    version="2",
    read=read,
    lines=lines,
    question=question,
    note=(
        "its rule, with our extraction for its judge's, without which it gives no figures: lower "
        "case is wrong, and so is every answer to a question whose reference is no letter"
    ),
)
