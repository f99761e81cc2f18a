"""Expected time of a compiled program: the sum over its scheduled instructions.

    seconds = max(operations / (peak · share of its unit's tiles), bytes / bandwidth)

for a product or a kernel; bytes / bandwidth for what has no products; bytes / link rate for a
collective, less what runs between its start and its end. A loop counts its turns, a conditional the
longest branch, times the share of calls that take it. On-chip copies of a TPU's compiler run beside
other work and take their part of the bandwidth.

Left out: launching of kernels, element-wise operations (exponentials above all), the last wave of
a GPU's blocks, links that a collective over some axes of a torus cannot use, and waiting for other
devices.
"""

import dataclasses
import math
from typing import Any

from experiments.rehearsal import hlo
from experiments.rehearsal.topologies import Topology

# Shares of a vendor's rates that the best of programs reach: 794.5 of an H100's 989 TFLOP/s in
# bfloat16, the most over shapes of a product (stas00/ml-engineering, "Maximum Achievable Matmul
# FLOPS"; A100 0.86); of the bandwidth 0.9, by large copies. No such number is known to us for a
# TPU: the same are taken, and for links that of memory. Rates of a CPU are measured: all of them.
REACHED = {"products": 0.8, "memory": 0.9, "links": 0.9}
# Share of the peak in a kernel, of whose inside HLO says nothing: FlashAttention-2 on an H100
# (arXiv:2407.08608, abstract), of which ours for GPUs is one.
KERNELS = 0.35
_LARGE = 2**20  # bytes of a move that is listed
_MOST = 12  # kinds of moves and of collectives that are listed


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What a device does per second.

    Attributes:
      flops: bfloat16 operations of products.
      kernels: operations of kernels.
      memory: bytes to and from memory.
      links: bytes from other devices.
      unit: rows, columns and depth of the block that products are padded to.
      slower: by type of a product, how often it costs what one of bfloat16 does.
      devices: of the program.
    """

    flops: float
    kernels: float
    memory: float
    links: float
    unit: tuple[int, int, int] = (1, 1, 1)
    slower: tuple[tuple[str, float], ...] = ()
    devices: int = 1

    def product(self, one: hlo.Product) -> float:
        """Returns the seconds of a product; rows and columns may change places."""
        sides = [(one.rows, one.columns), (one.columns, one.rows)]
        waste = min(
            math.prod(_padded(size, tile) for size, tile in zip((*side, one.depth), self.unit,
                                                                 strict=True))
            for side in sides
        )  # fmt: skip
        dtype = f"{one.dtype} {one.precision}".strip()
        factor = dict(self.slower).get(dtype, dict(self.slower).get(one.dtype, 1.0))
        return one.flops * waste * factor / self.flops


def _padded(size, tile):
    """Returns the size over whole tiles, over the size."""
    return math.ceil(size / tile) * tile / size if size else 1.0


# float32 operands: a TPU multiplies them once as bfloat16, unless a precision asks for three or six
# passes; a GPU in TensorFloat-32, at half the rate (NVIDIA data sheets).
_SLOWER = {
    "tpu": (("f32 high", 3.0), ("f32 highest", 6.0)),
    "cuda": (("f32", 2.0), ("s8", 0.5)),
    "cpu": (),
}


def speeds(topology: Topology) -> Speeds:
    """Returns the rates of a device, as far as programs reach them; measured ones are reached."""
    chip = topology.chip
    measured = chip.platform == "cpu" or chip.source.startswith("measured")
    reached = dict.fromkeys(REACHED, 1.0) if measured else REACHED
    in_kernels = 1.0 if chip.platform == "cpu" else KERNELS / REACHED["products"]
    return Speeds(
        chip.flops * reached["products"],
        chip.flops * reached["products"] * in_kernels,
        chip.bandwidth * reached["memory"],
        topology.links * reached["links"],
        chip.unit,
        _SLOWER["cuda" if chip.platform in ("gpu", "rocm") else chip.platform],
        len(topology.devices),
    )


@dataclasses.dataclass(frozen=True)
class Taken:
    """What a program's data decide, and its text does not tell.

    Attributes:
      shares: of the times that a conditional takes its longest branch, of the outermost first; 1 of
        those further in.
      turns: of loops without a known number, of the outermost first; 1 of those further in.
    """

    shares: tuple[float, ...] = ()
    turns: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
    """An instruction that takes time.

    Attributes:
      kind: "product", "kernel", "move", "collective", "prefetch" (a copy beside other work, into
        on-chip or host memory) or "other".
      what: the move or the collective.
      shape: of its result.
      times: it runs in a call.
      bytes: to and from memory; of a collective, from other devices.
      flops: of products; of kernels, as they were given.
      seconds: of one, by itself.
      waited: seconds of these in which nothing else runs; of a collective, what is exposed.
      beside: seconds of other work between the start and the end of what runs beside it.
      begun: whether it has a start and an end.
      source: file:line.
      operation: as jax names it.
    """

    kind: str
    what: str
    shape: str
    times: float
    bytes: float
    flops: float
    seconds: float
    waited: float
    beside: float
    begun: bool
    source: str
    operation: str


@dataclasses.dataclass(frozen=True)
class Counted:
    """A program's expected seconds and the instructions that take them."""

    seconds: float
    entries: tuple[Entry, ...]

    def total(self, field: str, *kinds: str) -> float:
        """Returns the sum of a field over all instructions of these kinds, times included."""
        return sum(
            one.times * getattr(one, field)
            for one in self.entries
            if not kinds or one.kind in kinds
        )


