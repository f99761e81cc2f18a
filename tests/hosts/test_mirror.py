"""A bucket that follows a folder."""

import threading
import time

import pytest

from luspo_jax.hosts.buckets import BucketError
from luspo_jax.hosts.mirror import Mirror
from tests.hosts.test_lease import Memory


class Copy(Memory):
    """Also takes files, and remembers in which order; may fail or wait."""

    def __init__(self):
        super().__init__()
        self.order, self.gate = [], threading.Event()
        self.gate.set()

    def upload(self, name, path):
        self._check()
        self.gate.wait(30)
        self.order.append(name)
        self.objects[name] = path.read_bytes()


@pytest.fixture
def mirrored(tmp_path):
    bucket = Copy()
    mirror = Mirror(tmp_path, bucket, hidden=(".note",), left_out=("wandb",))
    yield tmp_path, bucket, mirror
    mirror.close(flush=False)


def test_what_changes_is_copied_and_nothing_else(mirrored):
    folder, bucket, mirror = mirrored
    (folder / "rollouts").mkdir()
    (folder / "rollouts" / "step_1.jsonl").write_text("r")
    (folder / "metrics.jsonl").write_text("m")
    (folder / "a").write_text("a")
    for scratch in (".lock", ".metrics.tmp.jsonl", ".note"):
        (folder / scratch).write_text("x")
    for name in (".export.partial-1", "wandb"):
        (folder / name).mkdir()
        (folder / name / "w").write_text("w")
    mirror.flush()
    assert bucket.objects == {
        "rollouts/step_1.jsonl": b"r", "metrics.jsonl": b"m", "a": b"a", ".note": b"x"
    }  # fmt: skip
    assert bucket.order[-1] == "metrics.jsonl"  # which speaks of the others
    bucket.order.clear()
    mirror.flush()
    assert bucket.order == []
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write("n")
    (folder / "rollouts" / "step_1.jsonl").unlink()
    mirror.flush()
    assert bucket.order == ["metrics.jsonl"]
    assert bucket.objects == {"metrics.jsonl": b"mn", "a": b"a", ".note": b"x"}


def test_what_was_read_from_the_bucket_is_not_sent_again(mirrored):
    folder, bucket, mirror = mirrored
    bucket.objects = {"run.json": b"old", "other": b"kept"}
    (folder / "run.json").write_bytes(b"old")
    mirror.adopt(["run.json"])
    mirror.flush()
    assert bucket.order == []
    (folder / "run.json").write_bytes(b"new!")
    mirror.flush()
    assert bucket.objects == {"run.json": b"new!", "other": b"kept"}


def test_a_nudge_returns_at_once_and_a_flush_waits(mirrored):
    folder, bucket, mirror = mirrored
    bucket.gate.clear()
    (folder / "a").write_text("a")
    began = time.monotonic()
    mirror.nudge()
    assert time.monotonic() - began < 0.1
    flush = threading.Thread(target=mirror.flush)
    flush.start()
    time.sleep(0.2)
    assert flush.is_alive()
    (folder / "b").write_text("b")  # after the flush began: it may come later
    bucket.gate.set()
    flush.join(10)
    assert bucket.objects["a"] == b"a"


def test_a_failure_reaches_the_run(mirrored):
    folder, bucket, mirror = mirrored
    bucket.away = True
    (folder / "a").write_text("a")
    with pytest.raises(BucketError, match="away"):
        mirror.flush()
    with pytest.raises(BucketError, match="away"):
        mirror.nudge()


def test_it_writes_no_more_once_it_may_not(tmp_path):
    bucket, lost = Copy(), []

    def may_write():
        if lost:
            raise BucketError("taken over")

    mirror = Mirror(tmp_path, bucket, may_write=may_write)
    mirror.flush()
    lost.append(True)
    (tmp_path / "a").write_text("a")
    with pytest.raises(BucketError, match="taken over"):
        mirror.flush()
    assert bucket.objects == {}
    mirror.close(flush=False)


def test_closing_copies_the_rest(tmp_path):
    bucket = Copy()
    mirror = Mirror(tmp_path, bucket)
    (tmp_path / "a").write_text("a")
    mirror.close()
    assert bucket.objects == {"a": b"a"}
