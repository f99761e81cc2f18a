"""Public sets of labelled answers: responses, golds, and labels of right or wrong."""

import json
import pathlib
from collections.abc import Iterator

from luspo_jax.rewards import Sample

Labelled = Iterator[tuple[Sample, bool]]


def _lines(path: pathlib.Path) -> Iterator[dict]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def gsm8k_openai(folder: pathlib.Path) -> Labelled:
    """Reads four models' solutions to GSM8K's test problems, which end on a line `A: number`."""
    for row in _lines(folder / "example_model_solutions.jsonl"):
        for value in row.values():
            if isinstance(value, dict):
                yield Sample(value["solution"], row["ground_truth"]), value["is_correct"]


def nemo_pairs(folder: pathlib.Path) -> Labelled:
    """Reads pairs of answers from NeMo-Skills' tests."""
    for row in _lines(folder / "math_equal_pairs.jsonl"):
        yield Sample(str(row["b"]), str(row["a"])), row["expected"]


def nemo_samples(folder: pathlib.Path) -> Labelled:
    """Reads three solutions of a model to each of 50 MATH problems."""
    for path in sorted(folder.glob("output-rs*.jsonl")):
        for row in _lines(path):
            yield Sample(row["generation"], row["expected_answer"]), row["symbolic_correct"]


def math_verify(folder: pathlib.Path) -> Labelled:
    """Reads pairs of answers from Math-Verify's tests."""
    for row in _lines(folder / "pairs.jsonl"):
        yield Sample(row["pred"], row["gold"]), bool(row["expected"])


def olympiadbench(folder: pathlib.Path) -> Labelled:
    """Reads OlympiadBench's scoring examples; some allow an absolute error."""
    for group in json.loads((folder / "scoring_examples.json").read_text(encoding="utf-8")):
        for row in group["Ans"]:
            yield Sample(row["answer"], group["GT"], meta=row), row["equal"]


def rho(folder: pathlib.Path) -> Labelled:
    """Reads a 7B model's solutions to MATH500, scored by its authors."""
    for row in _lines(folder / "rho-math-7b-v0.1_math500.jsonl"):
        yield Sample(row["code"][0], row["gt"]), row["score"][0]


# Name → (folder, reader, verifier, its options).
SETS = {
    "gsm8k_openai": ("gsm8k_openai", gsm8k_openai, "gsm8k", {"mark": "\nA:"}),
    "math_verify_pairs": ("math_verify_pairs", math_verify, "math_answer", {"extract": "whole"}),
    "nemo_skills_pairs": ("nemo_skills", nemo_pairs, "math_answer", {"extract": "whole"}),
    "nemo_skills_samples": ("nemo_skills", nemo_samples, "math_answer", {"extract": "final"}),
    "olympiadbench": ("olympiadbench", olympiadbench, "math_answer", {"extract": "whole"}),
    "rho_math500": ("rho", rho, "math_answer", {"extract": "final"}),
}
