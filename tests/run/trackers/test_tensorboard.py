"""TensorBoard's files, as it reads them itself."""

import math

from tensorboardX.proto.event_pb2 import Event

from luspo_jax.run.trackers.sending import MEMORY, Trackers
from luspo_jax.run.trackers.tensorboard import TensorBoard
from luspo_jax.run.trackers.tracker import About
from luspo_jax.run.writers import MetricsWriter


def _writer(folder):
    trackers = Trackers({"tensorboard": TensorBoard()}, About(folder, "p", "", "r"))
    return MetricsWriter(folder, trackers=trackers, console=None)


def test_tensorboard_files_purge_what_a_resume_undoes(tmp_path):
    writer = _writer(tmp_path)
    writer.write(1, {"reward": 1.0, "actor/grad_norm": math.nan})
    writer.write(2, {"reward": 2.0})
    writer.close()
    writer = _writer(tmp_path)
    writer.truncate_after(1)
    writer.write(2, {"reward": 3.0})
    writer.close()
    events = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # records of TensorFlow's format: length, checksum, data, checksum
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[12 + size + 4 :]
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars.count((1, "reward", 1.0)) == 1
    assert (2, "reward", 3.0) in scalars
    assert not any(tag == "actor/grad_norm" for _, tag, _ in scalars)
    purges = [e.step for e in events if e.session_log.status == e.session_log.START]
    assert purges == [2]
    assert not (tmp_path / MEMORY).exists()
