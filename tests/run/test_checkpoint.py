"""Checkpoints: exact, complete or absent, and clear about what is wrong."""

import dataclasses
import errno
import functools
import gc
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from luspo_jax import sharding
from luspo_jax.experience.stored import from_stored, to_stored
from luspo_jax.learner import optimizer
from luspo_jax.learner.logprobs import LogprobRule
from luspo_jax.learner.state import UpdateRule, abstract_state, initial_state
from luspo_jax.learner.step import update_step
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from luspo_jax.objectives import preset
from luspo_jax.rollout.compile_clock import CompileClock
from luspo_jax.run.checkpoint import Checkpointer, CheckpointError, bytes_written
from luspo_jax.types import TrainState
from tests.experience.experience_cases import group
from tests.row_cases import batch_of, plan_of

MODEL = DecoderConfig(
    model_type="qwen3", vocab_size=24, num_layers=2, embed_dim=16, mlp_dim=32, num_heads=4,
    num_kv_heads=2, head_dim=8, rope_theta=1e4, rms_norm_eps=1e-6, qkv_bias=True, out_bias=False,
    qk_norm=True, tie_embeddings=False, max_position=64, eos_token_ids=(1,), pad_token_id=0,
    dtype="float32",
)  # fmt: skip
MESHES = {
    "one": None,
    "fsdp8": sharding.layout("train", {"fsdp": 8}, jax.devices()),
    "fsdp4_tensor2": sharding.layout("train", {"fsdp": 4, "tensor": 2}, jax.devices()),
    "data2_fsdp4": sharding.layout("train", {"data": 2, "fsdp": 4}, jax.devices()),
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
    host = {"stream": {"taken": 12}, "waiting": []}
    checkpointer.save(3, _state(1.1), host)
    state, back, waiting = checkpointer.restore(3, _state(0.0))
    assert back == host
    assert waiting == {}
    np.testing.assert_array_equal(state.params["w"], _state(1.1).params["w"])
    np.testing.assert_array_equal(state.opt_state[1]["mu"], _state(1.1).opt_state[1]["mu"])
    assert int(state.skipped_updates) == 2
    assert state.ref_params is None


def test_the_processes_that_train_save_and_restore_by_themselves(tmp_path):
    """Here one of one; Orbax then goes the way that it goes for some of several."""
    for step in (1, 2):
        some = Checkpointer(tmp_path / "new" / "checkpoints", keep_latest=2, members=(0,))
        assert some.latest_step() == (step - 1 or None)
        some.save(step, _state(1.1 * step), {"stream": step}, {"tokens": np.arange(step)})
        some.close()
    reader = Checkpointer(tmp_path / "new" / "checkpoints", read_only=True, members=(0,))
    state, host, waiting = reader.restore(2, _state(0.0))
    reader.close()
    np.testing.assert_array_equal(state.params["w"], _state(2.2).params["w"])
    assert host["stream"] == 2
    np.testing.assert_array_equal(waiting["tokens"], np.arange(2))


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


def _rule(**fields):
    adam = optimizer.adamw(b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1)
    logprobs = LogprobRule(Forward(MODEL), head_chunk_tokens=16)
    return UpdateRule(logprobs, preset("luspo", **fields), adam, max_grad_norm=0.0)


RULE = _rule(kl_coef=0.1)
_double = jax.jit(functools.partial(jax.tree.map, lambda x: x + x))


def _on(where, config, rule):
    logprobs = dataclasses.replace(rule.logprobs, how=Forward(config, layout=MESHES[where]))
    return dataclasses.replace(rule, logprobs=logprobs)


def _policy_state(where, config=MODEL, rule=RULE, marked=True):
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), decoder.abstract_params(config)
    )
    if where != "one":
        places = sharding.shardings(decoder.param_axes(config), MESHES[where])
        params = jax.tree.map(jax.device_put, params, places)
    state = initial_state(params, _on(where, config, rule), marked=marked)
    return dataclasses.replace(state, params=_double(state.params))


