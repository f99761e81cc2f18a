"""Writes docs/objectives.md: every preset, its axes and constants, and every function of an axis.

`python -m experiments.objective_table [--page=docs/objectives.md]`
"""

import dataclasses
import inspect
import sys

from absl import flags

from experiments import command
from luspo_jax.hosts import files

_OUT = flags.DEFINE_string("page", "docs/objectives.md", "File to write.")
_OVERWRITE = flags.DEFINE_bool("overwrite_page", False, "Replace that file if it exists.")

AXES = ("ratio", "surrogate", "length_scale", "aggregation", "advantage", "advantage_shaping")

INTRODUCTION = """\
# Objectives

Written by `python -m experiments.objective_table` from the docstrings; edit those.

An objective is a choice on four axes, an advantage and what length does to it; a named algorithm is
a preset. The loss of
an optimizer step is

    loss_scale · (policy + kl_coef · KL) − entropy_coef · (mean entropy of a response token)

where policy and KL are aggregated alike and denominators are those of the whole step, so that
nothing depends on micro-batches, padding or row order. Any field is changed by
`preset("luspo", clip_high=0.003)` or `--config.objective.clip_high=0.003`. A row without response
tokens is no sequence and counts nowhere; what a correction drops still counts.

The loss's value does not measure learning. On-policy a clipped loss is −Σ A under the aggregation's
weights: 0 for GRPO and GSPO with centred advantages, −mean(A·L) for LUSPO. Losses that weigh log π
by a constant (CISPO, VESPO, DPPO, MiniRL) mean less still. Look at gradient norms, clip fractions
and rewards instead.

## Tokens of several policies

A step may train on tokens that earlier policies sampled, also within one response. With π the
policy being updated, π_start the one that starts the step, computed by the trainer, and π_sampler
the recorded probability under the policy that sampled the token:

| `old_policy` | π_old of an earlier policy's token | π/π_old, clipped | ρ = π_old/π_sampler |
| --- | --- | --- | --- |
| `behaviour` | π_sampler | all that has moved since | 1 |
| `decoupled` | π_start | what this step has moved | age, and sampler against trainer |

π_old of all other tokens is π_start. `decoupled` is decoupled PPO (arXiv 2110.00641): set a
`correction` with it. Under `behaviour` corrections do nothing to an earlier policy's tokens: ρ is 1
there, which also lowers `rollout_corr/kl`. A KL in the reward is that of π_old.

Where a trained token of a step is of an earlier policy, `staleness/*/age_k` measure the tokens of
each age, counted in steps (k = 0, 1, 2, 3, and 4 for 4 or more): their share, the mean of the
objective's ratio, the share clipped, the mean of log π_sampler − log π_old (`kl`), and of
π/π_sampler the mean (`weight`) and the effective sample size (Σw)²/(n Σw²) (`ess`). An age without
tokens reads 0.
"""


def page() -> str:
    """Returns the whole page as Markdown."""
    from luspo_jax.objectives.advantages import ADVANTAGES
    from luspo_jax.objectives.aggregation import AGGREGATIONS
    from luspo_jax.objectives.corrections import CORRECTIONS
    from luspo_jax.objectives.kl import KL_ESTIMATORS
    from luspo_jax.objectives.length_scales import LENGTH_SCALES
    from luspo_jax.objectives.ratios import RATIOS
    from luspo_jax.objectives.shapings import SHAPINGS
    from luspo_jax.objectives.surrogates import SURROGATES

    parts = [INTRODUCTION, "## Presets\n", preset_table()]
    tables = {
        "Ratios": RATIOS,
        "Surrogates": SURROGATES,
        "Length scales": LENGTH_SCALES,
        "Aggregations": AGGREGATIONS,
        "Advantages": ADVANTAGES,
        "Shapings of the advantage": SHAPINGS,
        "KL estimators": KL_ESTIMATORS,
        "Corrections of sampler mismatch": CORRECTIONS,
    }
    for title, table in tables.items():
        parts.append(f"## {title}\n")
        parts += [entry(name, function) for name, function in table.items()]
    parts += ["## Fields\n", field_table()]
    return "\n".join(parts)


def preset_table() -> str:
    """Returns one row per preset: its axes and the constants that it reads."""
    from luspo_jax.objectives.presets import PRESETS, used_hyperparameters

    head = ("preset", *AXES, "constants")
    rows = [head, ["---"] * len(head)]
    for name, objective in PRESETS.items():
        constants = ", ".join(
            f"{field} {value:g}" if isinstance(value, (int, float)) else f"{field} {value}"
            for field in used_hyperparameters(objective)
            if (value := getattr(objective, field)) is not None
        )
        rows.append((f"`{name}`", *(getattr(objective, axis) for axis in AXES), constants))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def entry(name: str, function) -> str:
    """Returns an axis function's docstring and the fields that it reads."""
    from luspo_jax.objectives.objective import hyperparameters

    fields = ", ".join(f"`{field}`" for field in hyperparameters(function))
    reads = f"\nReads {fields}.\n" if fields else ""
    return f"### `{name}`\n\n{inspect.getdoc(function)}\n{reads}"


def field_table() -> str:
    """Returns every field of `Objective` with its default and range."""
    from luspo_jax.objectives.objective import CHOICES, RANGES, Objective

    rows = ["| field | default | allowed |\n", "| --- | --- | --- |\n"]
    for field in dataclasses.fields(Objective):
        allowed = ", ".join(CHOICES.get(field.name, ()))
        if field.name in RANGES:
            low, high, low_allowed = RANGES[field.name]
            allowed = f"{'≥' if low_allowed else '>'} {low:g}"
            allowed += f", ≤ {high:g}" if high < float("inf") else ""
        rows.append(f"| {field.name} | {field.default} | {allowed} |\n")
    return "".join(rows)


def main() -> None:
    """Writes the page."""
    allowed = _OVERWRITE.value or _OUT.value == _OUT.default  # the page itself is generated
    files.write_new(_OUT.value, page(), flag="--page", overwrite=allowed)
    print(f"{_OUT.value} written")


if __name__ == "__main__":
    sys.exit(command.call(main))
