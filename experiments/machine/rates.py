"""The machine's software and devices, its matrix rate and its memory bandwidth."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import work
from experiments.machine.records import Check, Fact, Rate
from experiments.machine.running import Known
from luspo_jax.run.memory import device_memory

PRODUCT, READING, COPYING = "matrix products", "reading memory", "reading and writing memory"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu", "jax-cuda13-plugin",
             "jax-cuda12-plugin", "jax-rocm7-plugin")  # fmt: skip
BUSY = "OTHERS USE THIS MACHINE"
_REPEATS = 5
_COLUMNS = 4096  # of an array that is multiplied with a vector


def checks(device: jax.Device) -> Iterator[Check]:
    """Yields what tells of the machine and what it can do."""
    yield Check("machine", "software and devices", 0.0, facts)
    for dtype in ("float32", "bfloat16"):
        for size in (1024, 2048) if device.platform == "cpu" else (4096, 8192, 16384):
            yield Check("rates", f"{PRODUCT}, {dtype}, {size} × {size}", 2.0, _product(dtype, size))
    yield Check("rates", READING, 3.0, reading)
    yield Check("rates", COPYING, 3.0, copying)


def facts(known: Known) -> list[Fact]:
    """Returns versions, devices, memory, cores and load."""
    device = known.device
    same = [one for one in jax.devices() if one.device_kind == device.device_kind]
    found = [
        Fact("python", platform.python_version()),
        Fact("packages", ", ".join(_versions())),
        Fact("platform", " ".join(str(device.client.platform_version).split())[:200]),
        Fact("devices", f"{len(same)} × {device.device_kind}; {_checked(len(same))}"),
        Fact("memory of a device", f"{device_memory(device) / 1e9:.1f} GB"),
        Fact("processor", f"{processor()}, {cores()} cores"),
        Fact("memory of the host", f"{host_memory() / 1e9:.1f} GB"),
    ]
    if known.tiny:
        found.append(Fact("sizes", "TINY: no rate and no time below holds"))
    driver = _driver()
    if driver:
        found.append(Fact("driver", driver))
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        busy = load > 0.5 + cores() / 8
        note = f"; {BUSY}: its rates and times will not hold" if busy else ""
        found.append(Fact("load before", f"{load:.1f}{note}"))
    return found


def cores() -> int:
    """Returns the cores that this process may use."""
    can_ask = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1


def host_memory() -> int:
    """Returns the bytes of the host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _checked(count):
    return "the first is measured" if count > 1 else "it is measured"


def _versions():
    for name in _PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue


def processor() -> str:
    """Returns the name of the machine's processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(x for x in file if x.startswith("model name")).partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver():
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return " ".join(file.readline().split()).removeprefix("NVRM version: ")
    except OSError:
        return ""


def _product(dtype: str, size: int) -> Callable[[Known], list[Rate]]:
    def measured(known):
        side = 64 if known.tiny else size
        per_second = work.matmul_rates(dtype, size=side, repeats=_REPEATS)["jax"]
        return [Rate(PRODUCT, dtype, side, per_second)]

    return measured


def _array(known):
    """A large array of ones: more than any cache holds, and little of the memory."""
    most = 2**28 if known.on_cpu else 2**31
    bytes_ = min(most, int(device_memory(known.device)) // 16)
    return jnp.ones(2**16 if known.tiny else bytes_ // 4, jnp.float32)


def reading(known: Known) -> list[Rate]:
    """Measures a sum of a large array, and a product with a vector, which read each entry once."""
    array = _array(known)
    rows = array[: len(array) // _COLUMNS * _COLUMNS].reshape(-1, _COLUMNS)
    seconds = min(
        best(jax.jit(jnp.sum), array, repeats=_REPEATS),
        best(jax.jit(jnp.matmul), rows, jnp.ones(_COLUMNS, jnp.float32), repeats=_REPEATS),
    )
    return [Rate(READING, "float32", array.nbytes, array.nbytes / seconds)]


def copying(known: Known) -> list[Rate]:
    """Measures adding 1 to a large array in place, which reads and writes each entry once."""
    array = _array(known)
    size, seconds = array.nbytes, []
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = jax.block_until_ready(add(array))
    for _ in range(_REPEATS):
        started = time.perf_counter()
        array = jax.block_until_ready(add(array))
        seconds.append(time.perf_counter() - started)
    return [Rate(COPYING, "float32", size, 2 * size / min(seconds))]


def best(function: Callable, *arguments: Any, repeats: int) -> float:
    """Returns the least seconds of several calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        found.append(time.perf_counter() - started)
    return min(found)
