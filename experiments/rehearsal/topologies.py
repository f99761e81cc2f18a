"""Machines to rehearse for: properties of their chips, and devices that XLA compiles for.

Every number of the table is public; `source` names its origin. Memory of a TPU is the available
amount that libtpu 0.0.42.1 itself reports when a program does not fit; that of a GPU is reported by
its driver. Bandwidths between chips are one way and sum over all links, half of a vendor's
"bidirectional" figure.
"""

import dataclasses
import functools
import math
import os
from typing import Any

import jax

from experiments.command import UsageError
from luspo_jax import sharding

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as XLA sees it.

    Attributes:
      platform: "tpu", "cuda" or "cpu".
      memory: bytes of device memory that programs can use.
      reserve: bytes kept free: the runtime's own buffers, collectives, fragmentation.
      flops: peak bfloat16 operations per second (2 per multiply-add), without sparsity.
      bandwidth: bytes per second between the chip and its memory.
      links: bytes per second into the chip from others of its slice (TPU) or host (GPU).
      network: bytes per second into the chip over the network between hosts (GPU) or slices (TPU);
        0 if no public source tells it.
      host_devices: devices of one host.
      shapes: available slices, largest in each dimension; empty for GPUs.
      source: source of the numbers.
      unit: rows, columns and depth of the block that its matrix unit multiplies: smaller products
        are padded to it.
    """

    platform: str
    memory: float
    reserve: float
    flops: float
    bandwidth: float
    links: float
    network: float
    host_devices: int
    shapes: tuple[str, ...]
    source: str
    unit: tuple[int, int, int] = (1, 1, 1)

    @property
    def usable(self) -> float:
        """Returns the bytes that a rehearsed program may fill."""
        return self.memory - self.reserve


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
          "8x16x16", "16x16x16")  # fmt: skip
_TPU_RESERVE = 0.03  # of the memory
_GPU_RESERVE = (
    0.08  # XLA_PYTHON_CLIENT_MEM_FRACTION=.92: CUDA's context, NCCL and cuDNN take the rest
)
_GOOGLE = "cloud.google.com/tpu/docs/"


def _tpu(gib, tflops, bandwidth, links, network, shapes, page):
    memory, host_devices = gib * GIB, 8 if page.startswith("tpu7x") else 4
    side = 256 if page.startswith(("v6e", "tpu7x")) else 128  # of the matrix unit
    unit = (8, side, side)
    return Chip("tpu", memory, _TPU_RESERVE * memory, tflops * 1e12, bandwidth * 1e9, links * 1e9,
                network * 1e9, host_devices, shapes, _GOOGLE + page, unit)  # fmt: skip


def _gpu(memory, tflops, bandwidth, links, network, source):
    rows = 64 if "DGX H" in source else 16  # of wgmma's and mma's blocks (PTX ISA)
    return Chip("cuda", memory, _GPU_RESERVE * memory, tflops * 1e12, bandwidth * 1e9, links * 1e9,
                network * 1e9, 8, (), source, (rows, 8, 16))  # fmt: skip


CHIPS = {
    "v4": _tpu(30.75, 275, 1200, 300, 0, _CUBES, "v4 (ICI 2400 Gb/s)"),
    "v5e": _tpu(15.75, 197, 819, 200, 3.125, _FLAT, "v5e (ICI 400 GB/s bidirectional; data-centre "
                "network 6.4 Tb/s a pod of 256)"),
    "v5p": _tpu(95.74, 459, 2765, 600, 6.25, (*_CUBES, "16x16x24"), "v5p (ICI 1200 GB/s bidir.; "
                "data-centre network 50 Gb/s a chip)"),
    "v6e": _tpu(31.25, 918, 1638, 400, 12.5, _FLAT, "v6e (ICI 800 GB/s bidirectional; data-centre "
                "network 25.6 Tb/s a pod of 256)"),
    # Two devices per chip, each with half of it.
    "tpu7x": _tpu(94.75, 1153, 3690, 300, 0, _CUBES, "tpu7x (a chip: 2307 TFLOP/s, 7380 GB/s, "
                  "ICI 1200 GB/s bidirectional)"),
    "h100": _gpu(84_942_979_072, 989, 3350, 450, 50, "NVIDIA data sheet, H100 SXM; DGX H100: "
                 "NVLink 900 GB/s both ways, 8 × 400 Gb/s a host"),
    "h200": _gpu(151_397_597_184, 989, 4800, 450, 50, "NVIDIA data sheet, H200 SXM; DGX H200: "
                 "NVLink 900 GB/s both ways, 8 × 400 Gb/s a host"),
    "a100-80g": _gpu(85_100_068_864, 312, 2039, 300, 25, "NVIDIA data sheet, A100 SXM; DGX A100: "
                     "NVLink 600 GB/s both ways, 8 × 200 Gb/s a host"),
    # Its memory is the least that users' out-of-memory messages tell, 23.61 to 23.68 GiB.
    "rtx4090": _gpu(23.61 * GIB, 165.2, 1008, 32, 0, "NVIDIA Ada GPU architecture white paper, "
                    "RTX 4090, bfloat16 summed in float32; PCIe 4.0 × 16, no NVLink"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine: the devices of all its hosts, and their chip.

    Attributes:
      host: devices that a host's own programs are compiled for; empty for the first of `devices`.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    host: tuple[Any, ...] = ()

    @property
    def hosts(self) -> int:
        """Returns the number of processes of a run on it."""
        return len({device.process_index for device in self.devices})

    @property
    def slices(self) -> int:
        """Returns the number of TPU slices, joined by the network."""
        return sharding.num_slices(self.devices)

    @property
    def links(self) -> float:
        """Returns bytes per second into a device in a collective over all of them.

        Between GPU hosts, NVLink passes on what arrives by network, so a host's cards share the
        network and the slower of the two decides.
        """
        chip = self.chip
        if self.hosts == 1 or chip.platform != "cuda":
            return chip.links
        return min(chip.links, chip.network * chip.host_devices)


def topology(text: str) -> Topology:
    """Returns the machine that a flag names: "v5p:2x2x4", "2*v5p:4x4x4" (slices × the slice),
    "h100:1x8" (hosts × cards) or "local".

    Raises:
      UsageError: no such machine (the message lists the valid ones), or its compiler is not
        installed (the message gives the command that installs it).
    """
    if text == "local":
        return Topology(text, _local_chip(), tuple(jax.devices()))
    one, slices = _slices(text)
    name, _, shape = one.partition(":")
    if name not in CHIPS:
        raise UsageError(
            f"--topology={text}: no chip {name!r}; there are {', '.join(CHIPS)}, and local"
        )
    chip = CHIPS[name]
    sizes = _sizes(text, name, chip, shape)
    if slices > 1 and (chip.platform != "tpu" or not chip.network):
        known = [n for n, c in CHIPS.items() if c.platform == "tpu" and c.network]
        raise UsageError(
            f"--topology={text}: several slices can be rehearsed of {', '.join(known)}, whose "
            f"network is published; for one, write {one}"
        )
    with _quiet():
        if chip.platform == "tpu":
            host = ()
            if chip.shapes == _FLAT and math.prod(sizes) > 8:
                # libtpu 0.0.42.1 compiles no collective of a host in a larger flat slice.
                host = _tpu_devices(name, (2, 2), 1)
            return Topology(text, chip, _tpu_devices(name, sizes, slices), host)
        return Topology(text, chip, _gpu_devices(name, chip, sizes))


def _slices(text):
    """Splits "2*v5p:4x4x4" into the slice and their number."""
    count, star, one = text.rpartition("*")
    if not star:
        return text, 1
    if not count.isdecimal() or int(count) < 1:
        raise UsageError(
            f"--topology={text}: write the number of slices before *, as 2*v5p:4x4x4 for two of "
            "v5p:4x4x4"
        )
    return one, int(count)


def _sizes(text, name, chip, shape):
    """Parses the numbers of an existing shape."""
    try:
        sizes = tuple(int(part) for part in shape.split("x"))
    except ValueError:
        sizes = ()
    if chip.platform == "tpu":
        known = {tuple(sorted(map(int, one.split("x")))) for one in chip.shapes}
        valid = tuple(sorted(sizes)) in known
        examples = ", ".join(f"{name}:{one}" for one in chip.shapes)
    else:
        valid = len(sizes) == 2 and sizes[0] >= 1 and sizes[1] in (1, 2, 4, 8)
        examples = f"{name}:HOSTSxCARDS with 1, 2, 4 or 8 cards a host, as {name}:1x8, {name}:4x8"
    if not valid:
        raise UsageError(f"--topology={text} does not exist; valid: {examples}")
    return sizes


def _tpu_devices(name, sizes, slices):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not query cloud metadata
    settings = {}
    if name == "v4":
        settings["chip_config_name"] = "megacore"  # two cores, one device: as on Cloud
    if name in ("v5e", "v6e") and math.prod(sizes) in (1, 8):
        settings["chips_per_host_bounds"] = (*sizes, 1)  # one host has them all
    if slices > 1:
        settings["num_slices"] = slices
    return _described(
        "tpu", "libtpu", 'pip install "jax[tpu]"', f"{name}:{'x'.join(map(str, sizes))}", settings
    )


def _gpu_devices(name, chip, sizes):
    hosts, cards = sizes
    settings = {"target_config": gpu_target(name), "topology": f"1x{hosts}x{cards}"}
    return _described("cuda", "jax's CUDA plugin", 'pip install "jax[cuda13]"', "", settings)


def _described(platform, what, command, name, settings):
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(name, platform=platform, **settings)
    except Exception as error:  # jax and its plugins raise several types for an absent plugin
        raise UsageError(
            f"{what} is needed to compile for this topology: {command} "
            f"({type(error).__name__}: {str(error).splitlines()[0][:160]})"
        ) from error
    return tuple(description.devices)


class _quiet:
    """Silences a plugin's messages about absent hardware."""

    def __enter__(self):
        self._saved = os.dup(2)
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 2)
        os.close(sink)

    def __exit__(self, *_):
        os.dup2(self._saved, 2)
        os.close(self._saved)


