"""The files that process 0 writes of all posts."""

import json
import threading

from luspo_jax.hosts import board as boards


def _read(folder):
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_posts_become_files_without_addresses(tmp_path):
    board = boards.Board(str(tmp_path / "processes"))
    board.show([{"process": 0, "step": 1, "guard": ("h", 1)}, {"process": 12, "step": 1}])
    board.finish(10.0)
    assert _read(tmp_path / "processes") == {
        "0.json": {"process": 0, "step": 1},
        "12.json": {"process": 12, "step": 1},
    }
    board.show([{"process": 0, "step": 2}])
    board.finish(10.0)
    assert _read(tmp_path / "processes")["0.json"]["step"] == 2


def test_only_what_has_changed_is_written(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(boards.files, "write_text", lambda path, text, **_: written.append(path))
    board = boards.Board(str(tmp_path))
    for step in (1, 1, 2):
        board.show([{"process": 0, "step": step}, {"process": 1, "step": 1}])
        board.finish(10.0)
    assert sorted(path.name for path in written) == ["0.json", "0.json", "1.json"]


def test_slow_disk_holds_nobody_up_and_gets_the_latest_at_last(tmp_path, monkeypatch):
    freed, real = threading.Event(), boards.files.write_text

    def slow(path, text, **how):
        freed.wait(10.0)
        real(path, text, **how)

    monkeypatch.setattr(boards.files, "write_text", slow)
    board = boards.Board(str(tmp_path))
    for step in range(50):
        board.show([{"process": 0, "step": step}, {"process": 1, "step": step}])
    board.finish(0.0)
    assert _read(tmp_path) == {}
    freed.set()
    board.finish(10.0)
    assert [post["step"] for post in _read(tmp_path).values()] == [49, 49]


def test_disk_that_refuses_does_not_end_the_watch(tmp_path):
    (tmp_path / "file").write_text("")
    board = boards.Board(str(tmp_path / "file" / "processes"))
    board.show([{"process": 0}])
    board.finish(10.0)
    board.show([{"process": 0}])
    board.finish(10.0)
    assert (tmp_path / "file").read_text() == ""
