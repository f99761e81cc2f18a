"""A small made-up run whose figures can be counted by hand."""

import dataclasses
import json

from luspo_jax.metrics import RolloutRecord, json_line

TRAP = "<script>alert('x')</script> & [red]not red[/red] :smile: \x1b[31mred\x1b[0m\x07\u202eevil"


def record(problem, sample, *, value=1.0, length=4, advantage=0.0, **fields):
    """A response; `value` is that of its part `exact`, beside a part `form` of 0.5."""
    known = {
        "prompt_id": problem,
        "sample_id": sample,
        "prompt": f"What is {problem}?",
        "response": f"It is {problem}, I say, sample {sample}",
        "answer": str(problem),
        "tokens": list(range(length)),
        "reward": value + 0.5,
        "parts": {"exact": value, "form": 0.5},
        "status": "ok",
        "prediction": str(problem),
        "advantage": advantage,
        "length": length,
        "truncated": False,
    }
    return RolloutRecord(**(known | fields))


# Problem → samples of each step; problem 9 was judged wrong, then in part right.
STEPS = {
    1: [
        record(9, 0, value=0.0, length=5),
        record(9, 1, value=0.0, length=7),
        record(8, 0, length=3),
        record(8, 1, length=3),
    ],
    2: [
        record(9, 0, length=10, advantage=0.7),
        record(9, 1, value=0.0, length=40, advantage=-0.7, truncated=True),
        record(8, 0, length=2),
        record(8, 1, length=6, response="the NEEDLE is here"),
        record(7, 0, value=0.0, length=8, status="timeout"),
        record(7, 1, value=0.0, length=9, status="unparsed", prediction=None),
    ],
    10: [
        record(7, 0, value=0.0, length=1),
        record(7, 1, value=0.0, length=2, response=TRAP),
    ],
}
CONFIG = {
    "eval.metric": "exact",
    "reward.parts.exact": 1.0,
    "reward.parts.form": 1.0,
    "output.dump_every": 1,
}


def write_run(folder, steps=STEPS, config=CONFIG):
    """Writes a run; returns its folder."""
    (folder / "rollouts").mkdir(parents=True)
    for number, records in steps.items():
        text = "".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in records)
        (folder / "rollouts" / f"step_{number:06d}.jsonl").write_text(text, encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"config": config}))
    rows = [json_line(step, {"val-core/toy/acc/mean@4": 0.625}) for step in steps]
    (folder / "metrics.jsonl").write_text("".join(rows))
    return folder