def _abstract(where, config=MODEL, rule=RULE, marked=True):
    return abstract_state(_on(where, config, rule), marked=marked)


def _assert_placed(state, like):
    def check(x, y):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if y.sharding is None:
            assert not x.committed
        else:
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)

    jax.tree.map(check, state, like)


@pytest.mark.parametrize("where", MESHES)
def test_abstract_state_is_that_of_a_new_one(where):
    state = _policy_state(where)
    _assert_placed(state, _abstract(where))
    mesh = MESHES[where] and MESHES[where].mesh
    for x in jax.tree.leaves(state):
        assert mesh is None or x.sharding.mesh == mesh  # counters too


@pytest.mark.parametrize("written", ["fsdp8", "one"])
def test_state_moves_between_meshes(checkpointer, written):
    """Equal bits on one device and on every mesh, with nothing made there beforehand."""
    checkpointer.save(3, _policy_state(written), {})
    expected = jax.device_get(_policy_state("one"))
    for where in MESHES:
        like = _abstract(where)
        state, *_ = checkpointer.restore(3, like)
        _assert_placed(state, like)
        jax.tree.map(np.testing.assert_array_equal, state, expected)


def _batch():
    prompts, responses = [np.ones(3, np.int32)] * 4, [np.ones(5, np.int32)] * 4
    known = dict.fromkeys(("ref_logprobs", "sampler_logprobs"), [np.full(5, -3, np.float32)] * 4)
    plan = plan_of(prompts, responses, width=8)
    arrays = {"advantages": [1, -1, 2, -2], "groups": [0] * 4}
    return batch_of(MODEL, plan, prompts, responses, **arrays, **known)


def test_resuming_compiles_nothing_new(checkpointer):
    """A restored state is to jit what a new one is, whether `like` is a state or abstract."""
    step = functools.partial(update_step, batch=_batch(), rate=np.float32(0.1), rule=RULE)
    state, _ = step(_policy_state("one"))
    checkpointer.save(1, state, {})
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    named = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=default), _abstract("one")
    )
    restored = [
        checkpointer.restore(1, like)[0] for like in (_policy_state("one"), _abstract("one"), named)
    ]
    expected, _ = step(state)
    for again in restored:
        with CompileClock() as clock:
            resumed, _ = step(again)
        assert clock.count == 0
        jax.tree.map(np.testing.assert_array_equal, resumed, expected)


def test_restoring_leaves_one_state_in_memory(checkpointer):
    checkpointer.save(1, _state(1.1), {})
    gc.collect()
    before = {id(x) for x in jax.live_arrays()}
    state, *_ = checkpointer.restore(1, jax.eval_shape(_state, 0.0))
    new = [x for x in jax.live_arrays() if id(x) not in before and x.size > 1]
    assert sum(x.nbytes for x in new) == sum(x.nbytes for x in jax.tree.leaves(state) if x.size > 1)


def test_resuming_on_a_mesh_compiles_nothing_new(checkpointer):
    state = _policy_state("fsdp4_tensor2")
    checkpointer.save(1, state, {})
    expected = _double(state)
    restored, *_ = checkpointer.restore(1, _abstract("fsdp4_tensor2"))
    with CompileClock() as clock:
        again = _double(restored)
    assert clock.count == 0
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_a_device_that_was_chosen_is_kept(checkpointer):
    checkpointer.save(1, _state(1.1), {})
    device = jax.devices()[5]
    like = jax.device_put(_state(0.0), device)
    state, *_ = checkpointer.restore(1, like)
    assert all(x.devices() == {device} and x.committed for x in jax.tree.leaves(state))


