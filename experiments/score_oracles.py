"""Agreement of the verifiers with public sets of labelled answers.

    python -m experiments.score_oracles --data=../shared/data/oracles
    python -m experiments.score_oracles --write=docs/rewards.md --overwrite

Prints, for each set found in the folder, agreement, precision and recall on the answers labelled
right, and verdicts a second, then every disagreement. A label is no proof: some sets carry the
quirks of the program that wrote them. `--write` makes the committed table, in which each
disagreement says who is right; the opinions are in oracle_reviews.tsv, beside this file.
"""

import collections
import csv
import json
import pathlib
import sys
import time
from collections.abc import Iterator

from absl import flags

from experiments import command
from luspo_jax import files
from luspo_jax.rewards import Reward, Sample, Scorer, verifier

_DATA = flags.DEFINE_string("data", "../shared/data/oracles", "folder of the labelled sets")
_WORKERS = flags.DEFINE_integer("workers", None, "worker processes; by default one a core")
_SHOWN = flags.DEFINE_integer("shown", 40, "disagreements printed for each set")
_WRITE = flags.DEFINE_string("write", None, "also write the results as this Markdown file")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace that file if it exists")
_REVIEWS = pathlib.Path(__file__).with_name("oracle_reviews.tsv")
_HEAD = """# Verifiers against labelled answers

    python -m experiments.score_oracles --write=docs/rewards.md --overwrite

wrote this. Precision and recall are of the verdict "right". A label is no proof: below, each
disagreement says who is right, and why.

Known limits of `math_answer` and `boxed_math`: `\\log` and `\\ln` are two functions; sums written
with dots, "Alice and Bob" in another order, thousands written 1.000.000 and `f(t)=t` for `f(x)=x`
are not recognised; a closed bracket at infinity, the case of a choice letter, and a wrong
calculation before the last "=" are overlooked; a decimal stands for a fraction or a root from four
correct places on.
"""

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
    folder, reader, rule, options = SETS[name]
    samples, labels = zip(*reader(data / folder), strict=True)
    with Scorer(
        {rule: 1.0}, options={rule: options}, workers=workers, max_failure_rate=1.0
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


def disagreements(samples, labels, rewards: list[Reward]) -> list[tuple[Sample, bool, Reward]]:
    """The samples whose verdict is not their label, with both."""
    rows = zip(samples, labels, rewards, strict=True)
    return [(s, bool(label), r) for s, label, r in rows if bool(label) != (r.value > 0)]


def _print(name: str, scored) -> None:
    samples, labels, rewards, seconds = scored
    figures = agreement(labels, rewards)
    statuses = dict(collections.Counter(reward.status for reward in rewards))
    print(
        f"{name}: {figures['agree']} of {figures['total']} agree, "
        f"precision {figures['precision']:.4f}, recall {figures['recall']:.4f}, "
        f"{len(labels) / seconds:.0f} verdicts/s, {statuses}"
    )
    for sample, label, reward in disagreements(samples, labels, rewards)[: _SHOWN.value]:
        print(
            f"    labelled {'right' if label else 'wrong'}: gold {sample.answer[-60:]!r}, ", end=""
        )
        print(f"answer {reward.prediction!r} ({reward.status}), text {sample.response[-80:]!r}")


def _reviews() -> dict[tuple[str, str, str], tuple[str, str]]:
    """(set, gold, answer) → (who is right, why)."""
    with _REVIEWS.open(encoding="utf-8") as lines:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {tuple(row[:3]): (row[3], row[4]) for row in rows if row and row[0][0] != "#"}


def _cell(text: str | None) -> str:
    """A short text on one line; what a table would take for its own is escaped."""
    text = " ".join((text if text is not None else "(none)").split())
    return "`" + text[-60:].replace("|", "\\|").replace("`", "'") + "`"


def _label(name: str) -> str:
    return "`" + repr(verifier(*SETS[name][2:]).label)[1:-1] + "`"


def markdown(results: dict[str, tuple]) -> str:
    """The committed table."""
    lines = [
        _HEAD,
        "| set | verifier | agree | of | precision | recall |",
        "|---|---|---|---|---|---|",
    ]
    for name, (_, labels, rewards, _) in results.items():
        figures = agreement(labels, rewards)
        lines.append(
            f"| {name} | {_label(name)} | {figures['agree']} | "
            f"{figures['total']} | {figures['precision']:.4f} | {figures['recall']:.4f} |"
        )
    lines += ["", "## Disagreements", ""]
    lines += ["| set | gold | answer | label | right is | why |", "|---|---|---|---|---|---|"]
    reviews = _reviews()
    for name, (samples, labels, rewards, _) in results.items():
        for sample, label, reward in disagreements(samples, labels, rewards):
            gold, answer = _cell(sample.answer), _cell(reward.prediction)
            who, why = reviews.get((name, gold, answer), ("open", "not reviewed"))
            stated = "right" if label else "wrong"
            lines.append(f"| {name} | {gold} | {answer} | {stated} | {who} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Scores what the folder holds, prints, and writes where asked."""
    if _WRITE.value:
        files.check_file(_WRITE.value, flag="--write", overwrite=_OVERWRITE.value)
    data = pathlib.Path(_DATA.value)
    present = [name for name, (folder, *_) in SETS.items() if (data / folder).is_dir()]
    if not present:
        raise SystemExit(f"--data={data} holds none of {', '.join(SETS)}")
    results = {}
    for name in present:
        results[name] = score(name, data, _WORKERS.value)
        _print(name, results[name])
    if _WRITE.value:
        files.write_new(_WRITE.value, markdown(results), flag="--write", overwrite=_OVERWRITE.value)


if __name__ == "__main__":
    sys.exit(command.call(main))
