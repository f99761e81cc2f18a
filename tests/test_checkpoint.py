"""Checkpoints: exact, complete or absent, and clear about what is wrong."""

import dataclasses
import errno
import functools
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import optimizer, sharding, update
from luspo_jax.checkpoint import Checkpointer, CheckpointError, bytes_written
from luspo_jax.logprobs import Scoring
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.objectives import preset
from luspo_jax.rollout.compile_clock import CompileClock
from luspo_jax.types import TokenBatch, TrainBatch, TrainState

MODEL = DecoderConfig(
    model_type="qwen3", vocab_size=24, num_layers=2, embed_dim=16, mlp_dim=32, num_heads=4,
    num_kv_heads=2, head_dim=8, rope_theta=1e4, rms_norm_eps=1e-6, qkv_bias=True, out_bias=False,
    qk_norm=True, tie_embeddings=False, max_position=64, eos_token_ids=(1,), pad_token_id=0,
    dtype="float32",
)  # fmt: skip
MESHES = {
    "one": None,
    "fsdp8": sharding.layout("train", {"fsdp": 8}),
    "fsdp4_tensor2": sharding.layout("train", {"fsdp": 4, "tensor": 2}),
    "data2_fsdp4": sharding.layout("train", {"data": 2, "fsdp": 4}),
}


def _state(value):
    return TrainState(
        params={"w": jnp.full((3, 2), value), "b": {"c": jnp.arange(4.0) * value}},
        opt_state=(jnp.int32(value), {"mu": jnp.ones((3, 2)) / 3}),
        skipped_updates=jnp.int32(2),
    )


@pytest.fixture
def checkpointer(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep_latest=2, keep_best=1)
    yield checkpointer
    checkpointer.close()


def test_what_is_saved_is_restored_exactly(checkpointer):
    host = {"stream": {"taken": 12}, "surplus": []}
    checkpointer.save(3, _state(1.1), host)
    state, back = checkpointer.restore(3, _state(0.0))
    assert back == host
    np.testing.assert_array_equal(state.params["w"], _state(1.1).params["w"])
    np.testing.assert_array_equal(state.opt_state[1]["mu"], _state(1.1).opt_state[1]["mu"])
    assert int(state.skipped_updates) == 2
    assert state.ref_params is None


def test_latest_and_best_are_kept(checkpointer, tmp_path):
    for step, metric in ((1, 0.1), (2, 0.9), (3, None), (4, 0.3), (5, None)):
        checkpointer.save(step, _state(step), {}, metric=metric)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [2, 4, 5]
    assert (checkpointer.latest_step(), checkpointer.best_step()) == (5, 2)


def test_nothing_saved_yet(checkpointer):
    assert checkpointer.latest_step() is None
    assert checkpointer.best_step() is None


def test_too_little_space_is_said_before_writing(checkpointer, monkeypatch, tmp_path):
    checkpointer.save(1, _state(1), {})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match="MB free and a checkpoint needs"):
        checkpointer.save(2, _state(2), {})
    assert checkpointer.latest_step() == 1


def test_disk_that_fills_during_a_save_leaves_the_last_checkpoint(
    checkpointer, monkeypatch, tmp_path
):
    checkpointer.save(1, _state(1), {})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpointer._manager, "save", full)
    with pytest.raises(CheckpointError, match="free some space"):
        checkpointer.save(2, _state(2), {})
    again = Checkpointer(tmp_path / "checkpoints", keep_latest=2, keep_best=1)
    assert again.latest_step() == 1
    again.close()


def test_interrupted_save_is_no_checkpoint(checkpointer, tmp_path):
    """What a kill in the middle of a save leaves behind is cleaned up and not read."""
    checkpointer.save(1, _state(1), {})
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", half)
    again = Checkpointer(tmp_path / "checkpoints", keep_latest=2, keep_best=1)
    assert again.latest_step() == 1
    again.close()


def test_other_architecture_is_named(checkpointer):
    checkpointer.save(1, _state(1), {})
    other = TrainState({"w": jnp.zeros((5, 5))}, (), jnp.int32(0))
    with pytest.raises(CheckpointError, match="start in a new --workdir"):
        checkpointer.restore(1, other)


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not write under"):
        Checkpointer(tmp_path / "file" / "checkpoints", keep_latest=1, keep_best=0)
