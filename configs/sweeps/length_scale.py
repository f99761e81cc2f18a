"""Length scales on the quickstart task, all with the same ratio, clip range and aggregation.

Command : python -m experiments.sweep --sweep=configs/sweeps/length_scale.py --workdir=/tmp/scales \
            --parallel=2
Hardware: two CPU cores
"""

from experiments.sweeps.spec import Outcome, Sweep

MEAN_LENGTH = 17.7  # tokens; the base policy's (see its README)


def get_sweep():
    return Sweep(
        base="configs/quickstart.py",
        fixed={"num_steps": 30, "output.tensorboard": False, "output.export": False},
        axes={
            "scale": {
                "none (GSPO)": {"objective.length_scale": "none"},
                "power 0.5": {
                    "objective.length_scale": "power",
                    "objective.length_alpha": 0.5,
                    "objective.reference_length": MEAN_LENGTH,
                },
                "length (LUSPO)": {},
                "length / L_ref": {
                    "objective.length_scale": "power",
                    "objective.reference_length": MEAN_LENGTH,
                },
                "relative to group": {"objective.length_scale": "relative-group"},
                "VL-Norm 0.75": {
                    "objective.length_scale": "vl-norm",
                    "objective.length_alpha": 0.75,
                },
                "capped at 20": {
                    "objective.length_scale": "capped",
                    "objective.length_cap": 20.0,
                },
            }
        },
        seeds=(0, 1, 2),
        baseline={"scale": "none (GSPO)"},
        outcomes=(
            Outcome("accuracy", "val-core/*"),
            Outcome("length", "val-aux/*/response_length/mean"),
            Outcome("accuracy curve", "reward", "auc"),
            Outcome("clipped", "actor/pg_clipfrac", "mean"),
        ),
    )
