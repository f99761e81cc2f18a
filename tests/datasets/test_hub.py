"""Which files of a hub repository are meant; nothing is downloaded."""

import json
import pathlib
import sys

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from luspo_jax import datasets
from luspo_jax.datasets import DataError
from luspo_jax.datasets.streamed import write_rows

CARD = "a card without lines on files"
FILES = ["README.md", "main/train-00000.parquet", "main/test.jsonl", "socratic/test.jsonl"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A repository of FILES whose every file holds one problem."""
    asked = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def download(*, filename, repo_id, repo_type, revision):
        asked.append((repo_id, repo_type, revision, filename))
        path = tmp_path / filename.replace("/", "_")
        if path.suffix == ".md":
            path.write_text(CARD)
        elif path.suffix == ".parquet":
            row = {"question": [f"{filename}?"], "answer": ["so\n#### 3"]}
            pyarrow.parquet.write_table(pyarrow.table(row), path)
        else:
            path.write_text('{"question": "1+1?", "answer": "so\\n#### 2"}\n')
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda **_: FILES)
    return asked


def test_a_named_file_is_downloaded_at_its_revision(hub, tmp_path):
    path = "hub:openai/gsm8k@abc/main/test.jsonl"
    examples, report = datasets.load("gsm8k", path, "test", data_dir=tmp_path / "built")
    assert hub == [("openai/gsm8k", "dataset", "abc", "main/test.jsonl")]
    assert (examples[0].answer, report.rows) == ("2", 1)


def test_several_files_for_a_split_are_listed(hub, tmp_path):
    with pytest.raises(DataError, match=r"2 files fit split 'test'.*main/test.jsonl, socratic"):
        datasets.load("gsm8k", "hub:openai/gsm8k", "test", data_dir=tmp_path)
    assert {name for *_, name in hub} == {"README.md"}


@pytest.mark.parametrize("path", ["hub:gsm8k", "hub:", "hub:/x"])
def test_a_repository_needs_an_owner_and_a_name(path, tmp_path):
    with pytest.raises(DataError, match="hub:OWNER/NAME"):
        datasets.load("gsm8k", path, data_dir=tmp_path)


def test_no_network_is_one_message(monkeypatch, tmp_path):
    def fail(**_):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"cannot be downloaded \(OSError: no route\)"):
        datasets.load("gsm8k", "hub:openai/gsm8k", "test", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"cannot be downloaded \(OSError: no route\)"):
        datasets.load("gsm8k", "hub:openai/gsm8k/main/test.jsonl", data_dir=tmp_path)


def _load(path, tmp_path, split="train", **selection):
    selection = datasets.Selection(**selection)
    return datasets.load("gsm8k", path, split, data_dir=tmp_path / "built", selection=selection)


def test_a_subset_and_a_split_are_found_by_name(hub, tmp_path):
    examples, report = _load("hub:openai/gsm8k", tmp_path, "test", subset="socratic")
    assert next(iter(examples)).answer == "2"
    assert hub[-1][-1] == "socratic/test.jsonl"
    assert report.source == "socratic_test.jsonl"
    _load("hub:openai/gsm8k/main", tmp_path, "test")
    assert hub[-1][-1] == "main/test.jsonl"


PARTS = [f"data/train-{n:05d}-of-00003.parquet" for n in range(3)]


@pytest.fixture
def parts(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda **_: ["README.md", *PARTS])
    return hub


@pytest.mark.parametrize(
    "path", ["hub:o/n", "hub:o/n/data", "hub:o/n/data/*.parquet", "hub:o/n/**"]
)
def test_several_files_are_one_table(parts, tmp_path, path):
    examples, report = _load(path, tmp_path)
    assert [e.problem for e in examples] == [f"{name}?" for name in PARTS]
    assert (report.rows, report.source) == (3, f"{PARTS[0].replace('/', '_')} and 2 more")
    assert len(report.sha256) == 64


def test_a_limit_downloads_no_more_files_than_it_needs(parts, tmp_path):
    examples, _ = _load("hub:o/n/data/*", tmp_path, limit=2)
    assert [e.problem for e in examples] == [f"{name}?" for name in PARTS[:2]]
    assert [name for *_, name in parts] == PARTS[:2]
    whole, _ = _load("hub:o/n/data/*", tmp_path)
    assert len(whole) == 3


def test_a_pattern_that_matches_nothing_shows_what_there_is(parts, tmp_path):
    with pytest.raises(
        DataError, match=r"no .*\.parquet file of the repository matches; it has RE"
    ):
        _load("hub:o/n/data/*.jsonl", tmp_path)


def test_what_was_listed_before_is_read_without_a_network(parts, tmp_path, monkeypatch):
    _load("hub:o/n", tmp_path)

    def fail(**_):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    examples, _ = _load("hub:o/n", tmp_path)
    assert len(examples) == 3
    with pytest.raises(DataError, match="no route"):
        _load("hub:o/other", tmp_path)


class _Stream:
    """What `datasets.load_dataset` returns, of rows that are made when they are read."""

    def __init__(self, read, value=None):
        self._read, self._value = read, value

    def take(self, count):
        for n in range(count):
            self._read.append(n)
            yield {"question": f"q{n}", "answer": f"#### {n}", "more": self._value}


@pytest.fixture
def stream(monkeypatch, tmp_path):
    """A package `datasets`; returns (what was asked for, the rows that were read)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked, read = [], []

    class Package:
        value = None

        @classmethod
        def load_dataset(cls, *arguments, **options):
            asked.append((arguments, options))
            return _Stream(read, cls.value)

    monkeypatch.setitem(sys.modules, "datasets", Package)
    return asked, read, Package


def test_a_stream_is_read_once_and_no_further_than_its_limit(stream, tmp_path):
    asked, read, _ = stream
    for _ in range(2):
        examples, report = _load(
            "hub:o/n@rev", tmp_path, limit=5, streaming=True, subset="s", filter="question != 'q1'"
        )
        assert [e.answer for e in examples] == ["0", "2", "3", "4"]
        assert (report.rows, report.filtered) == (4, 1)
    assert read == list(range(5))
    options = {"split": "train", "streaming": True, "revision": "rev"}
    assert asked == [(("o/n", "s"), options)]
    (file,) = (tmp_path / "cache").rglob("streamed/*")
    assert [json.loads(line)["question"] for line in file.open()] == [f"q{n}" for n in range(5)]


@pytest.mark.parametrize(
    ("path", "selection", "message"),
    [
        ("hub:o/n", {}, "set data.limit"),
        ("hub:o/n/data/x.parquet", {"limit": 2}, "reads a repository, hub:OWNER/NAME"),
        ("x.jsonl", {"limit": 2}, "data.streaming is of hub:OWNER/NAME"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(stream, tmp_path, path, selection, message):
    with pytest.raises(DataError, match=message):
        _load(path, tmp_path, streaming=True, **selection)


def test_a_stream_that_breaks_leaves_nothing(stream, tmp_path):
    _, _, package = stream
    package.value = b"bytes"
    with pytest.raises(DataError, match=r"o/n, row 1: holds what no line of JSON does.*download"):
        _load("hub:o/n", tmp_path, limit=2, streaming=True)
    package.load_dataset = lambda *_, **__: 1 / 0
    with pytest.raises(DataError, match=r"hub:o/n, split 'train': cannot be streamed \(ZeroDiv"):
        _load("hub:o/n", tmp_path, limit=2, streaming=True)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_stream_without_the_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'luspo_jax\[datasets\]'"):
        _load("hub:o/n", tmp_path, limit=2, streaming=True)


def test_the_package_itself_streams_a_folder(tmp_path):
    pytest.importorskip("datasets", reason="needs the extra datasets")
    lines = [json.dumps({"question": f"q{n}", "answer": n, "list": [{"a": n}]}) for n in range(9)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines) + "\n")
    file = pathlib.Path(tmp_path / "rows.jsonl")
    write_rows(file, str(tmp_path / "data"), "train", datasets.Selection(limit=4))
    assert [json.loads(line) for line in file.open()] == [json.loads(line) for line in lines[:4]]
