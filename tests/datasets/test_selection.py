"""Which files are meant: patterns against glob itself, names of parts, and the lines of a card."""

import glob
import os

import pytest

from luspo_jax.datasets.example import DataError
from luspo_jax.datasets.selection import chosen, matching

NAMES = [
    "README.md", "a.jsonl", "b.json", "data/train-00000-of-00002.parquet",
    "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet", "x/deep/er/c.jsonl",
    "x/[odd].jsonl", "x/a.jsonl",
]  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    ["*", "*.jsonl", "**/*.jsonl", "data/*", "data/train-*", "**", "x/**/*.jsonl", "?.json*",
     "data/t[er]*", "data/t[!r]*", "x/[[]odd].jsonl", "nothing*", "data/train-0000[0-1]-of-*"],
)  # fmt: skip
def test_a_pattern_matches_what_globs_do(tmp_path, pattern):
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = glob.glob(str(tmp_path / pattern), recursive=True)
    expected = sorted(os.path.relpath(f, tmp_path) for f in found if os.path.isfile(f))
    assert matching(NAMES, pattern) == expected


def test_the_parts_of_a_split_are_one_table():
    assert chosen(NAMES, "p", "train", "") == NAMES[3:5]
    assert chosen(NAMES, "p", "test", "") == NAMES[5:6]
    assert chosen(["train_1.jsonl", "train_0.jsonl"], "p", "train", "") == [
        "train_0.jsonl", "train_1.jsonl"
    ]  # fmt: skip


def test_several_tables_are_told_apart_by_their_subset():
    names = ["main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"]
    with pytest.raises(DataError, match=r"2 files fit split 'train'.*data\.subset: main/.*socrat"):
        chosen(names, "hub:o/n", "train", "")
    assert chosen(names, "hub:o/n", "train", "socratic") == names[1:]
    with pytest.raises(DataError, match="0 files fit split 'train' of subset 'x'"):
        chosen(names, "hub:o/n", "train", "x")
    with pytest.raises(DataError, match=r"0 files fit split 'test'.*main/train"):
        chosen(names, "hub:o/n", "test", "")


def _chosen(front, names=NAMES, split="train", subset=""):
    return chosen(names, "hub:o/n", split, subset, lambda: f"---\n{front}\n---\n# Card\n")


LISTED = """configs:
- config_name: big
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: [data/test-*, a.jsonl]
- config_name: small
  data_files: "*.jsonl"
"""


def test_the_card_says_which_files_are_meant():
    assert _chosen(LISTED, subset="big") == NAMES[3:5]
    assert _chosen(LISTED, subset="big", split="test") == [NAMES[5], "a.jsonl"]
    assert _chosen(LISTED, subset="small") == ["a.jsonl"]
    with pytest.raises(DataError, match=r"several subsets: set data\.subset to big or small"):
        _chosen(LISTED)
    with pytest.raises(DataError, match=r"no subset 'bug'; did you mean 'big'\?"):
        _chosen(LISTED, subset="bug")
    with pytest.raises(DataError, match=r"no split 'tests' of subset 'big'; did you mean 'test'"):
        _chosen(LISTED, subset="big", split="tests")


@pytest.mark.parametrize("line", ["  default: true", ""])
def test_a_default_subset_needs_no_name(line):
    front = LISTED.replace("config_name: big", f"config_name: {'big' if line else 'default'}")
    assert _chosen(front.replace("big\n", f"big\n{line}\n")) == NAMES[3:5]


def test_files_that_the_card_names_and_nobody_reads_are_refused():
    with pytest.raises(DataError, match="its card names data/none-"):
        _chosen("configs:\n- config_name: a\n  data_files: data/none-*")


@pytest.mark.parametrize("front", ["license: mit", "a: [", "- x", "configs: 3", "configs: [x, {}]"])
def test_a_card_that_says_nothing_leaves_it_to_the_names(front):
    assert _chosen(front) == NAMES[3:5]
    assert chosen(NAMES, "p", "train", "", lambda: "no front matter") == NAMES[3:5]
