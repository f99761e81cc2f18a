"""Lists, sets, tuples and matrices: what is read, and which order counts."""

import pytest

from luspo_jax.rewards.answers.answer_lists import Parts, parts_agree, read_parts


@pytest.mark.parametrize(
    ("answer", "kind", "items"),
    [
        ("1, 2", "list", ("1", "2")),
        ("1 and 2", "list", ("1", "2")),
        (r"1, 2, \text{ and } 3", "list", ("1", "2", "3")),
        ("x = 1, 2", "list", ("1", "2")),
        ("1;2", "list", ("1", "2")),
        ("p=5,q=2;p=7,q=2", "list", ("p=5,q=2", "p=7,q=2")),
        (r"2\pm x", "list", ("2+ x", "2- x")),
        ("{1,2}", "list", ("1", "2")),
        ("1 2 3", "list", ("1", "2", "3")),
        (r"\{1,2\}", "set", ("1", "2")),
        (r"\{5\}", "set", ("5",)),
        ("(1, 2]", "tuple", ("1", "2")),
        (r"\langle 1,2\rangle", "tuple", ("1", "2")),
        ("A(1,2)", "tuple", ("1", "2")),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "vector", ("1", "2")),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "matrix", ("[1,2]", "[3,4]")),
        (r"[\begin{array}{cc}1&2\\3&4\end{array}]", "matrix", ("[1,2]", "[3,4]")),
        ("[[1,2],[3,4]]", "matrix", ("[1,2]", "[3,4]")),
    ],
)
def test_reading(answer, kind, items):
    parts = read_parts(answer)
    assert (parts.kind, parts.items) == (kind, items)


@pytest.mark.parametrize("answer", ["5", "(5)", "(x+1)(x-1)", "f(x,y)", "two lines, each long", ""])
def test_a_single_answer_has_no_parts(answer):
    assert read_parts(answer) is None


@pytest.mark.parametrize(
    ("gold", "prediction", "verdict"),
    [
        (Parts("list", ("1", "2")), Parts("list", ("2", "1")), True),
        (Parts("list", ("1", "2")), Parts("set", ("2", "1")), True),
        (Parts("list", ("1", "2")), Parts("tuple", ("2", "1"), "()"), False),
        (Parts("set", ("1", "2")), Parts("tuple", ("1", "2"), "()"), False),
        (Parts("tuple", ("1", "2"), "(]"), Parts("tuple", ("1", "2"), "()"), False),
        (Parts("tuple", ("1", "2"), "()"), Parts("vector", ("1", "2")), True),
        (Parts("list", ("1", "1", "2")), Parts("list", ("1", "2", "2")), False),
        (Parts("list", ("1", "2")), Parts("list", ("1", "2", "2")), True),
        (Parts("list", ("1", "2")), Parts("list", ("1", "2", "3")), False),
        (Parts("list", ("a=1", "b=2")), Parts("list", ("2", "1")), False),
    ],
)
def test_pairing(gold, prediction, verdict):
    def same(a, b):
        return a.rpartition("=")[2] == b.rpartition("=")[2]

    assert parts_agree(gold, prediction, same) == verdict
