"""Which file of a hub repository is meant; nothing is downloaded."""

import huggingface_hub
import pytest

from luspo_jax import datasets
from luspo_jax.datasets import DataError

FILES = ["README.md", "main/train-00000.parquet", "main/test.jsonl", "socratic/test.jsonl"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A repository of FILES whose every file holds one problem."""
    asked = []

    def download(*, filename, repo_id, repo_type, revision):
        asked.append((repo_id, repo_type, revision, filename))
        path = tmp_path / filename.replace("/", "_")
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
    assert hub == []


@pytest.mark.parametrize("path", ["hub:gsm8k", "hub:", "hub:/x"])
def test_a_repository_needs_an_owner_and_a_name(path, tmp_path):
    with pytest.raises(DataError, match="hub:OWNER/NAME"):
        datasets.load("gsm8k", path, data_dir=tmp_path)


def test_no_network_is_one_message(monkeypatch, tmp_path):
    def fail(**_):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(DataError, match=r"cannot be downloaded \(OSError: no route\)"):
        datasets.load("gsm8k", "hub:openai/gsm8k/main/test.jsonl", data_dir=tmp_path)