# XLA's GpuTargetConfig by its public fields: multiprocessors and their limits come from the CUDA
# programming guide's table for compute capability 8.0, 8.9 and 9.0.
_LIMITS = {  # shared memory per multiprocessor and block (opt-in), threads per multiprocessor
    "9.0": (233_472, 232_448, 2048),
    "8.9": (102_400, 101_376, 1536),
    "8.0": (167_936, 166_912, 2048),
}
_CARDS = {
    "h100": ("NVIDIA H100 80GB HBM3", 132, "9.0", 128, 52_428_800, 1.98),
    "h200": ("NVIDIA H200 141GB HBM3e", 132, "9.0", 128, 52_428_800, 1.98),
    "a100-80g": ("NVIDIA A100-SXM4-80GB", 108, "8.0", 64, 41_943_040, 1.41),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 128, "8.9", 128, 75_497_472, 2.52),
}


def gpu_target(name: str) -> str:
    """Returns the GpuTargetConfig of a card as text proto, which XLA compiles for."""
    title, cores, capability, units, cache, clock = _CARDS[name]
    chip, (a_core, a_block, threads) = CHIPS[name], _LIMITS[capability]
    major, minor = capability.split(".")
    minor = f" minor: {minor}" if minor != "0" else ""
    extension = "ACCELERATED_FEATURES" if major == "9" else "NONE"
    return f"""
    gpu_device_info {{
      name: "{title}" core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
      memory_bandwidth: {chip.bandwidth:.0f} device_memory_size: {chip.memory:.0f}
      l2_cache_size: {cache}
      shared_memory_per_block: 49152 shared_memory_per_core: {a_core}
      shared_memory_per_block_optin: {a_block}
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      cuda_compute_capability {{ major: {major}{minor} feature_extension: {extension} }}
      driver_version: "13.0.0" runtime_version: "13.0.0" dnn_version: "9.10.0"
      compile_time_toolkit_version: "13.0.0"
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    runtime_version {{ major: 13 }}
    device_description_str: "{title}"
    """


