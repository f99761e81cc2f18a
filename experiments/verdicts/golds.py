"""Reference answers of public datasets, each distinct one once."""

import pathlib
import tempfile
from typing import NamedTuple

from luspo_jax.datasets import load


class Gold(NamedTuple):
    """A reference answer: the dataset, the number of its first problem there, and the text."""

    set: str
    id: int
    text: str


# Set → (name of its reader, its files below the folder of test data).
SETS = {
    "dapo_math_17k": ("dapo_math_17k", ("math_train/dapo17k/dapo_math_17k.parquet",)),
    "math500": ("math500", ("math_eval/math500/test.jsonl",)),
    "olympiadbench": ("olympiadbench", ("math_eval/olympiadbench/test.jsonl",)),
    "minerva_math": ("minerva_math", ("math_eval/minerva_math/test.jsonl",)),
    "gsm8k": ("gsm8k", ("math_eval/gsm8k/test.jsonl", "math_eval/gsm8k/train.jsonl")),
}


def golds(name: str, data: pathlib.Path) -> list[Gold]:
    """Returns the distinct answers of a set, in order of first appearance."""
    reader, files = SETS[name]
    found: dict[str, Gold] = {}
    with tempfile.TemporaryDirectory() as cache:
        for file in files:
            examples, _ = load(reader, data / file, data_dir=cache)
            for example in examples:
                found.setdefault(example.answer, Gold(name, example.id, example.answer))
    return list(found.values())