@pytest.mark.parametrize("where", ["one", "fsdp4_tensor2"])
@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"num_layers": 3}, ["params/layers/attention/out/kernel is float32[2,4,8,16], not"]),
        ({"vocab_size": 32}, ["10 arrays", "params/embedding is float32[24,16], not float32[32,"]),
        ({"num_heads": 8}, ["params/layers/attention/out/kernel is float32[2,4,8,16], not"]),
        ({"mlp_dim": 64}, ["params/layers/mlp/up/kernel is float32[2,16,32], not float32[2,16,"]),
        ({"embed_dim": 32}, ["another shape or type", "params/final_norm/scale", "], ..."]),
        ({"tie_embeddings": True}, ["5 arrays in the checkpoint only: params/head float32[24,16"]),
        ({"qk_norm": False}, ["in the checkpoint only: params/layers/attention/key_norm/scale"]),
    ],
)
def test_another_model_is_refused_by_name(checkpointer, monkeypatch, where, changed, parts):
    checkpointer.save(1, _policy_state("one"), {})
    monkeypatch.setattr(
        checkpointer._manager, "restore", lambda *_, **__: pytest.fail("something was read")
    )
    other = dataclasses.replace(MODEL, **changed)
    with pytest.raises(CheckpointError, match="start in a new --workdir") as error:
        checkpointer.restore(1, _abstract(where, other))
    for part in parts:
        assert part in str(error.value)
    assert len(str(error.value)) < 2000


def test_another_objective_or_optimizer_is_refused_by_name(checkpointer):
    plain = _rule(kl_coef=0.0)
    checkpointer.save(1, _policy_state("one", rule=plain, marked=False), {})
    with pytest.raises(CheckpointError, match=r"17 arrays not in the checkpoint: ref_params/"):
        checkpointer.restore(1, _abstract("one", marked=False))
    with pytest.raises(CheckpointError, match="arrays not in the checkpoint: marked_params/"):
        checkpointer.restore(1, _abstract("one", rule=plain))
    other = dataclasses.replace(plain, optimizer=optax.sgd(0.1))
    with pytest.raises(CheckpointError, match="arrays in the checkpoint only: opt_state/0/count"):
        checkpointer.restore(1, _abstract("one", rule=other, marked=False))
    narrow = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
        _abstract("one", rule=plain, marked=False),
    )
    with pytest.raises(CheckpointError, match=r"is float32\[16\], not bfloat16\[16\]"):
        checkpointer.restore(1, narrow)


def test_a_damaged_checkpoint_is_named(checkpointer, tmp_path):
    checkpointer.save(1, _state(1), {})
    for file in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"checkpoints/1 is damaged.* state/.* a new --workdir"
    ):
        checkpointer.restore(1, _state(0.0))


def _largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_one_flipped_bit_is_named_with_the_way_out(checkpointer, tmp_path, where):
    state = dataclasses.replace(_state(1), params={"w": jnp.ones((300, 300))})
    for step in (1, 2):
        checkpointer.save(step, state, {})
    file = _largest(tmp_path / "checkpoints" / "2" / "state")
    content = bytearray(file.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    file.write_bytes(content)
    told = rf"checkpoints/2 is damaged.*{file.name}.*delete that folder.*of step 1"
    with pytest.raises(CheckpointError, match=told):
        checkpointer.restore(2, state)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    again = Checkpointer(tmp_path / "checkpoints", keep_latest=2, keep_best=1)
    np.testing.assert_array_equal(again.restore(1, state)[0].params["w"], state.params["w"])
    again.close()


def test_a_missing_file_is_named_and_a_checkpoint_without_sums_is_read(checkpointer, tmp_path):
    checkpointer.save(1, _state(1.1), {})
    folder = tmp_path / "checkpoints" / "1"
    (folder / "checksums.json").rename(tmp_path / "sums")
    state, *_ = checkpointer.restore(1, _state(0.0))  # as older versions wrote it
    np.testing.assert_array_equal(state.params["w"], _state(1.1).params["w"])
    (tmp_path / "sums").rename(folder / "checksums.json")
    file = _largest(folder / "host")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"is damaged.*host/{file.name}"):
        checkpointer.restore(1, _state(0.0))