@functools.cache
def _local_chip() -> Chip:
    """Returns the chip of the local devices: known cards by name, others measured."""
    device = jax.devices()[0]
    kind = device.device_kind.lower()
    card = kind.replace(" ", "")
    for name, chip in CHIPS.items():
        if device.platform == "gpu" and name.split("-")[0] in card:
            stats = device.memory_stats() or {}
            memory = stats.get("bytes_limit", chip.usable)  # all memory taken by jax is usable
            return dataclasses.replace(chip, memory=memory, reserve=0.0)
        if device.platform == "tpu" and _tpu_kind(name) in kind:
            return chip
    from experiments.rehearsal import local

    return local.measured_chip(len(jax.devices()))


def _tpu_kind(name):
    return {"v5e": "v5 lite", "v5p": "v5", "v6e": "v6 lite"}.get(name, name)


def shown(topology: Topology) -> str:
    """Describes the machine in a line."""
    chip, slices = topology.chip, topology.slices
    network = f", {chip.network / 1e9:.3g} GB/s network between slices" if slices > 1 else ""
    return (
        f"{topology.name}: {machine(len(topology.devices), topology.hosts, slices)}, each "
        f"{chip.memory / 1e9:.1f} GB ({chip.reserve / 1e9:.1f} kept free), "
        f"{chip.flops / 1e12:.3g} TFLOP/s bf16, {chip.bandwidth / 1e9:.0f} GB/s memory, "
        f"{topology.links / 1e9:.0f} GB/s links{network}"
    )


def machine(devices: int, hosts: int, slices: int) -> str:
    """Describes the sizes of a machine in words."""
    of_slices = f" in {slices} slices" if slices > 1 else ""
    return f"{devices} devices of {hosts} host(s){of_slices}"
