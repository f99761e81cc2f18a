"""Trackio's database says what metrics.jsonl says; in a process of its own, as it reads its folder
when it is imported."""

import json
import os
import pathlib
import sqlite3
import subprocess
import sys

import pytest

from tests.run.trackers.tracker_cases import ROW

ROOT = pathlib.Path(__file__).resolve().parents[3]
_RUN = """
import json, pathlib, sys
from tests.run.trackers.tracker_cases import interrupted_run
folder = pathlib.Path(sys.argv[1])
(folder / "rows.json").write_text(json.dumps(interrupted_run(folder / "run", "trackio")))
"""


def test_a_database_holds_every_step_once_in_one_run(tmp_path):
    pytest.importorskip("trackio", reason="needs the extra trackio")
    environment = os.environ | {
        "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT), "XLA_FLAGS": "",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        environment.pop(name, None)
    ran = subprocess.run(
        [sys.executable, "-c", _RUN, str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = {int(k): v for k, v in json.loads((tmp_path / "rows.json").read_text()).items()}
    with sqlite3.connect(tmp_path / "trackio" / "rl.db") as database:
        found = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id")
        found = [(name, step, json.loads(values)) for name, step, values in found]
    assert len({name for name, _, _ in found}) == 1
    assert found[0][0].startswith("member-")
    numbers = [(step, row) for _, step, row in found if "reward" in row]
    assert [step for step, _ in numbers] == list(rows)
    assert all(row == rows[step] for step, row in numbers)
    (table,) = [(step, row["completions"]) for _, step, row in found if "completions" in row]
    assert table[0] == 2
    assert [tuple(row.values()) for row in table[1]["_value"]] == [ROW]