def test_a_reader_changes_nothing_while_a_save_is_under_way(checkpointer, tmp_path):
    for step, metric in ((1, 0.9), (2, 0.1), (3, 0.2)):
        checkpointer.save(step, _state(step), {}, metric=metric)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    reader = Checkpointer(folder, read_only=True)
    assert (reader.latest_step(), reader.best_step()) == (3, 1)
    assert int(reader.restore(3, _state(0))[0].opt_state[0]) == 3
    with pytest.raises(CheckpointError, match="holds no checkpoint of step 4; there are: 1, 2, 3"):
        reader.restore(4, _state(0))
    reader.close()
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    with pytest.raises(CheckpointError, match="comes with the first checkpoint"):
        Checkpointer(tmp_path / "elsewhere", read_only=True)


# --- what waits for a later step ----------------------------------------------------------------


def test_responses_that_wait_are_restored_exactly(checkpointer):
    """Two groups of unequal size, with fields that nothing has filled yet."""
    groups = [group(7, [1, 0], [3, 5], version=2), group(4, [0, 2, 1], [1, 2, 8], version=3)]
    arrays, described = to_stored(groups)
    checkpointer.save(3, _state(1.1), {"waiting": described}, arrays)
    state, host, waiting = checkpointer.restore(3, _state(0.0))
    np.testing.assert_array_equal(state.params["w"], _state(1.1).params["w"])
    assert waiting.keys() == arrays.keys()
    for name, array in arrays.items():
        assert isinstance(waiting[name], np.ndarray)
        assert waiting[name].dtype == array.dtype
        np.testing.assert_array_equal(waiting[name], array)
    back = from_stored(waiting, host["waiting"])
    assert [g.column("reward") for g in back] == [g.column("reward") for g in groups]


def test_a_flipped_bit_in_what_waits_is_named(checkpointer, tmp_path):
    checkpointer.save(1, _state(1), {}, to_stored([group(7, [1, 0], [300, 500])])[0])
    file = _largest(tmp_path / "checkpoints" / "1" / "waiting")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"checkpoints/1 is damaged.*waiting/.*{file.name}"):
        checkpointer.restore(1, _state(0.0))


def test_space_is_asked_for_what_waits_too(checkpointer, monkeypatch):
    needed = int(1.1 * sum(x.nbytes for x in jax.tree.leaves(_state(1))))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=needed))
    checkpointer.save(1, _state(1), {})
    with pytest.raises(CheckpointError, match="MB free and a checkpoint needs"):
        checkpointer.save(2, _state(2), {}, {"tokens": np.zeros(1000, np.int32)})


def test_a_checkpoint_of_an_earlier_version_goes_on_where_nothing_waits(checkpointer):
    checkpointer.save(1, _state(1.1), {"stream": {"taken": 12}, "surplus": []})
    state, host, waiting = checkpointer.restore(1, _state(0.0))
    np.testing.assert_array_equal(state.params["w"], _state(1.1).params["w"])
    assert host == {"stream": {"taken": 12}, "waiting": []}
    assert from_stored(waiting, host["waiting"]) == []


def test_a_checkpoint_of_an_earlier_version_in_which_groups_wait_is_refused_by_name(checkpointer):
    stored = {"prompt": {"prompt_id": 3, "tokens": "AQAAAA=="}, "texts": ["a", "b"]}
    checkpointer.save(4, _state(1.1), {"surplus": [stored] * 2})
    with pytest.raises(
        CheckpointError, match=r"checkpoints/4 was written by an earlier version.* 2 groups .*wait"
    ):
        checkpointer.restore(4, _state(0.0))


@pytest.mark.parametrize(
    ("where", "share"), [("fsdp8", 0.5), ("fsdp4_tensor2", 0.5), ("data2_fsdp4", 1.0)]
)
def test_a_process_asks_for_space_for_its_own_bytes(where, share):
    """Half the devices hold half the parts, or a copy of all that they may have to write."""
    x = jax.device_put(np.zeros((16, 16), np.float32), MESHES[where].sharding(("mlp", "embed")))
    assert bytes_written(x, jax.devices()[:4]) == share * x.nbytes
    assert bytes_written(x, jax.devices()) == x.nbytes
    assert bytes_written(np.zeros(3), jax.devices()) == 24
