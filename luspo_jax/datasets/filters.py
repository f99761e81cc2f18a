"""Which rows of a file are taken, by an expression over their columns."""

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luspo_jax.datasets.example import DataError
from luspo_jax.datasets.rows import Row, names_in, step_in
from luspo_jax.hosts.values import nearest

_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
# Of numbers only: texts could be multiplied, or formatted, to any size.
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "len": len, "str": str, "int": int, "float": float, "abs": abs,
}  # fmt: skip
_METHODS = ("startswith", "endswith", "lower", "upper", "strip", "count")
_COLUMN = "column"  # column("a name with blanks"), or column(name, value if there is none)
_ALLOWED = (
    "comparisons, and, or, not, in, + - * / // %, columns by name (nested ones with dots, others "
    f'as {_COLUMN}("…")), {", ".join(_FUNCTIONS)}, and the methods {", ".join(_METHODS)} of texts'
)

Evaluate = Callable[[Row], Any]


class FilterError(ValueError):
    """An expression that is none of a filter's; the message says what it may hold."""


class Filter:
    """Says whether a row is taken.

    Python's syntax, read and evaluated here: nothing else of Python can be reached.

    Args:
      text: such as `difficulty >= 3 and source != "x"`; a column is named as in a configuration,
        with dots for nested ones: `reward_model.ground_truth`, `prompt[0].content`.

    Raises:
      FilterError: the expression cannot be read, or holds something else.
    """

    def __init__(self, text: str):
        self.text = text
        try:
            tree = ast.parse(text.strip(), mode="eval")
            self._evaluate = _built(tree.body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if isinstance(error, FilterError):
                raise
            said = error.msg if isinstance(error, SyntaxError) else error
            raise FilterError(f"{text!r} cannot be read ({said}); it may hold {_ALLOWED}") from None

    def keeps(self, row: Row, place: str) -> bool:
        """Returns whether a row is taken.

        Raises:
          DataError: the row lacks a column, or the expression cannot be computed from its values.
        """
        try:
            return bool(self._evaluate(row))
        except _NoColumn as missing:
            raise DataError(
                f"{place}: data.filter={self.text!r}: no column {missing.args[0]!r}; "
                f"{nearest(missing.args[0], names_in(row))}"
            ) from None
        except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise DataError(
                f"{place}: data.filter={self.text!r} cannot be computed ({error}): of texts take "
                "int(…) or float(…), and test for null before, as in `x is not None and x > 3`"
            ) from error


def made(text: str) -> Filter | None:
    """Returns the filter of `data.filter`; None for all rows.

    Raises:
      DataError: it is none.
    """
    try:
        return Filter(text) if text else None
    except FilterError as error:
        raise DataError(f"data.filter={error}") from error


class _NoColumn(Exception):
    """A row lacks a column."""


def _built(node: ast.expr) -> Evaluate:
    """Returns a function of the row for a node of the syntax tree."""
    made = _BUILDERS.get(type(node))
    if made is None:
        raise _refused(node)
    return made(node)


def _refused(node: ast.AST, what: str = "") -> FilterError:
    return FilterError(f"{what or ast.unparse(node)!r} is not for filters, which hold {_ALLOWED}")


def _constant(node: ast.Constant) -> Evaluate:
    value = node.value
    if value is not None and not isinstance(value, str | bool | int | float):
        raise _refused(node)
    return lambda row: value


def _listed(node: ast.List | ast.Tuple | ast.Set) -> Evaluate:
    parts = [_built(item) for item in node.elts]
    return lambda row: [part(row) for part in parts]


def _bool_op(node: ast.BoolOp) -> Evaluate:
    parts = [_built(value) for value in node.values]
    if isinstance(node.op, ast.And):
        return lambda row: all(part(row) for part in parts)
    return lambda row: any(part(row) for part in parts)


def _unary(node: ast.UnaryOp) -> Evaluate:
    operand = _built(node.operand)
    if isinstance(node.op, ast.Not):
        return lambda row: not operand(row)
    if isinstance(node.op, ast.USub):
        return lambda row: -_number(operand(row))
    raise _refused(node)


def _compare(node: ast.Compare) -> Evaluate:
    parts = [_built(item) for item in (node.left, *node.comparators)]
    signs = [_COMPARE[type(op)] for op in node.ops]

    def evaluate(row: Row) -> bool:
        left = parts[0](row)
        for sign, part in zip(signs, parts[1:], strict=True):
            right = part(row)
            if not sign(left, right):
                return False
            left = right
        return True

    return evaluate


def _arithmetic(node: ast.BinOp) -> Evaluate:
    sign = _ARITHMETIC.get(type(node.op))
    if sign is None:
        raise _refused(node)
    left, right = _built(node.left), _built(node.right)
    return lambda row: sign(_number(left(row)), _number(right(row)))


def _number(value: Any) -> int | float:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return value


def _column_of(node: ast.expr) -> Evaluate:
    name = _dotted(node)
    if name is None:
        raise _refused(node)
    return _column(name)


def _dotted(node: ast.AST) -> str | None:
    """Returns the dotted name that names, attributes and subscripts spell; None if they do not."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head, last = _dotted(node.value), node.attr
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        head, last = _dotted(node.value), node.slice.value
    else:
        return None
    return None if head is None or isinstance(last, float) else f"{head}.{last}"


def _column(name: str, otherwise: Sequence[Any] = ()) -> Evaluate:
    def evaluate(row: Row) -> Any:
        found, value = step_in(row, name)
        if found:
            return value
        if otherwise:
            return otherwise[0]
        raise _NoColumn(name)

    return evaluate


def _call(node: ast.Call) -> Evaluate:
    if node.keywords or any(isinstance(item, ast.Starred) for item in node.args):
        raise _refused(node)
    if isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
        method = node.func.attr
        text, given = _built(node.func.value), [_built(item) for item in node.args]
        return lambda row: getattr(_text(text(row)), method)(*(part(row) for part in given))
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name == _COLUMN and all(isinstance(item, ast.Constant) for item in node.args):
        first, *otherwise = [item.value for item in node.args] or [None]
        if isinstance(first, str) and len(otherwise) <= 1:
            return _column(first, otherwise)
    if name in _FUNCTIONS and len(node.args) == 1:
        function, argument = _FUNCTIONS[name], _built(node.args[0])
        return lambda row: function(argument(row))
    raise _refused(node)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


_BUILDERS: Mapping[type, Callable[[Any], Evaluate]] = {
    ast.Constant: _constant,
    ast.List: _listed,
    ast.Tuple: _listed,
    ast.Set: _listed,
    ast.BoolOp: _bool_op,
    ast.UnaryOp: _unary,
    ast.Compare: _compare,
    ast.BinOp: _arithmetic,
    ast.Name: _column_of,
    ast.Attribute: _column_of,
    ast.Subscript: _column_of,
    ast.Call: _call,
}
