"""Two rewards of the study that are stricter than correctness."""

import re

_ANSWER = re.compile(r"#### (\d)$")
_TRACE = re.compile(r"(?:[a-f]\d=\d )*#### \d")


def sparse(response: str, answer: str) -> float:
    """Rewards right answers of problems whose answer is 0: four groups in five carry no signal."""
    return float(answer == "0" and _said(response) == answer)


def strict(response: str, answer: str) -> float:
    """Rewards right answers in exact form: labels ascending, any trace up to the last term."""
    if not _TRACE.fullmatch(response) or _said(response) != answer:
        return 0.0
    labels = re.findall(r"([a-f])\d=", response)
    return float(labels == sorted(set(labels)) and (not labels or labels[-1] == "f"))


def _said(response):
    found = _ANSWER.search(response)
    return found.group(1) if found else None
