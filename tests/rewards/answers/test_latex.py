"""One form for answers in LaTeX."""

import time

import pytest

from luspo_jax.rewards.answers import latex


@pytest.mark.parametrize(
    ("answer", "tidied"),
    [
        ("$ 5 $.", "5"),
        (r"\( x \)", "x"),
        ("$1$ and $2$", "1 and 2"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"11,\! 111", "11,111"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"( 3, \frac{\pi}{2} )"),
        (r"k_{\mathrm{B}}", "k_{B}"),
        (r"k_{\text{B}} T_s", "k_{B} T_{s}"),
        (r"I_{\max }", "I_{max}"),
        (r"\\frac{1}{2}", r"\frac{1}{2}"),
        (r"\begin{pmatrix}1\\a\end{pmatrix}", r"\begin{pmatrix}1\\a\end{pmatrix}"),
        (
            r"\begin{pmatrix}1\\ \frac12\end{pmatrix}",
            r"\begin{pmatrix}1\\ \frac{1}{2}\end{pmatrix}",
        ),
        ("−5 ≤ x", r"-5 \le x"),
        ("12 dollars", "12 dollars"),
        ("$12$ dollars", r"12 \text{dollars}"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"5\,\mathrm{cm}", r"5 \text{cm}"),
        ("2√3", r"2\sqrt{3}"),
        ("10 or 12", "10 or 12"),
        ("2 pi", "2 pi"),
        ("3 m²", r"3 \text{m}^{2}"),
        (r"\$12", r"\$12"),
    ],
)
def test_tidy(answer, tidied):
    assert latex.tidy(answer) == tidied
    assert latex.tidy(tidied) == tidied


@pytest.mark.parametrize(
    ("answer", "name", "value"),
    [
        ("x = 5", "x", "5"),
        ("f(x)=2x+1", "f(x)", "2x+1"),
        ("a_{n}=2n", "a_{n}", "2n"),
        (r"c \in [0,1]", "c", "[0,1]"),
        (r"\theta=\frac{\pi}{2}", r"\theta", r"\frac{\pi}{2}"),
        ("x+y=1", "", "x+y=1"),
        ("x=y=1", "", "x=y=1"),
        ("12:00", "", "12:00"),
        ("x<5", "", "x<5"),
        (r"\infty", "", r"\infty"),
    ],
)
def test_names(answer, name, value):
    assert latex.named_value(answer) == (name, value)


def test_brackets():
    assert latex.bracketed("(1, 2]") == ("(]", ["1", "2"])
    assert latex.bracketed("((1,2), 3)") == ("()", ["(1,2)", "3"])
    for answer in ("(x+1)(x-1)", "(1,2),(3,4)", "(5)", "1,2", "(", ""):
        assert latex.bracketed(answer) is None
    assert latex.top_level_items(r"\{1,2\}, f(x,y), 3") == [r"\{1,2\}", "f(x,y)", "3"]


def test_prose():
    assert latex.is_prose("the number is 5")
    assert not latex.is_prose("x and 5")
    assert not latex.is_prose(r"5 \text{ of them there}")


@pytest.mark.parametrize(
    "piece", ["$", "(", "x ", "\\", "1,", "1 ", "_{", "\u200b", "a_", "1 a  ", ", "]
)
def test_long_answers_take_no_longer_than_their_length_asks(piece):
    start = time.process_time()
    answer = latex.tidy(piece * (2_000 // len(piece)))
    latex.named_value(answer)
    latex.bracketed(answer)
    latex.top_level_items(answer)
    assert time.process_time() - start < 1.0
