"""Verifiers that run in the trainer's process cost no more on a hostile text than on a long one."""

import time

import pytest

from luspo_jax.rewards import REWARDS, Sample, verifier
from luspo_jax.rewards.answers.extraction import boxed_answer, final_answer
from luspo_jax.rewards.format import FORMATS

LENGTH = 20_000
PLAIN = ("The sum of these numbers is what was asked for, and so on. " * LENGTH)[:LENGTH]
PIECES = (
    *(" ", "\n", "\t", "\u3000", "\\", "{", "}", "$", "$$", r"\(", r"\[", "(", ")", "*", "#", "##"),
    *(
        "-",
        "+",
        "=",
        ",",
        ".",
        ":",
        "!",
        ";",
        "/",
        "1",
        "1,",
        "1 ",
        "1.",
        "1/",
        "1-",
        "a",
        "A",
        "A ",
    ),
    *(r"\text{", r"\boxed{", r"\boxed{1} and ", r"\frac{1}{", "^", "_", "is ", "and ", "answer "),
    *("answer is ", "Answer: ", "answer\n", "\n**Answer**\n", "final answer is ", "#### ", "####,"),
    *("<think>", "</think>", "<answer>", "</answer>", "(A) ", "(A), ", "A or ", "not ", "option "),
    *("$a$ ", "$a$,", "$a$ and ", "$$a$", "−", "–", "１", "：", "✅", "\n✅ ", "[", "]", '"', "x="),
)
HEADS = ("", r"\text{", "#### ", "Answer: ", "The answer is ", "The answer is $5$ ", r"\boxed{")
OPTIONS = {
    "overlong": [{"buffer": 5}],
    "format": [{"name": name} for name in FORMATS],
    "user": [],  # the user's own
    "reasoning_gym": [],  # isolated, and of an extra
    "reasoning_gym_solved": [],
}


def _in_process():
    for name in REWARDS:
        for options in OPTIONS.get(name, [{}]):
            built = verifier(name, options)
            if not built.isolated:
                yield built


def _seconds(act, *arguments):
    start = time.process_time()
    act(*arguments)
    return time.process_time() - start


def _texts():
    for piece in PIECES:
        text = (piece * LENGTH)[:LENGTH]
        yield text
        yield from (f"{head}{text}5." for head in HEADS)  # an end to be reached


def _slow(read) -> list[str]:
    """Beginnings of the texts that take much longer than a plain one of their length.

    A quadratic pattern takes seconds on them, a linear one milliseconds.
    """
    most = 30 * max(_seconds(read, PLAIN) for _ in range(3)) + 0.1
    # A busy machine is slow once; such a pattern is so every time.
    return [text[:30] for text in _texts() if all(_seconds(read, text) > most for _ in range(3))]


@pytest.mark.parametrize("built", list(_in_process()), ids=lambda built: built.id)
def test_in_process_verifiers(built):
    def judge(text):
        return built.check(Sample(text, gold, length=4, max_length=10))

    gold = "5"
    if judge(PLAIN).status == "error":
        gold = "A"
    assert judge(PLAIN).status != "error"
    assert not _slow(judge)


@pytest.mark.parametrize("read", [final_answer, boxed_answer])
def test_readers(read):
    assert not _slow(read)
