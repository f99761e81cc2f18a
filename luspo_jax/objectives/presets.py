"""Named objectives from the literature, each a choice on four axes; constants with their sources.

Each is a plain `Objective`: `preset("luspo", clip_high=0.003)` changes a field it reads.
"""

import dataclasses

from luspo_jax.objectives.advantages import ADVANTAGES
from luspo_jax.objectives.aggregation import AGGREGATIONS
from luspo_jax.objectives.corrections import CORRECTIONS
from luspo_jax.objectives.length_scales import LENGTH_SCALES
from luspo_jax.objectives.objective import Objective, hyperparameters, require_name
from luspo_jax.objectives.ratios import RATIOS
from luspo_jax.objectives.shapings import SHAPINGS
from luspo_jax.objectives.surrogates import SURROGATES

GRPO = Objective()  # arXiv 2402.03300; clip 0.2 and no KL as verl's default
GSPO = Objective(ratio="sequence", clip_low=3e-4, clip_high=4e-4)  # arXiv 2507.18071
# arXiv 2602.05261 Eq 7, clip from its §5.1.
LUSPO = dataclasses.replace(GSPO, length_scale="length", clip_low=2e-3, clip_high=2.5e-3)
TOKEN_MEAN = dataclasses.replace(GRPO, aggregation="token-mean")
# arXiv 2503.20783
DR_GRPO = dataclasses.replace(GRPO, advantage="none", aggregation="seq-mean-token-sum-norm")
# GSPO with LUSPO's clip: the base of the controls, which then differ in weighting alone.
GSPO_WIDE = dataclasses.replace(LUSPO, length_scale="none")

PRESETS: dict[str, Objective] = {
    "grpo": GRPO,
    "bnpo": TOKEN_MEAN,  # TRL divides by the micro-batch's tokens, this by the optimizer step's
    "dapo": dataclasses.replace(TOKEN_MEAN, clip_high=0.28),  # arXiv 2503.14476
    "dr_grpo": DR_GRPO,
    "gspo": GSPO,
    "gspo_token": dataclasses.replace(GSPO, ratio="sequence-token"),
    "luspo": LUSPO,
    "sapo": Objective(surrogate="sapo"),  # arXiv 2511.20347
    "cispo": Objective(surrogate="cispo", aggregation="token-mean"),  # arXiv 2506.13585
    "gmpo": Objective(surrogate="gmpo"),  # arXiv 2507.20673
    "vespo": Objective(  # arXiv 2602.10693
        ratio="sequence-product", surrogate="vespo", aggregation="token-mean"
    ),
    # arXiv 2602.04879; no standard deviation, as in verl's example script.
    "dppo_tv": dataclasses.replace(DR_GRPO, surrogate="dppo-tv"),
    "dppo_kl": dataclasses.replace(DR_GRPO, surrogate="dppo-kl"),
    "rloo": dataclasses.replace(TOKEN_MEAN, advantage="rloo"),  # verl
    "maxrl": dataclasses.replace(TOKEN_MEAN, advantage="maxrl"),  # tajwarfahim/maxrl
    "opo": dataclasses.replace(TOKEN_MEAN, advantage="opo"),  # verl
    "reinforce_pp_baseline": dataclasses.replace(  # verl
        TOKEN_MEAN, advantage="reinforce-pp-baseline"
    ),
    "minirl": Objective(  # arXiv 2512.01374
        surrogate="minirl",
        advantage="none",
        aggregation="token-sum",
        clip_low=0.2,
        clip_high=0.27,
    ),
    # The band of the clip, and what is between token and sequence.
    # arXiv 2509.09177; its c is not known: GSPO's band at a response of 1,000 tokens.
    "fspo": dataclasses.replace(GSPO, clip_length_exponent=0.5, reference_length=1000.0),
    "soft_sequence": Objective(surrogate="soft-sequence"),  # arXiv 2602.19327
    "dhpo": Objective(surrogate="dhpo"),  # arXiv 2601.05607
    # HISPO (KAIST 2026) and SSPO (arXiv 2511.04256); their ε are not known: LUSPO's.
    "hispo": dataclasses.replace(GSPO_WIDE, ratio="segment"),
    "sspo": dataclasses.replace(GSPO_WIDE, ratio="segment", segment_by="sentence"),
    # Baselines and advantages.
    "lite_ppo": dataclasses.replace(TOKEN_MEAN, advantage="batch-std"),  # arXiv 2508.08221
    "otb": dataclasses.replace(TOKEN_MEAN, advantage="otb"),  # arXiv 2602.07078
    "gdpo": dataclasses.replace(GRPO, advantage="gdpo", advantage_epsilon=1e-4),  # arXiv 2601.05242
    "qglas": dataclasses.replace(GRPO, advantage_shaping="qglas"),
    "intern_s2": dataclasses.replace(GRPO, advantage_shaping="intern-s2"),
    "lambda_grpo": dataclasses.replace(GRPO, length_scale="lambda-grpo"),  # arXiv 2510.06870
    # Other length weightings, and controls that the LUSPO paper lacks.
    # arXiv 2509.07558; constants of its math run (α 1 for CountDown).
    "vl_norm": Objective(length_scale="vl-norm", length_alpha=0.75, clip_high=0.3),
    "gspo_token_mean": dataclasses.replace(GSPO_WIDE, aggregation="token-mean"),
    "gspo_dr_grpo_constant": dataclasses.replace(GSPO_WIDE, aggregation="seq-mean-token-sum-norm"),
    # LUSPO / L_ref: set `reference_length` to the base policy's mean response length.
    "luspo_normalized": dataclasses.replace(LUSPO, length_scale="power", reference_length=1000.0),
    "luspo_opo": dataclasses.replace(LUSPO, advantage="opo"),
    "grpo_unclipped": Objective(surrogate="unclipped"),
    "gspo_unclipped": Objective(ratio="sequence", surrogate="unclipped"),
    "luspo_unclipped": Objective(ratio="sequence", surrogate="unclipped", length_scale="length"),
}


