"""What a compiled program sends between TPU slices, read from its HLO.

Slices are joined by the data-centre network only, so every byte counts. Two forms are read. A
collective whose group has devices of several slices (`all-reduce`, `all-gather`, `reduce-scatter`,
`all-to-all`, `collective-permute`); its ids index the program's devices. And what the TPU compiler
makes of it, as the program of a slice has that slice's devices alone: a `send` and a `recv` through
the runtime between slices (`xla_megascale_runtime`), with collectives within the slice around them.

Bytes are those that a device receives from other slices, of S slices with k devices each in a
group, where sums are first made within a slice:

    all-reduce       2 · (S − 1)/S · result / k
    reduce-scatter   (S − 1) · result
    all-gather       (S − 1)/S · result, as all-to-all
    permute          result
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from luspo_jax import sharding

_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
           "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}  # fmt: skip
_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_MEGASCALE = "xla_megascale_runtime"
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_NAMES = "|".join(map(re.escape, _KINDS))
_COLLECTIVE = re.compile(rf"= (.*?) ({_NAMES}|ragged-all-to-all)(-start)?\(")
_TRANSFER = re.compile(r"= (.*?) (send|recv)\(")
_MOVES = re.compile(rf"= [^=\n]*? (?:{_NAMES}|send|recv)(?:-start)?\(")
_CALLED = re.compile(
    r"(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective between slices.

    Attributes:
      kind: its opcode.
      shapes: of its result.
      bytes: that a device receives from other slices, each time.
      times: it runs in a call of the program; loops without a known number of turns count once.
      looped: whether it runs in a loop.
      source: the operation that it was made for, as jax names it.
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: float
    times: int
    looped: bool
    source: str

    @property
    def total(self) -> float:
        """Returns the bytes that a device receives from other slices in a call."""
        return self.bytes * self.times


def slices_of(compiled: Any) -> list[int]:
    """Returns the slice of each device of a compiled program, in the program's order."""
    for one in jax.tree.leaves(compiled.output_shardings):
        mesh = getattr(one, "mesh", None)
        if mesh is not None and mesh.devices.size > 1:
            return [sharding.slice_of(device) for device in mesh.devices.flat]
    return [0]


def transfers(text: str, slices: Sequence[int]) -> list[Transfer]:
    """Lists what crosses slices in the HLO of a program whose devices are in these slices.

    Raises:
      ValueError: the text is not understood: a transfer lies outside all that the program calls.
    """
    if len(set(slices)) < 2:
        return []
    count, partitions = len(set(slices)), re.search(r"num_partitions=(\d+)", text)
    if partitions and int(partitions[1]) < len(slices):
        slices = [0] * int(partitions[1])  # a slice's own program: collectives stay within it
    parts = computations(text)
    turns = _turns(parts)
    found = []
    for name, (times, looped) in turns.items():
        for line in parts[name]:
            one = _collective(line, slices) or _megascale(line, count)
            if one is not None:
                found.append(Transfer(*one, times, looped, _source(line)))
    seen = sum(bool(_MOVES.search(line)) for name in turns for line in parts[name])
    if seen != len(_MOVES.findall(text)):
        raise ValueError("the program's text has collectives in computations that nothing calls")
    return sorted(found, key=lambda one: -one.total)


def _collective(line, slices):
    """Returns (kind, shapes, bytes) of a collective that crosses slices; None if none does."""
    match = _COLLECTIVE.search(line)
    if match is None:
        return None
    shapes = _SHAPE.findall(match[1])
    kind, started = match[2], match[3]
    if started and kind in ("all-gather", "collective-permute"):
        shapes = [one for one in shapes if one != ("u32", "")]
        shapes = shapes[len(shapes) // 2 :]  # after the operands
    share = 0.0
    if kind == "collective-permute":
        listed = re.search(r"source_target_pairs=\{([{}\d, ]*)\}", line)[1]
        pairs = [_numbers(pair) for pair in re.findall(r"\{([\d, ]+)\}", listed)]
        share = float(any(slices[a] != slices[b] for a, b in pairs))
    else:
        share = max(_share(kind, [slices[i] for i in group]) for group in groups(line, len(slices)))
    size = share * sum(map(_bytes, shapes))
    return (kind, tuple(f"{a}[{b}]" for a, b in shapes), size) if size else None


def _share(kind, of_slices):
    """Returns bytes that a device receives from other slices over those of the result."""
    count = len(set(of_slices))
    if count == 1:
        return 0.0
    within = len(of_slices) / count
    if kind == "all-reduce":
        return 2 * (count - 1) / count / within
    return count - 1.0 if kind == "reduce-scatter" else (count - 1) / count


def groups(line: str, devices: int) -> list[list[int]]:
    """Returns the groups of a collective, as [[0, 1], [2, 3]], from any way that HLO writes them:

    {{0,1},{2,3}}, [2,2]<=[4], [2,2]<=[2,2]T(1,0), mesh['a'=2,'b'=2] {'b'}; {} is one of all.

    Raises:
      ValueError: they are written in another way.
    """
    match = re.search(r"replica_groups=(.*)", line)
    if match is None or match[1].startswith("{}"):
        return [list(range(devices))]
    text = match[1]
    if listed := re.match(r"\{(\{[\d, ]+\}[, ]*)+\}", text):
        return [_numbers(one) for one in re.findall(r"\{([\d, ]+)\}", listed[0])]
    if iota := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _ids(iota[2]).reshape(_numbers(iota[1])).tolist()
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}", text):
        return _mesh_groups(*mesh.groups())
    raise ValueError(f"groups of a collective that are not known here: {text[:120]}")


