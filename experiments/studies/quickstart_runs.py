"""What studies on the quickstart's tasks have in common: tasks, base, quiet output, outcomes."""

from experiments.sweeps.spec import Outcome

BASE = "configs/quickstart.py"
TUNING_SEEDS = (100, 101)  # of learning rates: no study has them among its own
ACCURACY = "val-core/*"
LENGTH = "val-aux/*/response_length/mean"

# Longer answers are better in sums, the quickstart's task; in lookup they are not, and some are
# much longer than others.
TASKS = {
    "sums": {},
    "lookup": {"model.path": "embedded:label_lookup", "data.name": "label_lookup"},
}
REFERENCE_LENGTH = {"sums": 17.7, "lookup": 10.7}  # tokens; means of the embedded bases

# Nothing but metrics is written.
METRICS_ALONE = {
    "output.tensorboard": False,
    "output.export": False,
    "output.dump_every": 0,
    "output.checkpoint_every": 0,
    "output.keep_best": 0,
}

HELD_OUT = (
    Outcome("accuracy area", ACCURACY, "auc"),
    Outcome("last accuracy", ACCURACY),
    Outcome("length area", LENGTH, "auc"),
    Outcome("last length", LENGTH),
)
CLIPPED = Outcome("clipped", "actor/pg_clipfrac", "mean")
