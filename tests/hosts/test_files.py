"""What a user named is written whole or not at all, and nothing else is touched."""

import os
import subprocess
import sys

import pytest

from luspo_jax.hosts import files
from luspo_jax.hosts.files import MARK, PlaceError


def _write(folder, names, **options):
    with files.new_folder(folder, **options) as partial:
        for name in names:
            (partial / name).write_text("ours")


def _fail_in(context, *inside):
    with context as scratch:
        scratch.joinpath(*inside).write_text("half")
        raise ZeroDivisionError


def _listed(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_new_folder_appears_whole_and_is_marked(tmp_path):
    _write(tmp_path / "a" / "out", ["model"])
    assert _listed(tmp_path / "a" / "out") == [MARK, "model"]
    assert _listed(tmp_path / "a") == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    _write(tmp_path / "out", ["model"])
    assert "model" in _listed(tmp_path / "out")


@pytest.mark.parametrize("overwrite", [None, False, True])
def test_a_folder_of_others_is_refused_and_untouched(tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(PlaceError, match=r"--out=.*not empty"):
        _write(tmp_path, ["model"], overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert _listed(tmp_path) == ["thesis.txt"]


def test_replacing_takes_away_what_we_wrote_and_nothing_else(tmp_path):
    _write(tmp_path / "out", ["model", "old"])
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(PlaceError, match="pass --overwrite"):
        _write(tmp_path / "out", ["model"], overwrite=False)
    _write(tmp_path / "out", ["model", "new"], overwrite=True)
    assert _listed(tmp_path / "out") == [MARK, "model", "new", "notes.txt"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    _write(tmp_path / "out", ["model"])
    with pytest.raises(ZeroDivisionError):
        _fail_in(files.new_folder(tmp_path / "out", overwrite=True), "half")
    assert _listed(tmp_path / "out") == [MARK, "model"]
    assert _listed(tmp_path) == ["out"]


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "table.md"
    files.write_new(path, "one")
    with pytest.raises(PlaceError, match=r"--out=.*table.md exists already"):
        files.write_new(path, "two")
    assert path.read_text() == "one"
    files.write_new(path, "two", overwrite=True)
    assert path.read_text() == "two"
    with pytest.raises(ZeroDivisionError):
        _fail_in(files.replacing(path))
    assert path.read_text() == "two"
    assert _listed(tmp_path) == ["table.md"]


def test_a_folder_named_as_a_file_and_a_file_named_as_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(PlaceError, match="is a file: name a folder"):
        files.check_folder(tmp_path / "file")
    with pytest.raises(PlaceError, match="is no file"):
        files.check_file(tmp_path, flag="--out")
    with pytest.raises(PlaceError, match=r"cannot be made: .*file is a file"):
        files.check_folder(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_place_that_is_not_writable_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PlaceError, match="not writable"):
        files.check_folder(tmp_path / "out")


def test_a_folder_is_kept_for_one_process(tmp_path):
    code = "import sys; from luspo_jax.hosts import files; files.take_lock(sys.argv[1])"
    with files.locked(tmp_path / "run"):
        with pytest.raises(PlaceError, match="in use by another process"):
            files.take_lock(tmp_path / "run")
        found = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True
        )
        assert "in use by another process" in found.stderr
    files.take_lock(tmp_path / "run").close()


def test_results_go_only_into_folders_of_their_kind(tmp_path):
    files.check_own(tmp_path, ours=["manifest.json"], what="evaluation")
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "notes").write_text("mine")
    files.check_own(tmp_path, ours=["manifest.json"], what="evaluation")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(PlaceError, match="not empty and holds no evaluation"):
        files.check_own(tmp_path, ours=["manifest.json"], what="evaluation")