def count(
    text: str, by: Speeds, taken: Taken | None = None, *, kernel_flops: float | None = None
) -> Counted:
    """Counts a compiled program.

    Args:
      text: its optimised HLO.
      by: rates of a device.
      taken: what the data decide.
      kernel_flops: of all that it computes, kernels included: what is not found in products is
        theirs, in proportion to their bytes. None: kernels are only as slow as their bytes.
    """
    module = hlo.Module(text)
    taken = taken or Taken()
    found = _Counter(module, by, taken, 0.0).run()
    moved = found.total("bytes", "kernel")
    if kernel_flops is None or not moved:
        return found
    left = max(0.0, kernel_flops - found.total("flops", "product"))
    return _Counter(module, by, taken, left / moved).run()


class _Counter:
    """Walks the computations in the order of their schedule."""

    def __init__(self, module, by, taken, kernel_rate):
        self._module, self._by, self._taken = module, by, taken
        self._kernel_rate = kernel_rate  # operations of a kernel for each of its bytes
        self._known = {}

    def run(self):
        seconds, entries = self._walk("", 0, 0)
        return Counted(seconds, tuple(entries))

    def _walk(self, *place):
        """Returns the seconds of a computation, and its entries.

        Its place: its name, conditionals around it, loops of unknown turns around it.
        """
        if place not in self._known:
            self._known[place] = self._walked(*place)
        return self._known[place]

    def _walked(self, name, depth, loops):
        clock, entries, running = _Clock(), [], {}
        for one in self._module.computations[name].values():
            if one.opcode == "while":
                turns = self._module.turns(one)
                inner, found = self._walk(one.called("body"), depth, loops + (turns is None))
                turns = _at(self._taken.turns, loops) if turns is None else turns
                clock.now += turns * inner
                entries += [_repeated(entry, turns) for entry in found]
            elif one.opcode == "conditional":
                share, branches = _at(self._taken.shares, depth), self._module.branches(one)
                walked = [self._walk(each, depth + 1, loops) for each in branches]
                inner, found = max(walked, key=lambda both: both[0])
                clock.now += share * inner
                entries += [_repeated(entry, share) for entry in found]
            elif one.opcode == "call":
                inner, found = self._walk(one.called("to_apply"), depth, loops)
                clock.now += inner
                entries += found
            elif hlo.ends(self._module, one):
                self._end(clock, entries, running, self._behind(name, one))
            elif not hlo.is_free(one):
                self._start(clock, entries, running, name, one)
                for key in self._behind(name, one) if one.opcode == "fusion" else ():
                    if key in running:  # a fusion that passes on what runs beside it
                        running[one.name] = running[key]
        return clock.now, entries

    def _behind(self, name, one):
        """Lists the instructions whose values an instruction takes, parts of tuples as tuples."""
        known, found = self._module.computations[name], []
        for operand in one.operands:
            while operand in known and known[operand].opcode == "get-tuple-element":
                operand = known[operand].operands[0]
            found.append(operand)
        return dict.fromkeys(found)

    def _start(self, clock, entries, running, name, one):
        entry = self._entry(name, one)
        if entry.begun:
            ready = clock.beside(entry.kind, entry.seconds)
            running[one.name] = len(entries), clock.busy, ready
        else:
            memory = 0.0 if entry.kind == "collective" else entry.bytes / self._by.memory
            entry = dataclasses.replace(entry, waited=clock.ran(entry.seconds, memory))
        entries.append(entry)

    def _end(self, clock, entries, running, names):
        """Waits for what was begun."""
        begun = next((running[name] for name in names if name in running), None)
        if begun is None:
            return
        at, busy, ready = begun
        waited = max(0.0, ready - clock.now)
        entries[at] = dataclasses.replace(entries[at], waited=waited, beside=clock.busy - busy)
        clock.now += waited

    def _entry(self, name, one):
        module, by = self._module, self._by
        products = list(module.products(name, one))
        size, flops = module.bytes(name, one), sum(each.flops for each in products)
        kind, what, seconds = "other", one.opcode, size / by.memory
        if found := hlo.collective(module, one):
            size = hlo.received(module, one, by.devices)
            kind, what, seconds = "collective", found, size / by.links
        elif one.opcode == "copy-start":
            kind, what = "prefetch", "copy"
        elif hlo.is_kernel(one):
            flops = self._kernel_rate * size
            kind, what, seconds = "kernel", one.target, max(seconds, flops / by.kernels)
        elif products:
            kind, what = "product", "product"
            seconds = max(seconds, sum(map(by.product, products)))
        elif module.is_move(one):
            kind, what = "move", module.moves(name, one)
        return Entry(
            kind, what, ", ".join(map(str, one.arrays[:3])), 1.0, size, flops, seconds, 0.0, 0.0,
            hlo.begins(module, one), module.source(one), one.operation,
        )  # fmt: skip


