"""Answers in running text: which is found, and what becomes of those that are not."""

import pytest

from luspo_jax.rewards import Sample, verifier
from luspo_jax.rewards.answers.extraction import final_answer


def _verdict(response, answer, extract="final", **meta):
    built = verifier("math_answer", {"extract": extract})
    return built.check(Sample(response, answer, meta=meta))


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{4} no, \boxed{5}", "5"),
        (r"\boxed{1} and \boxed{2}", "1,2"),
        (r"\boxed{1}, \boxed{2}", "1,2"),
        (r"$x = \boxed{1}$ or $x = \boxed{2}$", "1,2"),
        (r"\boxed{1} papers and \boxed{2} bins", "1,2"),
        ("\\boxed{1} and so on.\nThus \\boxed{2}", "2"),
        (r"\boxed{1} no no no no no \boxed{2}", "2"),
        (
            r"$-\boxed{256}$. Final Answer: The final answer is $-256$. I hope it is correct.",
            "-256",
        ),
        (r"Final Answer: The final answer is $9$. I hope it is correct.", "9"),
        (r"\boxed{4 - 20i} is the answer is it not", "4 - 20i"),
        ("The final answer is Evelyn. I hope it is correct.", "Evelyn"),
        ("Answer: The largest $n$ is 34.", "34"),
        ("**Answer:** 12.5 apples", "12.5 apples"),
        ("## Final Answer: $3$", "3"),
        ("The answer is $x^2$, because", "x^2"),
        ("Thus, the answer is:\n\\[ \\frac{207}{64} \\]", r"\frac{207}{64}"),
        ("#### 18", "18"),
        ("<think> 3? </think> <answer> 18 </answer>", "18"),
        (r"<think>\boxed{3}</think><answer>The answer is $\frac{1}{2}$</answer>", r"\frac{1}{2}"),
        ("The answer is 3. No: the answer is 4.", "4"),
        ('The final answer is "even".', "even"),
        (r"The final answer is $1$ and $2$.", "1,2"),
        ("the sum is 5", None),
        ("5", None),
        (r"\boxed{5", None),
        ("", None),
    ],
)
def test_the_answer_that_a_response_ends_on(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "extract", "value", "status"),
    [
        (r"so \boxed{\frac{1}{2}}", "final", 1, "ok"),
        ("The answer is 0.5.", "final", 1, "ok"),
        ("The answer is 0.5.", "boxed", 0, "unparsed"),
        ("0.5", "final", 0, "unparsed"),
        ("0.5", "whole", 1, "ok"),
        (r"\boxed{3}", "final", 0, "ok"),
        (r"\boxed{}", "final", 0, "unparsed"),
        (r"\boxed{" + "1+" * 5000 + "1}", "final", 0, "unparsed"),
    ],
)
def test_verdicts(response, extract, value, status):
    verdict = _verdict(response, r"\frac{1}{2}", extract)
    assert (verdict.value, verdict.status) == (value, status)


def test_boxed_math_reads_boxes_only():
    check = verifier("boxed_math").check
    assert check(Sample(r"The answer is 4. \boxed{5}. The final answer is 6", "5")).value == 1
    assert check(Sample("The answer is 5", "5")).status == "unparsed"


def test_the_reference_may_be_boxed_and_a_precision_is_kept():
    assert _verdict(r"\boxed{5}", r"so $\boxed{5}$").value == 1
    assert _verdict(r"\boxed{5.1}", "5", precision=0.2).value == 1
    assert _verdict(r"\boxed{5.1}", "5", precision="0.01").value == 0


def test_an_unknown_extraction_is_refused():
    with pytest.raises(ValueError, match="boxed"):
        verifier("math_answer", {"extract": "last"})


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("Answer $ 8 $", "$8$", 1),
        ("So $y \\geq 4$ is the solution.", "$y \\geq 4$", 1),
        ("The sum of all is $\\frac{3}{7}$.", "3/7", 1),
        ("At first $3$. The value of $f(1)$ is 6.", "6", 1),
        ("At first $3$. The value of $f(1)$ is 6.", "3", 0),
        ("2 + $3$", "3", 0),
        ("any $k$, where $m$ is $2k$", "any $k$, where $m$ is $2k$", 1),
    ],
)
def test_a_whole_text_that_is_a_sentence_says_its_answer(text, gold, value):
    check = verifier("math_answer", {"extract": "whole"}).check
    assert check(Sample(text, gold)).value == value
