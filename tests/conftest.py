"""Strict flags for the whole suite, shared compile cache, and where real test inputs are found."""

import contextlib
import gc
import itertools
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a network
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MPLBACKEND", "Agg")

# The tests of this process compile much and compute next to nothing, so its compiler optimizes
# little: a step of the learner compiles in a third to two thirds of the time. Runs that a test
# starts as a process compile as users' do, and LUSPO_TEST_COMPILER=full has all tests do so.
_QUICK = os.environ.get("LUSPO_TEST_COMPILER", "quick") != "full"
_FLAGS = os.environ.get("XLA_FLAGS")
if _QUICK and sys.version_info < (3, 12):  # jax 0.10; that of 0.11 and later has no such flag
    os.environ["XLA_FLAGS"] = f"{_FLAGS or ''} --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# 8 fake CPU devices, so that every test can build a mesh; the run of a test that builds none has
# one. Processes that a test starts see one device, as on a laptop.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_device", jax.devices("cpu")[0])
jax.config.update("jax_disable_most_optimizations", _QUICK)
# Read by now, and not for the processes that tests start.
os.environ.pop("XLA_FLAGS", None)
if _FLAGS is not None:
    os.environ["XLA_FLAGS"] = _FLAGS

# One compile cache for all workers of a run, and for the next run on the same machine.
jax.config.update(
    "jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "luspo_jax_test_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_numpy_rank_promotion", "raise")


# Every compiled program takes some memory maps, of which Linux gives a process 65,530 by default:
# the suite compiles more than that. What is dropped comes back from the compile cache.
_MAPS = pathlib.Path("/proc/self/maps")
_MANY_MAPS = 20_000


_LOOK_EVERY = 8  # tests: counting takes some milliseconds
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """Drops compiled programs once there are many."""
    yield
    if next(_tests) % _LOOK_EVERY or not _MAPS.exists():
        return
    if _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def strict_dtypes():
    """Run a test under strict dtype promotion, as objectives, models and ops must."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """Run a test in float64, for comparison with oracles."""
    with jax.enable_x64(True):
        yield


def _real_inputs(folder: pathlib.Path) -> pathlib.Path:
    if not folder.is_dir():
        pytest.skip(f"real test inputs are absent: {folder} (set LUSPO_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of public data files that are not part of this repository."""
    return _real_inputs(
        pathlib.Path(os.environ.get("LUSPO_TEST_DATA", ROOT.parent / "shared" / "data"))
    )


@pytest.fixture(scope="session")
def shared_oracles(shared_data: pathlib.Path) -> pathlib.Path:
    """Folder with other implementations' recorded losses and gradients."""
    return _real_inputs(shared_data.parent / "oracles")


@pytest.fixture(scope="session")
def bucket_ports():
    """Ports of servers of buckets by scheme; each starts when it is first asked for."""
    from tests import bucket_servers

    class Ports(dict):
        def __missing__(self, scheme):
            server = {"gs": bucket_servers.gcs, "s3": bucket_servers.s3}[scheme]
            self[scheme] = stack.enter_context(server())
            return self[scheme]

    with contextlib.ExitStack() as stack:
        yield Ports()
