"""Filters: against Python itself on random rows; nothing of Python beyond them can be reached."""

import numpy as np
import pytest

from luspo_jax.datasets.example import DataError
from luspo_jax.datasets.filters import Filter, FilterError

EXPRESSIONS = [
    "difficulty >= 3",
    "difficulty >= 3 and source != 'x'",
    "2 < difficulty <= 4 or not source == 'x'",
    "source in ('x', 'y')",
    "source not in ['x'] and 'z' not in problem",
    "len(problem) > 3",
    "len(problem) * 2 - difficulty % 3 >= 14 // 2 + 1.5 / 3",
    "-difficulty < -2",
    "problem.lower().startswith('p') and problem.endswith('3')",
    "problem.count('p') == 1 and problem.strip().upper() == problem.upper()",
    "abs(difficulty - 3) <= 1",
    "str(difficulty) == '3' or int(number) == 4 or float(number) > 6.5",
    "extra is None or extra > 2",
    "extra is not None and extra > 2",
    "True",
]


def _rows(count=60):
    rng = np.random.default_rng(0)
    for n in range(count):
        yield {
            "problem": f"P {n}" if n % 3 else f"p {n} z",
            "difficulty": int(rng.integers(0, 6)),
            "source": str(rng.choice(list("xyz"))),
            "number": str(rng.integers(0, 9)),
            "extra": None if n % 4 else float(n % 5),
        }


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_filter_is_pythons_expression(text):
    rows = list(_rows())
    expected = [bool(eval(text, {}, dict(row))) for row in rows]
    assert [Filter(text).keeps(row, "x, row 1") for row in rows] == expected
    assert text == "True" or 0 < sum(expected) < len(rows)


def test_columns_may_be_nested_and_have_any_name():
    row = {
        "reward_model": {"ground_truth": "42", "style": "rule"},
        "prompt": [{"role": "user", "content": "hello"}],
        "data source": "dapo", "len": 7, "a.b": 3,
    }  # fmt: skip
    for text in (
        "reward_model.ground_truth == '42'",
        "reward_model['style'].startswith('ru')",
        "len(prompt[0].content) == 5",
        "column('data source') == 'dapo'",
        "column('prompt.0.role') == 'user'",
        "len == 7",
        "column('level', 5) == 5 and column('len', 5) == 7",
        "column('a.b') == 3",
    ):
        assert Filter(text).keeps(row, ""), text


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__.__mro__[1].__subclasses__()",
        "problem.__class__()",
        "problem.format(problem)",
        "open('x')",
        "lambda: 1",
        "[x for x in problem]",
        "difficulty := 3",
        "2 ** 1000000",
        "1 << 100000",
        "f'{problem}'",
        "len(problem, 2)",
        "len(*problem)",
        "column(problem)",
        "column('a', 1, 2)",
        "(problem if 1 else source)",
        "problem[difficulty]",
        "problem[1:2]",
        "b'x' == problem",
        "1 if",
        "difficulty >",
        "a; b",
        "",
        "(" * 500 + "1" + ")" * 500,
        "\x00",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(FilterError, match=r"it may hold comparisons|is not for filters"):
        Filter(text)


@pytest.mark.parametrize("text", ["problem * 1000000000", "'%9d' % difficulty", "problem + 'x'"])
def test_texts_are_not_computed_with(text):
    with pytest.raises(DataError, match="is no number"):
        Filter(text).keeps({"problem": "p", "difficulty": 1}, "f.jsonl, row 1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dificulty > 3", r"no column 'dificulty'; did you mean 'difficulty'\?"),
        ("number > 3", r"'>' not supported.*int\(…\)"),
        ("extra > 3", r"NoneType.*test for null before"),
        ("int(problem) > 3", "invalid literal"),
        ("1 / difficulty > 3", "division by zero"),
        ("extra.lower() == 'x'", "None is no text"),
    ],
)
def test_what_a_row_does_not_allow_is_named_by_row_and_column(text, message):
    row = {"problem": "p", "difficulty": 0, "number": "4", "extra": None}
    with pytest.raises(DataError, match=rf"f\.jsonl, row 7: data\.filter=.*{message}"):
        Filter(text).keeps(row, "f.jsonl, row 7")
