"""Finding the final answer in a response."""

import time

import pytest

from luspo_jax.rewards.answers.extraction import (
    after_reasoning,
    boxed_answer,
    boxed_contents,
    final_answer,
    plain_signs,
    with_opening,
)


@pytest.mark.parametrize(
    ("response", "spoken"),
    [
        ("It is 5.", "It is 5."),
        ("<think>It is 4.</think>It is 5.", "It is 5."),
        ("It is 4.\n</think>\nIt is 5.", "\nIt is 5."),  # the prompt opened the reasoning
        ("<think>a</think>It is 4.<think>b</think>It is 5.", "It is 5."),
        ("It is 4.<think>b", ""),
        ("<think>a</think>It is 4.<think>b", ""),
        ("<think>a</think>", ""),
        ("", ""),
    ],
)
def test_what_is_thought_is_no_answer(response, spoken):
    assert after_reasoning(response) == spoken


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("<user>Why?<assistant><think>\n", "<think>\n"),
        ("<user>Why?<assistant><think>\n\n</think>\n\n", ""),
        ("Begin with <think>. <user>Why?<assistant>", ""),
        ("Why?", ""),
        ("", ""),
    ],
)
def test_reasoning_that_the_prompt_begins_belongs_to_the_response(prompt, opening):
    assert with_opening(prompt, "It is 5.") == opening + "It is 5."


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("−5", "-5"),
        ("‑5", "-5"),
        ("－５．２５", "-5.25"),
        ("–7 and x – 7", "-7 and x – 7"),
        ("from 10–12", "from 10–12"),
        ("Ａnswer：（１，２）", "Answer:(1,2)"),
        ("1\u202f000\u200b", "1 000"),
        ("ñ", "ñ"),
    ],
)
def test_signs_in_ascii(written, plain):
    assert plain_signs(written) == plain


@pytest.mark.parametrize(
    ("sentence", "answer"),
    [
        # A full stop inside the dollars ends the sentence, and only there.
        ("$7.$ This is what I found.", "7."),
        ("\\(7.\\) It is hoped.", "7."),
        ("$7.5$ metres. It is far.", "7.5"),
        ("$4!$ of them. It is a lot.", "4!"),
        # What touches a formula belongs to it.
        ("30$^\\circ$.", r"30^\circ"),
        ("3$\\sqrt{5}$, or so", r"3\sqrt{5}"),
        ("-$\\frac12$.", r"-\frac12"),
        ("-$a-b$.", "-(a-b)"),
        ("$8$% of all", "8%"),
        ("$8$km.", "8km"),
        ("f$(x)$", "f(x)"),
        ("2$\\pi$r", r"2\pi r"),
        ("$6$-$8$.", "6-8"),
        # So do numbers and signs beside it.
        ("9 $\\pi$", r"9 \pi"),
        ("1 + $6$", "1 + 6"),
        ("$6$ - $1$", "6 - 1"),
        ("$x$ = 6", "x = 6"),
        ("($6$, $7$).", "(6,7)"),
        ("[$0$, $1$)", "[0,1)"),
        ("$x$ = 5 and $y$ = 6.", "x = 5,y = 6"),
        # Words and their punctuation do not.
        ("the number $8$ of course", "8"),
        ("about:$8$", "8"),
        ('the word "$8$"', "8"),
        ("(in the first case) $8$", "8"),
        ("(for the second, $8$ metres)", "8"),
        ("**$8$**.", "8"),
        ("= $8$", "8"),
        # Money is no formula.
        ("$8", "$8"),
        ("\\$8 and no more", r"\$8 and no more"),
    ],
)
def test_a_formula_and_what_touches_it_are_one_answer(sentence, answer):
    assert final_answer(f"So the answer is {sentence}") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So many.\n\n🎉 Final answer: **41**", "41"),
        ("So many.\n→ Answer: 41", "41"),
        ("So many.\n\n**Final Answer**\n\n41\n", "41"),
        ("So many.\n### Answer\n$41$", "41"),
        ("Answer\n41", None),
        ("**Answer**\nFirst count.\nThen the answer is 41.", "41"),
        ("Answer：４１", "41"),
        ("<think>The answer is 40.</think>The answer is 41.", "41"),
        ("<think>The answer is 40.", None),
        (r"\framebox{41}", "41"),
    ],
)
def test_announcements(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"\boxed{1}", ["1"]),
        (r"\boxed{\frac{1}{2}} then \fbox{3}", [r"\frac{1}{2}", "3"]),
        (r"\boxed {x}", ["x"]),
        (r"\boxed{\boxed{7}}", [r"\boxed{7}"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{a\}", []),
        (r"\boxed{", []),
        (r"\boxed{1 \boxed{2}", ["2"]),
        (r"} \boxed{3}}", ["3"]),
        ("boxed{1}", []),
        ("", []),
    ],
)
def test_boxes(text, contents):
    assert boxed_contents(text) == contents


@pytest.mark.parametrize(
    "piece",
    [
        *(r"\boxed{", "{", "}", r"\boxed{}", "\\", r"\boxed{1} and ", "$", "$$", r"\(", " ", "\n"),
        *("answer is ", "answer", "Answer: ", "#### ", "is ", "* ", "final answer is $1$ and "),
    ],
)
def test_time_grows_with_the_length_and_no_faster(piece):
    text = piece * (200_000 // len(piece))
    start = time.process_time()
    boxed_answer(text)
    final_answer(text)
    final_answer("answer is " + text)
    assert time.process_time() - start < 3.0