class _Clock:
    """Time of one device: what runs beside its work waits for its own channel."""

    def __init__(self):
        self.now = self.busy = self._memory = self._links = 0.0

    def ran(self, seconds, memory):
        """Runs an instruction after all before it; memory serves one transfer after another."""
        self._memory = max(self._memory, self.now) + memory
        taken = max(seconds, self._memory - self.now) if memory else seconds
        self.now += taken
        self.busy += taken
        return taken

    def beside(self, kind, seconds):
        """Begins a transfer; returns when it is done."""
        if kind == "collective":
            self._links = max(self._links, self.now) + seconds
            return self._links
        self._memory = max(self._memory, self.now) + seconds
        return self._memory


def _at(values, depth):
    return values[depth] if depth < len(values) else 1.0


def _repeated(entry, times):
    return dataclasses.replace(entry, times=entry.times * times)


# ---------------------------------------------------------------- what is told


def described(counted: Counted, parameter_bytes: float) -> dict[str, Any]:
    """Returns JSON values: where the bytes of a program go, and which collectives are hidden.

    Args:
      counted: the program.
      parameter_bytes: on a device, of what an optimiser updates; 0 if it updates nothing.
    """
    moves = [one for one in counted.entries if one.kind == "move" and one.bytes >= _LARGE]
    collectives = [one for one in counted.entries if one.kind == "collective"]
    memory = counted.total("bytes", "product", "kernel", "move", "other", "prefetch")
    told = {
        "seconds": counted.seconds,
        "memory_bytes": memory,
        "bytes_by_kind": {
            kind: counted.total("bytes", kind)
            for kind in ("product", "kernel", "move", "other", "prefetch", "collective")
        },
        "seconds_by_kind": {
            kind: counted.total("waited", kind)
            for kind in ("product", "kernel", "move", "other", "prefetch", "collective")
        },
        "moved_share": sum(one.times * one.bytes for one in moves) / memory if memory else 0.0,
        "moves": _grouped(moves, "bytes"),
        "collectives": _grouped(collectives, "bytes"),
        "hidden_share": _hidden(collectives),
    }
    if parameter_bytes:
        told["optimizer"] = optimizer(counted, parameter_bytes)
    return told


