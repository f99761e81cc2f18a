"""W&B runs offline, and its files say what metrics.jsonl says."""

import json
import struct

import pytest

from luspo_jax.hosts.values import ConfigError
from luspo_jax.run.trackers.wandb import Wandb
from tests.run.trackers.tracker_cases import COLUMNS, ROW, interrupted_run

wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
_BLOCK, _IDENT = 32768, 7


def _records(path):
    """Yields the records of a .wandb file: LevelDB's log format after a head of seven bytes."""
    data, at, parts = path.read_bytes(), _IDENT, b""
    while at + 7 <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < 7:  # the rest of a block is padding
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def _read(folder):
    from wandb.proto import wandb_internal_pb2

    runs, history = [], []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in _records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.append(record.run)
            elif kind == "history":
                items = record.history.item
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                history.append((record.history.step.num, row))
    return runs, history


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name in ("WANDB_DIR", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # Neither the user's settings nor their cache.
    for name in ("CONFIG", "CACHE", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    yield tmp_path / "run"
    wandb.teardown()


def test_an_offline_run_holds_every_step_once_under_one_name(offline):
    rows = interrupted_run(offline, "wandb")
    wandb.teardown()  # W&B's process may write a little later than `finish` returns
    runs, history = _read(offline)
    assert {(r.project, r.run_group, r.display_name) for r in runs} == {("rl", "sweep", "member")}
    assert len({r.run_id for r in runs}) == 1
    assert len(list(offline.glob("wandb/offline-run-*"))) == 2
    assert [step for step, _ in history] == list(rows)
    for step, row in history:
        assert {name: row[name] for name in rows[step]} == rows[step]
        assert any(name.startswith("completions/") for name in row) == (step == 2)
        assert "actor/lr" not in row
    (table,) = offline.glob("wandb/*/files/media/table/*.json")
    found = json.loads(table.read_text(encoding="utf-8"))
    assert (tuple(found["columns"]), [tuple(r) for r in found["data"]]) == (COLUMNS, [ROW])
    config = {update.key: json.loads(update.value_json) for update in runs[0].config.update}
    assert (config["seed"], config["model.path"]) == (3, "m")


def test_a_machine_without_a_key_is_refused_before_training(offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(offline / "none"))
    wandb.teardown()
    with pytest.raises(ConfigError, match=r"no key.*wandb login.*WANDB_MODE=offline"):
        Wandb().prepare()


def test_offline_needs_no_key(offline):
    wandb.teardown()
    Wandb().prepare()
