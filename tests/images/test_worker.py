"""The worker's module starts fast: what it imports is counted here."""

import subprocess
import sys

import pytest

_HEAVY = ("jax", "flax", "transformers", "pyarrow", "luspo_jax.rewards", "luspo_jax.datasets")


@pytest.mark.parametrize("name", ["worker", "pixels", "settings", "record"])
def test_a_worker_imports_nothing_heavy(name):
    code = (
        f"import sys; import luspo_jax.images.{name}; "
        f"print([m for m in {_HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
