"""Agreement of the verifiers with public sets of labelled answers.

    python -m experiments.score_oracles --data=../shared/data/oracles

Prints, for each set found in the folder, agreement, precision and recall on the answers labelled
right, and verdicts a second, then every disagreement. A label is no proof: some sets carry the
quirks of the program that wrote them.
"""

import collections
import json
import pathlib
import time
from collections.abc import Iterator

from absl import app, flags

from luspo_jax.rewards import Reward, Sample, Scorer

_DATA = flags.DEFINE_string("data", "../shared/data/oracles", "folder of the labelled sets")
_WORKERS = flags.DEFINE_integer("workers", None, "worker processes; by default one a core")
_SHOWN = flags.DEFINE_integer("shown", 40, "disagreements printed for each set")

Labelled = Iterator[tuple[Sample, bool]]


def _lines(path: pathlib.Path) -> Iterator[dict]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def gsm8k_openai(folder: pathlib.Path) -> Labelled:
    """Solutions of four models to GSM8K's test problems, which end on a line `A: number`."""
    for row in _lines(folder / "example_model_solutions.jsonl"):
        for value in row.values():
            if isinstance(value, dict):
                yield Sample(value["solution"], row["ground_truth"]), value["is_correct"]


def nemo_pairs(folder: pathlib.Path) -> Labelled:
    """Pairs of answers from NeMo-Skills' tests."""
    for row in _lines(folder / "math_equal_pairs.jsonl"):
        yield Sample(str(row["b"]), str(row["a"])), row["expected"]


def nemo_samples(folder: pathlib.Path) -> Labelled:
    """Three solutions of a model to each of 50 MATH problems."""
    for path in sorted(folder.glob("output-rs*.jsonl")):
        for row in _lines(path):
            yield Sample(row["generation"], row["expected_answer"]), row["symbolic_correct"]


def math_verify(folder: pathlib.Path) -> Labelled:
    """Pairs of answers from Math-Verify's tests."""
    for row in _lines(folder / "pairs.jsonl"):
        yield Sample(row["pred"], row["gold"]), bool(row["expected"])


def olympiadbench(folder: pathlib.Path) -> Labelled:
    """OlympiadBench's scoring examples; some allow an absolute error."""
    for group in json.loads((folder / "scoring_examples.json").read_text(encoding="utf-8")):
        for row in group["Ans"]:
            yield Sample(row["answer"], group["GT"], meta=row), row["equal"]


def rho(folder: pathlib.Path) -> Labelled:
    """A 7B model's solutions to MATH500, scored by its authors."""
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


def score(name: str, data: pathlib.Path, workers: int | None = None):
    """(samples, labels, rewards, seconds) of one set."""
    folder, reader, verifier, options = SETS[name]
    samples, labels = zip(*reader(data / folder), strict=True)
    with Scorer(
        {verifier: 1.0}, options={verifier: options}, workers=workers, max_failure_rate=1.0
    ) as scorer:
        scorer.score_batch([Sample("1", "1")] * 64)  # start the workers
        start = time.perf_counter()
        rewards = scorer.score_batch(samples)
        return samples, labels, rewards, time.perf_counter() - start


def agreement(labels, rewards: list[Reward]) -> dict[str, float]:
    """Counts, and precision and recall on the answers that are labelled right."""
    found = [reward.value > 0 for reward in rewards]
    hits = sum(label and value for label, value in zip(labels, found, strict=True))
    return {
        "total": len(labels),
        "agree": sum(bool(a) == b for a, b in zip(labels, found, strict=True)),
        "precision": hits / max(1, sum(found)),
        "recall": hits / max(1, sum(map(bool, labels))),
    }


def _print(name: str, data: pathlib.Path) -> None:
    samples, labels, rewards, seconds = score(name, data, _WORKERS.value)
    figures = agreement(labels, rewards)
    statuses = dict(collections.Counter(reward.status for reward in rewards))
    print(
        f"{name}: {figures['agree']} of {figures['total']} agree, "
        f"precision {figures['precision']:.4f}, recall {figures['recall']:.4f}, "
        f"{len(labels) / seconds:.0f} verdicts/s, {statuses}"
    )
    rows = zip(samples, labels, rewards, strict=True)
    wrong = [row for row in rows if bool(row[1]) != (row[2].value > 0)]
    for sample, label, reward in wrong[: _SHOWN.value]:
        print(
            f"    labelled {'right' if label else 'wrong'}: gold {sample.answer[-60:]!r}, ", end=""
        )
        print(f"answer {reward.prediction!r} ({reward.status}), text {sample.response[-80:]!r}")


def main(argv) -> None:
    del argv
    data = pathlib.Path(_DATA.value)
    present = [name for name, (folder, *_) in SETS.items() if (data / folder).is_dir()]
    if not present:
        raise SystemExit(f"--data={data} holds none of {', '.join(SETS)}")
    for name in present:
        _print(name, data)


if __name__ == "__main__":
    app.run(main)
