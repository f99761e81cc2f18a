"""Reads the optimised, scheduled HLO of a compiled program: what instructions move and compute.

Bytes are those between a device and its memory. A fusion reads of an operand only the slices that
it takes, and of a result it writes only the slice that it replaces; what lies in a TPU's on-chip
memory (`S(1)` in a layout) is neither read nor written. Operations are those of products, 2 per
multiply-add, wherever a product hides: a dot, a convolution (what the TPU compiler makes of dots),
a library's call, or any of these in a fusion. Kernels (Pallas) say nothing of their operations.

Collectives that run beside other work are pairs of a start and a done; on TPUs these are fusions,
and those between them (`async_collective_fusion`) compute while they pass the collective on.

    M, N, K of a product of l and r into o, each in elements, repeated B times:
    K = operations / 2o,   B = l·r / (o·K²),   N = r / (B·K),   M = l / (B·K)
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

from experiments.rehearsal import crossing

_SHAPE = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_STILL = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "broadcast"))
_FREE = (_STILL - {"broadcast"}) | {
    "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency", "domain", "while",
    "conditional", "call",
}  # fmt: skip
_ON_CHIP = 1  # memory space of a TPU's vector memory
_HOST = 5
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
               "collective-permute", "collective-broadcast")  # fmt: skip
_MOVING = _STILL | {
    "copy", "transpose", "reshape", "slice", "dynamic-slice", "pad", "concatenate",
    "dynamic-update-slice", "reverse", "fusion",
}  # fmt: skip
_KERNELS = ("tpu_custom_call", "triton", "mosaic", "pallas", "cudnn$fmha", "cudnn_flash")
_LIBRARY = ("gemm", "matmul")
_ASYNC = "AsyncCollective"
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # the operand with the new values


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array: `layout` has its axes, the fastest first; `space` is 0 in memory."""

    dtype: str
    sizes: tuple[int, ...]
    layout: str
    space: int = 0

    @property
    def elements(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """Returns its size."""
        return crossing.width(self.dtype) * self.elements

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction: `attributes` is the text after its operands."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool = False

    @property
    def target(self) -> str:
        """Returns what a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def operation(self) -> str:
        """Returns the operation that it was made for, as jax names it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, how: str = "calls") -> str:
        """Returns the computation that it names as `how`; "" if none."""
        found = re.search(rf"\b{how}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of matrices [M, K] and [K, N], `count` times, of the wider of their types."""

    rows: float
    columns: float
    depth: float
    count: float
    dtype: str
    precision: str

    @property
    def flops(self) -> float:
        """Returns operations, 2 per multiply-add."""
        return 2 * self.rows * self.columns * self.depth * self.count


class Module:
    """A program: its computations by name, "" the entry's, each by name of instruction in order."""

    def __init__(self, text: str):
        self._frames, self._lines = _frames(text), crossing.computations(text)
        self.computations: dict[str, dict[str, Instruction]] = {
            name: {one.name: one for one in _instructions(lines)}
            for name, lines in self._lines.items()
        }

    def root(self, computation: str) -> Instruction:
        """Returns the instruction whose value is that of the computation."""
        found = self.computations[computation].values()
        return next((one for one in found if one.root), list(found)[-1])

    def turns(self, loop: Instruction) -> int | None:
        """Returns the turns of a loop; None if the program's data decide them."""
        return crossing.trip_count(loop.attributes, self._lines)

    def branches(self, one: Instruction) -> list[str]:
        """Lists the computations of which a conditional takes one."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
        names = listed[1].split(",") if listed else [
            one.called("true_computation"), one.called("false_computation")
        ]  # fmt: skip
        return [name.strip().lstrip("%") for name in names]

    def source(self, one: Instruction) -> str:
        """Returns file:line of ours that it was made for; of a fusion's parts where it has none."""
        found = self._place(one)
        if not found and one.opcode == "fusion":
            inner = self.computations.get(one.called(), {}).values()
            found = next((place for place in map(self._place, inner) if place), "")
        return found

    def _place(self, one):
        frame = re.search(r"stack_frame_id=(\d+)", one.attributes)
        if frame:
            return self._frames.get(int(frame[1]), "")
        file = re.search(r'source_file="([^"]*)" source_line=(\d+)', one.attributes)
        return f"{_short(file[1])}:{file[2]}" if file and _ours(file[1]) else ""

    def operands(self, computation: str, one: Instruction) -> list[Instruction]:
        """Returns the instructions whose values an instruction takes."""
        known = self.computations[computation]
        return [known[name] for name in one.operands if name in known]

    # ------------------------------------------------------------ bytes

    def bytes(self, computation: str, one: Instruction) -> float:
        """Returns the bytes that an instruction reads from memory and writes to it."""
        if is_free(one):
            return 0.0
        given = self.operands(computation, one)
        if one.opcode == "fusion":
            inner = self.computations[one.called()]
            read = sum(
                self._read(one.called(), parameter.name)
                for parameter, operand in zip(_parameters(inner), given, strict=False)
                if _in_memory(operand)
            )
            return read + self._written(one.called(), self.root(one.called()), one.arrays)
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _size(one.arrays)
        if one.opcode in _IN_PLACE:
            return 2 * _size(given[_IN_PLACE[one.opcode]].arrays)
        if one.opcode in ("copy-start", "async-start"):
            return self._copied(one)
        return _size(one.arrays) + sum(_size(x.arrays) for x in given)

    def _copied(self, one):
        """Bytes in memory of the two ends of a copy that runs beside other work."""
        ends = one.arrays[:2]
        return sum(x.bytes for x in ends if x.space not in (_ON_CHIP, _HOST))

    def _read(self, computation, name):
        """Returns the bytes of a value that the instructions of a fusion read."""
        total, whole = 0.0, self.computations[computation][name].arrays
        for use in self._users(computation).get(name, ()):
            at = use.operands.index(name)
            if use.opcode in ("bitcast", "reshape", "tuple"):
                total += self._read(computation, use.name)
            elif use.opcode in ("dynamic-slice", "slice", "gather") and at == 0:
                total += sum(x.bytes for x in use.arrays)
            elif use.opcode == "fusion":
                inner = _parameters(self.computations[use.called()])
                total += self._read(use.called(), inner[at].name)
            elif use.opcode in COLLECTIVES or use.target.startswith(_ASYNC):
                continue  # counted where it begins
            elif use.opcode not in _IN_PLACE or at != 0:
                return sum(x.bytes for x in whole)
        return min(total, sum(x.bytes for x in whole))

    def _written(self, computation, root, arrays):
        """Returns the bytes that a fusion writes: of what it updates in place, the update."""
        known = self.computations[computation]
        if root.opcode == "tuple":
            parts = [known[name] for name in root.operands]
            return sum(
                self._written(computation, part, (array,))
                for part, array in zip(parts, arrays, strict=True)
            )
        while root.opcode in ("bitcast", "copy", "convert") and root.operands[0] in known:
            inner = known[root.operands[0]]
            if inner.opcode not in ("bitcast", "copy", "convert", *_IN_PLACE):
                break
            root = inner
        if root.opcode in _IN_PLACE:
            update = known[root.operands[_IN_PLACE[root.opcode]]]
            return sum(x.bytes for x in update.arrays) * bool(_size(arrays))
        if root.opcode == "parameter" or root.target.startswith(_ASYNC):
            return 0.0  # passed on
        if root.opcode == "fusion":
            return self._written(root.called(), self.root(root.called()), arrays)
        return _size(arrays)

    @functools.cache  # noqa: B019 - a module lives as long as its report
    def _users(self, computation) -> Mapping[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {}
        for one in self.computations[computation].values():
            for name in dict.fromkeys(one.operands):
                found.setdefault(name, []).append(one)
        return found

    # ------------------------------------------------------------ operations

    def products(self, computation: str, one: Instruction) -> Iterator[Product]:
        """Yields the products that an instruction computes, those of a fusion's parts as well."""
        if one.opcode == "fusion":
            for inner in self.computations[one.called()].values():
                yield from self.products(one.called(), inner)
        elif one.opcode in ("dot", "convolution"):
            left, right = (x.arrays[0] for x in self.operands(computation, one)[:2])
            yield _product(one, left, right, _depth(one, left, right))
        elif one.opcode == "custom-call" and any(x in one.target for x in _LIBRARY):
            left, right = (x.arrays[0] for x in self.operands(computation, one)[:2])
            yield _product(one, left, right, _library_depth(one, left, right))

    def is_move(self, one: Instruction) -> bool:
        """Whether an instruction only moves values: a copy, a transposition, a fusion of such."""
        if one.opcode == "fusion":
            inner = self.computations[one.called()].values()
            return all(x.opcode in _MOVING and (x.opcode != "fusion" or self.is_move(x))
                       for x in inner) and any(x.opcode not in _STILL for x in inner)  # fmt: skip
        return one.opcode in _MOVING and one.opcode not in _STILL and one.opcode != "fusion"

    def moves(self, computation: str, one: Instruction) -> str:
        """Describes a move: "transpose", "copy", "layout" (a copy to another one), "pad", …"""
        if one.opcode == "fusion":
            found = [x.opcode for x in self._deep(one.called())]
            return next((kind for kind in _KINDS if kind in found), "copy")
        if one.opcode == "copy":
            given = self.operands(computation, one)
            other = given and given[0].arrays[0].layout != one.arrays[0].layout
            return "layout" if other else "copy"
        return one.opcode

    def _deep(self, computation):
        for one in self.computations[computation].values():
            if one.opcode == "fusion":
                yield from self._deep(one.called())
            yield one


_KINDS = ("transpose", "dynamic-update-slice", "dynamic-slice", "concatenate", "pad", "slice")


def is_free(one: Instruction) -> bool:
    """Whether an instruction takes no time of its own."""
    return (
        one.opcode in _FREE
        or one.opcode.endswith(("-done", "-update"))
        or one.target in ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding")
    )


def is_kernel(one: Instruction) -> bool:
    """Whether an instruction calls a kernel, of whose operations HLO says nothing."""
    return one.opcode == "custom-call" and any(x in one.target for x in _KERNELS)


def collective(module: Module, one: Instruction) -> str:
    """Returns the kind of a collective that an instruction is or begins; "" if it is none."""
    kind = one.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        return kind
    if kind == "async" or one.opcode == "fusion":
        inner = module.computations.get(one.called(), {}).values()
        found = next((x.opcode for x in inner if x.opcode in COLLECTIVES), "")
        passed_on = one.called().startswith("async_collective_fusion")
        return "" if passed_on and not _asynchronous(module, one) else found
    return ""


def begins(module: Module, one: Instruction) -> bool:
    """Whether an instruction begins what another one ends."""
    return one.opcode.endswith("-start") or _asynchronous(module, one) == f"{_ASYNC}Start"


def ends(module: Module, one: Instruction) -> bool:
    """Whether an instruction ends what another one began."""
    return one.opcode.endswith("-done") or _asynchronous(module, one) == f"{_ASYNC}Done"


def _asynchronous(module, one):
    if one.opcode != "fusion":
        return ""
    inner = module.computations.get(one.called(), {}).values()
    return next((x.target for x in inner if x.target.startswith(_ASYNC)), "")


def received(module: Module, one: Instruction, devices: int) -> float:
    """Returns the bytes that a device receives in a collective of n devices.

    all-reduce 2·(n − 1)/n of its result, all-gather and all-to-all (n − 1)/n, reduce-scatter
    (n − 1) times its result, a permutation its result.
    """
    kind, inner = collective(module, one), one
    if one.opcode == "fusion" or one.opcode == "async-start":
        inside = module.computations[one.called()].values()
        inner = next(x for x in inside if x.opcode == kind)
    arrays = inner.arrays
    if inner.opcode in ("all-gather-start", "collective-permute-start", "reduce-scatter-start"):
        arrays = [x for x in arrays if x.sizes]
        arrays = arrays[len(arrays) // 2 :]  # the results come after the operands
    size = sum(x.bytes for x in arrays)
    if kind == "collective-permute":
        return size
    count = max(map(len, crossing.groups(inner.attributes, devices)))
    share = {"all-reduce": 2 * (count - 1) / count, "reduce-scatter": count - 1}
    return size * share.get(kind, (count - 1) / count)


# ---------------------------------------------------------------- products


def _product(one, left, right, depth):
    out = one.arrays[0].elements
    if not (depth and out):
        return Product(0, 0, 0, 0, left.dtype, "")
    count = left.elements * right.elements / (out * depth**2)
    precision = re.search(r"operand_precision=\{(\w+)", one.attributes)
    return Product(
        left.elements / (count * depth), right.elements / (count * depth), depth, count,
        max(left.dtype, right.dtype, key=crossing.width), precision[1] if precision else "",
    )  # fmt: skip


def _depth(one, left, right):
    """Returns multiply-adds of each element of the result."""
    if one.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)[1]
        return math.prod(left.sizes[int(axis)] for axis in axes.split(",") if axis)
    of_left, of_right, of_out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes).groups()
    depth = right.sizes[of_right.index("i")]
    window = {
        key: value.split("x")
        for key, value in re.findall(r"(\w+)=([\w\-]+)", _window(one.attributes))
    }
    for axis in sorted(label for label in of_out if label.isdigit()):
        sizes = (left.sizes[of_left.index(axis)], right.sizes[of_right.index(axis)],
                 one.arrays[0].sizes[of_out.index(axis)])  # fmt: skip
        depth *= _inside(*sizes, {key: value[int(axis)] for key, value in window.items()})
    return depth


def _window(attributes):
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return found[1] if found else ""


def _inside(length, taps, out, window):
    """Returns how many taps of a window lie on values, on average over a result's positions."""
    stride, spread = int(window.get("stride", 1)), int(window.get("rhs_dilate", 1))
    gaps, before = int(window.get("lhs_dilate", 1)), int(window.get("pad", "0_0").split("_")[0])
    found = 0
    for place in range(out):
        for tap in range(taps):
            at = place * stride - before + tap * spread
            found += at % gaps == 0 and 0 <= at // gaps < length
    return found / out


def _library_depth(one, left, right):
    axes = re.search(r'lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
    if axes:
        return math.prod(left.sizes[int(axis)] for axis in re.findall(r"\d+", axes[1]))
    return math.sqrt(left.elements * right.elements / max(1, one.arrays[0].elements))


# ---------------------------------------------------------------- text


def _instructions(lines):
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        types, rest = _cut(match[3])
        opcode, _, rest = rest.strip().partition("(")
        inside, attributes = _cut("(" + rest)
        if not re.fullmatch(r"[\w\-]+", opcode):
            continue
        named = {"constant": (), "parameter": (inside[1:-1],)}
        operands = named.get(opcode, tuple(_OPERAND.findall(inside)))
        arrays = tuple(_arrays(types))
        yield Instruction(match[2], opcode, arrays, operands, attributes, bool(match[1]))


def _cut(text):
    """Splits text behind a group in parentheses, or behind its first word."""
    if not text.startswith("("):
        word, _, rest = text.partition(" ")
        return word, rest
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    return text, ""


def _arrays(text):
    for dtype, sizes, layout, places in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", places)
        numbers = tuple(int(n) for n in sizes.split(",") if n)
        yield Array(dtype, numbers, layout, int(space[1]) if space else 0)


def _parameters(computation):
    found = [one for one in computation.values() if one.opcode == "parameter"]
    return sorted(found, key=lambda one: int(one.operands[0]))


def _in_memory(one):
    return any(x.space not in (_ON_CHIP, _HOST) for x in one.arrays)


def _size(arrays):
    return sum(x.bytes for x in arrays if x.space not in (_ON_CHIP, _HOST))


def _frames(text):
    """Returns "file:line" of ours by id of a stack's innermost frame; "" where none is ours."""
    names = dict(re.findall(r'^(\d+) "([^"]*)"$', _part(text, "FileNames"), re.M))
    places = {
        key: (names.get(file, ""), line)
        for key, file, line in re.findall(
            r"^(\d+) \{file_name_id=(\d+).*? line=(\d+)", _part(text, "FileLocations"), re.M
        )
    }
    stack = re.findall(
        r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", _part(text, "StackFrames"),
        re.M,
    )  # fmt: skip
    # The first frame has no parent: where it names itself, ids of parents are one too large.
    more = int(bool(stack) and stack[0][0] == stack[0][2])
    parents = {
        key: (places.get(at, ("", "")), str(int(parent or more) - more))
        for key, at, parent in stack
    }
    found = {}
    for key in parents:
        at, seen = key, set()
        while at in parents and at not in seen:
            seen.add(at)
            (file, line), at = parents[at]
            if _ours(file):
                found[int(key)] = f"{_short(file)}:{line}"
                break
    return found


def _part(text, name):
    start = text.find(f"\n{name}\n")
    return text[start + 1 : text.find("\n\n", start + 1)] if start >= 0 else ""


def _ours(file):
    return "luspo_jax/" in file and "site-packages" not in file.rpartition("luspo_jax/")[0]


def _short(file):
    return "luspo_jax/" + file.rpartition("luspo_jax/")[2]