def axis_functions(objective: Objective) -> dict[str, object]:
    """Returns the functions of an objective, keyed by the field that names them."""
    chosen = {
        "ratio": RATIOS[objective.ratio],
        "surrogate": SURROGATES[objective.surrogate],
        "length_scale": LENGTH_SCALES[objective.length_scale],
        "aggregation": AGGREGATIONS[objective.aggregation],
        "advantage": ADVANTAGES[objective.advantage],
        "advantage_shaping": SHAPINGS[objective.advantage_shaping],
    }
    return chosen | {f"correction {name}": CORRECTIONS[name] for name in objective.corrections}


def used_hyperparameters(objective: Objective) -> tuple[str, ...]:
    """Returns the hyperparameters that the objective's functions read, in the order of the axes."""
    names = [n for f in axis_functions(objective).values() for n in hyperparameters(f)]
    if objective.clip_length_exponent > 0:
        names += ["clip_length_exponent", "reference_length"]
    if objective.ratio == "segment":
        names += ["segment_by"] + ["segment_share"] * objective.cuts_by_entropy
    return tuple(dict.fromkeys(names))


def preset(name: str, **overrides) -> Objective:
    """Returns the named objective with some fields changed.

    Raises:
      ValueError: an unknown preset or field (the message lists the valid ones), or a hyperparameter
        that the resulting objective does not read. `max_response_length` is never refused: it is a
        property of the run.
    """
    require_name("Objective.preset", name, PRESETS)
    fields = [field.name for field in dataclasses.fields(Objective)]
    for field in overrides:
        require_name(f"preset({name!r})", field, fields)
    objective = dataclasses.replace(PRESETS[name], **overrides)
    tables = (RATIOS, SURROGATES, LENGTH_SCALES, AGGREGATIONS, ADVANTAGES, SHAPINGS, CORRECTIONS)
    optional = {n for table in tables for f in table.values() for n in hyperparameters(f)}
    optional |= {"segment_by", "segment_share"}
    unread = optional - set(used_hyperparameters(objective)) - {"max_response_length"}
    for field in overrides:
        if field in unread:
            raise ValueError(
                f"Objective.{field} has no effect on preset {name!r}; it reads "
                f"{', '.join(used_hyperparameters(objective)) or 'none of the axes’ settings'}."
            )
    return objective