def _numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def _ids(text):
    """Returns the ids that [2,4]T(1,0) or 0,2,1 lists, flat."""
    iota = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota is None:
        return np.array(_numbers(text))
    sizes = _numbers(iota[1])
    order = _numbers(iota[2]) if iota[2] else range(len(sizes))
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(-1)


def _mesh_groups(mesh, ids, axes):
    """Groups along some axes of a mesh; 'a':(2)4 is the part of 'a' of size 4 after one of 2."""
    parts = []  # (name, size before it within its axis, size)
    taken = [
        (name, int(before or 1), int(size) if size else 0)
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    ]
    for name, size in re.findall(r"'([^']+)'=(\d+)", mesh):
        size = int(size)
        cuts = {1, size}
        for other, before, part in taken:
            if other == name:
                cuts |= {before, before * (part or size)}
        cuts = sorted(cuts)
        parts += [(name, a, b // a) for a, b in zip(cuts, cuts[1:] or cuts, strict=False)]
    within = [
        i
        for name, before, size in taken
        for i, (other, start, part) in enumerate(parts)
        if other == name and before <= start and (not size or start * part <= before * size)
    ]
    grid = [size for _, _, size in parts]
    flat = _ids(ids) if ids else np.arange(math.prod(grid))
    order = [i for i in range(len(grid)) if i not in within] + within
    width = math.prod(grid[i] for i in within)
    return flat.reshape(grid).transpose(order).reshape(-1, width).tolist()


def _megascale(line, count):
    """Returns (kind, shapes, bytes) of what a slice's program gets from the other slices."""
    match = _TRANSFER.search(line) if _MEGASCALE in line else None
    if match is None:
        return None
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
    kind = kind[1].lower().replace("_", "-") if kind else "transfer"
    # Of a reduce-scatter the whole goes in and a part comes back.
    if (match[2] == "send") != (kind == "reduce-scatter"):
        return None
    shapes = [one for one in _SHAPE.findall(match[1]) if one[0] != "token"][:-1]  # less a context
    others = (count - 1) / count
    share = {"all-reduce": 2 * others, "all-gather": others, "reduce-scatter": others,
             "all-to-all": others}.get(kind, 1.0)  # fmt: skip
    size = share * sum(map(_bytes, shapes))
    return kind, tuple(f"{a}[{b}]" for a, b in shapes), size


def _bytes(shape):
    dtype, sizes = shape
    return width(dtype) * math.prod(int(n) for n in sizes.split(",") if n)


def width(dtype: str) -> int:
    """Returns the bytes of an element; 0 of what is no array."""
    return _WIDTHS.get(dtype, 1 if dtype.startswith("f8") else 0)


def _source(line):
    match = re.search(r'op_name="([^"]*)"', line)
    return match[1] if match else ""


def computations(text: str) -> dict[str, list[str]]:
    """Returns the lines of each computation by name; the first key is the entry's, under ""."""
    found: dict[str, list[str]] = {"": []}
    lines = None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            lines = found[""] if head[1] else found.setdefault(head[2], [])
        elif line.rstrip() == "}":  # attributes of a kernel are lines that begin with }} or "
            lines = None
        elif lines is not None:
            lines.append(line)
    return found


def _turns(computations):
    """Returns (times that it runs in a call, whether in a loop) of each computation."""
    found: dict[str, tuple[int, bool]] = {}

    def visit(name, times, looped):
        before, in_loop = found.get(name, (0, False))
        found[name] = before + times, in_loop or looped
        for line in computations.get(name, ()):
            called = [(how, one) for how, one in _CALLED.findall(line) if one in computations]
            called += [
                ("branch", one.strip().lstrip("%"))
                for branches in _BRANCHES.findall(line)
                for one in branches.split(",")
                if one.strip()
            ]
            for how, one in called:
                in_loop = how in ("body", "condition")
                turns = (trip_count(line, computations) or 1) if in_loop else 1
                visit(one, times * turns, looped or in_loop)

    visit("", 1, False)
    return found


def trip_count(line: str, computations: Mapping[str, Sequence[str]]) -> int | None:
    """Returns the turns of a loop: as the compiler notes them, or the limit of its condition; None
    if neither tells."""
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], ()) if condition else ()
    limits = [
        m[1] for m in (re.search(r"= s32\[\]\S* constant\((\d+)\)", one) for one in lines) if m
    ]
    return int(limits[0]) if len(limits) == 1 else None