def _hidden(collectives):
    """Returns the share of the collectives' time that other work hides; 1 without any."""
    whole = sum(one.times * one.seconds for one in collectives)
    return 1 - sum(one.times * one.waited for one in collectives) / whole if whole else 1.0


def _grouped(entries, field):
    """Sums instructions of one kind, source and shape; the largest first."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in entries:
        key = (one.what, one.source, one.shape, one.begun)
        group = found.setdefault(key, {
            "what": one.what, "shape": one.shape, "source": one.source, "times": 0.0, "bytes": 0.0,
            "seconds": 0.0, "waited_s": 0.0, "beside_s": 0.0, "asynchronous": one.begun,
            "operation": one.operation,
        })  # fmt: skip
        group["times"] += one.times
        for name, own in (("bytes", one.bytes), ("seconds", one.seconds),
                          ("waited_s", one.waited), ("beside_s", one.beside)):  # fmt: skip
            group[name] += one.times * own
    return sorted(found.values(), key=lambda group: -group[field])[:_MOST]


def optimizer(counted: Counted, parameter_bytes: float) -> dict[str, float]:
    """Counts what an update moves once in a call: the gradient's norm, clipping and AdamW.

    At least: weights, both moments and gradient are read, weights and both moments written, 7 times
    the bytes of the weights; and the gradient is read once before, for its norm.
    """
    once = [
        one for one in counted.entries
        if one.kind in ("other", "move") and one.times == 1 and one.source.startswith(_OPTIMIZER)
    ]  # fmt: skip
    moved = sum(one.times * one.bytes for one in once)
    return {"bytes": moved, "least_bytes": 8 * parameter_bytes,
            "over_least": moved / (8 * parameter_bytes)}  # fmt: skip


_OPTIMIZER = ("luspo_jax/learner/optimizer.py", "luspo_jax/learner/step.py")


def lines(name: str, told: dict[str, Any], most: int = 8) -> list[str]:
    """Formats what a program moves, in Markdown."""
    kinds = ", ".join(
        f"{kind} {_gb(told['bytes_by_kind'][kind])} GB, {1e3 * seconds:.3g} ms"
        for kind, seconds in told["seconds_by_kind"].items()
        if seconds or told["bytes_by_kind"][kind]
    )
    found = [
        f"**{name}**, {1e3 * told['seconds']:.4g} ms by counting its instructions ({kinds}). "
        f"Copies and transpositions of 1 MB and more: {told['moved_share']:.1%} of the bytes. "
        f"Collectives: {told['hidden_share']:.0%} of their time is hidden by other work.",
    ]
    if "optimizer" in told:
        one = told["optimizer"]
        found[0] += (
            f" The optimiser moves {_gb(one['bytes'])} GB, {one['over_least']:.2f} times the least."
        )
    found += ["", "| what | result | times | GB | ms | waited ms | asynchronous | made for |",
              "|---|---|" + "---:|" * 4 + "---|---|"]  # fmt: skip
    for one in told["moves"][:most] + told["collectives"][:most]:
        found.append(
            f"| {one['what']} | {one['shape']} | {one['times']:.4g} | {_gb(one['bytes'])} | "
            f"{1e3 * one['seconds']:.3g} | {1e3 * one['waited_s']:.3g} | "
            f"{'yes' if one['asynchronous'] else 'no'} | {one['source']} |"
        )
    return [*found, ""]


def _gb(size):
    return f"{size / 1e9:.3g}"
