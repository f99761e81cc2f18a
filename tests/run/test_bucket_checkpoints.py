"""Checkpoints that Orbax writes to a bucket: as on a disk, in the background, whole or absent."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luspo_jax import sharding
from luspo_jax.hosts.buckets import Bucket, BucketError
from luspo_jax.run import bucket_checkpoints
from luspo_jax.run.checkpoint import Checkpointer, CheckpointError
from tests.bucket_servers import BUCKET, connect
from tests.run.test_checkpoint import _state


@pytest.fixture(params=["gs", "s3"])
def bucket(request, bucket_ports, monkeypatch, tmp_path):
    """An empty folder of a bucket of either kind."""
    connect(monkeypatch, request.param, bucket_ports[request.param])
    return Bucket(f"{request.param}://{BUCKET}/{tmp_path.name}")


@pytest.fixture
def opened(bucket):
    """Opens checkpointers there, closed at the end."""
    made = []

    def open_(**options):
        made.append(Checkpointer(bucket.url, **options))
        return made[-1]

    yield open_
    for one in made:
        one.close()


def test_what_is_saved_is_restored_exactly_by_another_host(bucket, opened):
    first = opened(keep_latest=1, keep_best=1)
    assert (first.latest_step(), first.written()) == (None, None)
    waiting = {"tokens": np.arange(7)}
    for step, metric in ((1, 0.9), (2, 0.1), (3, 0.2)):
        first.save(step, _state(1.1 * step), {"stream": step}, waiting, metric=metric)
    first.wait()
    assert (first.written(), first.best_step()) == (3, 1)
    assert {name.split("/")[0] for name in bucket.entries()} == {"1", "3"}
    reader = opened(read_only=True)
    state, host, waits = reader.restore(3, _state(0.0))
    assert host["stream"] == 3
    jax.tree.map(np.testing.assert_array_equal, state, _state(1.1 * 3))
    np.testing.assert_array_equal(waits["tokens"], np.arange(7))
    assert opened().latest_step() == 3


def test_a_sharded_state_moves_between_meshes(bucket, opened):
    cut = {
        name: sharding.layout("train", sizes, jax.devices()).sharding(("embed", None))
        for name, sizes in (("a", {"fsdp": 8}), ("b", {"fsdp": 4, "tensor": 2}))
    }
    values = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    one = opened()
    one.save(1, {"w": jax.device_put(values, cut["a"])}, {})
    one.wait()
    like = {"w": jax.device_put(np.zeros_like(values), cut["b"])}
    state, _, _ = opened(read_only=True).restore(1, like)
    assert state["w"].sharding == cut["b"]
    np.testing.assert_array_equal(state["w"], values)


def test_updates_go_on_while_it_is_written_and_do_not_touch_it(bucket, opened):
    """On a CPU, an array that is given away is written into by the next program."""
    hold = threading.Event()
    checkpointer = opened(before_commit=lambda: hold.wait(30))
    state = {"w": jnp.arange(200_000.0)}
    checkpointer.save(1, state, {"n": 1})
    assert checkpointer.written() is None  # it is on its way
    update = jax.jit(lambda state: {"w": state["w"] * 0 - 1}, donate_argnums=0)
    for _ in range(3):
        state = update(state)
    hold.set()
    checkpointer.wait()
    assert checkpointer.written() == 1
    back, _, _ = opened(read_only=True).restore(1, {"w": jnp.zeros(200_000)})
    np.testing.assert_array_equal(back["w"], np.arange(200_000.0))


def test_a_half_written_checkpoint_does_not_count_and_goes(bucket, opened):
    first = opened()
    first.save(1, _state(1.0), {})
    first.save(2, _state(2.0), {})
    first.wait()
    first.close()
    bucket.delete(["2/commit_success.txt"])  # the last thing that is written
    assert opened(read_only=True).latest_step() is None
    again = opened()
    assert again.latest_step() is None
    assert bucket.entries() == {}
    again.save(2, _state(2.5), {})
    again.wait()
    assert opened(read_only=True).restore(2, _state(0.0))[0].params["w"][0, 0] == 2.5


def test_a_checkpoint_that_was_copied_from_a_disk_goes_on_and_back(bucket, opened, tmp_path):
    disk = Checkpointer(tmp_path / "disk")
    disk.save(3, _state(1.5), {"n": 3}, {"tokens": np.arange(3)})
    disk.close()
    files = [path for path in (tmp_path / "disk").rglob("*") if path.is_file()]
    names = {path.relative_to(tmp_path / "disk").as_posix(): path for path in files}
    missing = next(name for name in names if name.endswith("state/manifest.ocdbt"))
    last = "3/commit_success.txt"
    for name in names.keys() - {missing, last}:
        bucket.upload(name, names[name])
    assert opened().latest_step() is None
    bucket.upload(last, names[last])
    with pytest.raises(CheckpointError, match="are state/manifest"):
        opened().restore(3, _state(0.0))
    bucket.upload(missing, names[missing])
    state, host, waiting = opened().restore(3, _state(0.0))
    jax.tree.map(np.testing.assert_array_equal, state, _state(1.5))
    assert (host["n"], waiting["tokens"].tolist()) == (3, [0, 1, 2])
    ours = opened(keep_latest=2)
    ours.save(4, _state(2.5), {"n": 4})
    ours.wait()
    for name in bucket.entries("4"):
        bucket.download(name, tmp_path / "back" / name)
    back = Checkpointer(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back.restore(4, _state(0.0))[0], _state(2.5))
    back.close()


def test_what_must_be_there_before_a_checkpoint_counts_is_waited_for(bucket, opened):
    seen = []

    def before_commit():
        names = set(bucket.entries())
        seen.append(("1/state/manifest.ocdbt" in names, "1/commit_success.txt" in names))

    checkpointer = opened(before_commit=before_commit)
    checkpointer.save(1, _state(1.0), {})
    checkpointer.wait()
    assert seen == [(True, False)]


def test_a_failure_in_the_background_is_raised_and_leaves_the_last_one(bucket, opened):
    trouble = []

    def before_commit():
        if trouble:
            raise BucketError("gs://x: no permission")

    checkpointer = opened(before_commit=before_commit)
    checkpointer.save(1, _state(1.0), {})
    checkpointer.wait()
    trouble.append(True)
    checkpointer.save(2, _state(2.0), {})
    with pytest.raises((BucketError, CheckpointError), match="no permission"):
        checkpointer.wait()
    again = opened()
    assert again.latest_step() == 1
    np.testing.assert_array_equal(
        again.restore(1, _state(0.0))[0].params["w"], _state(1.0).params["w"]
    )


def test_a_changed_or_missing_object_is_named(bucket, opened):
    first = opened(keep_latest=2)
    for step in (1, 2):
        first.save(step, _state(float(step)), {})
    first.wait()
    name = max(bucket.entries("2/state"), key=lambda n: bucket.entries("2/state")[n].size)
    content = bucket.read(name)
    bucket.write(name, content[:-1] + bytes([content[-1] ^ 1]))
    says = "is damaged: not as they were written are .*delete that folder to continue .* step 1"
    with pytest.raises(CheckpointError, match=says):
        opened(read_only=True).restore(2, _state(0.0))
    bucket.delete([name])
    with pytest.raises(CheckpointError, match=says):
        opened(read_only=True).restore(2, _state(0.0))


def test_another_orbax_is_refused_by_name(bucket, monkeypatch):
    if not bucket.url.startswith("s3:"):
        pytest.skip("Orbax knows gs:// by itself")
    from orbax.checkpoint._src.serialization import tensorstore_utils

    bucket_checkpoints._teach_s3.cache_clear()
    monkeypatch.delattr(tensorstore_utils, "_use_gcs_driver")
    with pytest.raises(BucketError, match=r"Orbax .* cannot be taught s3://"):
        bucket_checkpoints.opened(bucket.url)
    bucket_checkpoints._teach_s3.cache_clear()
