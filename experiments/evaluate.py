"""Evaluates a model on benchmarks:

`python -m experiments.evaluate --model=MODEL --benchmarks=aime24,math500 --data=DIR --workdir=OUT`

MODEL is a folder in Hugging Face format, embedded:NAME, gguf:FILE, hub:OWNER/NAME, or a run's
workdir; folders and workdirs may be addresses, gs://… or s3://…. It must be a Qwen2.5-VL if
problems show images (mathvista, wemath …). Running the same command again resumes a stopped
evaluation and gives the same responses. A workdir holds every generation, results.json and
results.md. Without a model: `--rescore=OUT` judges stored generations again, `--predictions=FILE
--benchmarks=NAME` scores a file with the columns id and prediction, `--compare=A,B` gives
differences paired by problem.
"""

import ast
import pathlib
import sys

from absl import flags

from experiments import command
from luspo_jax.hosts.values import SEED

_MODEL = flags.DEFINE_string("model", "", "What to evaluate.")
_STEP = flags.DEFINE_string("step", "latest", "Checkpoint of a run: latest, best, or a number.")
_BENCHMARKS = flags.DEFINE_list("benchmarks", [], "Names, joined by commas.")
_DATA = flags.DEFINE_string("data", "", "Folder with one entry a benchmark, or name=path,…")
_DATA_OPTIONS = flags.DEFINE_string(
    "options", "", "Of the generated benchmark, as {'task': 'countdown', 'size': 200}."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of generations and results.")
_PROTOCOL = flags.DEFINE_string("protocol", "dapo", "A name of docs/evaluation.md.")
_N = flags.DEFINE_integer("n", None, "Responses a problem; unset = the protocol's.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "In place of the protocol's.")
_TOP_P = flags.DEFINE_float("top_p", None, "In place of the protocol's.")
_TOP_K = flags.DEFINE_integer("top_k", None, "In place of the protocol's; 0 = off.")
_LENGTH = flags.DEFINE_integer("max_response_length", None, "Tokens, in place of the protocol's.")
_LIMIT = flags.DEFINE_integer("limit", 0, "Only the first so many problems; 0 = all.", 0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling noise.", SEED.low, SEED.high)
_TEMPLATE = flags.DEFINE_string(
    "template", "", "A name, or a text with {problem} in it; empty = the benchmark's."
)
_CHAT = flags.DEFINE_bool(
    "template_chat", None, "Whether such a text is a message in the model's chat template."
)
_SYSTEM = flags.DEFINE_string(
    "system_prompt", None, "A system message, or the name luspo_vl; unset = the benchmark's."
)
_IMAGES = flags.DEFINE_string("image_dir", "", "Where images are: a folder, or name=folder,…")
_MIN_PIXELS = flags.DEFINE_integer("min_pixels", 0, "Of an image; 0 = the model's or run's.", 0)
_MAX_PIXELS = flags.DEFINE_integer("max_pixels", 0, "Of an image; 0 = the model's or run's.", 0)
_BLANK = flags.DEFINE_bool("blank_images", False, "Every image white: what is answered blind.")
_REFUSALS = flags.DEFINE_enum(
    "refusals", "stop", ["stop", "skip"],
    "Problems that cannot be asked (image missing or unreadable, prompt too long): stop, or leave "
    "them out and report them.",
)  # fmt: skip
_THINKING = flags.DEFINE_bool("enable_thinking", None, "Passed to the chat template if set.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of sampling.")
_SLOTS = flags.DEFINE_integer("num_slots", 64, "Most responses decoded together.", 1)
_CACHE_GB = flags.DEFINE_float(
    "cache_gb", 0.0, "Of keys and values on a device; 0 = half of what it has left.", 0.0
)
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share one copy of the weights.", 1)
_BUDGETS = flags.DEFINE_string(
    "budgets", "",
    "Tokens at which the same responses are cut and judged again, such as 1024,2048, or auto; "
    "also of a finished evaluation.",
)  # fmt: skip
_SAVE_EVERY = flags.DEFINE_integer("save_every", 0, "Problems between two saves; 0 = chosen.", 0)
_CACHE = flags.DEFINE_string("cache_dir", "", "For built datasets; empty = the user's cache.")
_WORKERS = flags.DEFINE_integer("num_workers", 2, "Processes of the scorer.", 1)
_TIMEOUT = flags.DEFINE_float("timeout_s", 10.0, "Of one verification.", 0.01)
_RESCORE = flags.DEFINE_string("rescore", "", "Folder of an evaluation to judge again.")
_PREDICTIONS = flags.DEFINE_string("predictions", "", "File of predictions to score.")
_ID = flags.DEFINE_list("id", ["id"], "Column of ids; several are joined by '/'.")
_PREDICTION = flags.DEFINE_string("prediction", "prediction", "Column of predictions.")
_COMPARE = flags.DEFINE_list("compare", [], "Two folders of evaluations: A,B.")


def main() -> None:
    """Runs the command that the flags select."""
    modes = {
        "model": _MODEL.value,
        "rescore": _RESCORE.value,
        "predictions": _PREDICTIONS.value,
        "compare": _COMPARE.value,
    }
    given = [name for name, value in modes.items() if value]
    if len(given) != 1:
        raise command.UsageError(
            "give one of --model, --rescore, --predictions and --compare"
            + (f", not {' and '.join(given)}" if given else "")
        )
    print({"model": _model, "rescore": _rescore, "compare": _compare}.get(given[0], _predict)())


def _model() -> str:
    from luspo_jax.benchmarks.registry import benchmarks

    chosen, options = benchmarks(_BENCHMARKS.value), _options()  # before anything slow
    from experiments.evaluation import session

    return session.run(_MODEL.value, chosen, _workdir(), options)


def _rescore() -> str:
    from experiments.evaluation import scoring

    return scoring.rescore(pathlib.Path(_RESCORE.value), _options())


def _predict() -> str:
    from luspo_jax.benchmarks.registry import benchmarks

    chosen, workdir = benchmarks(_BENCHMARKS.value), _workdir()
    if len(chosen) != 1:
        raise command.UsageError("--predictions answers one benchmark: --benchmarks=NAME")
    from experiments.evaluation import scoring

    return scoring.predictions(pathlib.Path(_PREDICTIONS.value), chosen[0], workdir, _options())


def _compare() -> str:
    from experiments.evaluation import comparison

    if len(_COMPARE.value) != 2:
        raise command.UsageError("--compare takes two folders: --compare=A,B")
    return comparison.compare(*map(pathlib.Path, _COMPARE.value))


def _workdir() -> pathlib.Path:
    if not _WORKDIR.value:
        raise command.UsageError("--workdir is required")
    return pathlib.Path(_WORKDIR.value)


def _dataset_options() -> dict:
    if not _DATA_OPTIONS.value:
        return {}
    try:
        options = ast.literal_eval(_DATA_OPTIONS.value)
    except (ValueError, SyntaxError):
        options = None
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise command.UsageError(
            f"--options={_DATA_OPTIONS.value} is no dictionary: write \"--options={{'task': …}}\""
        )
    return options


def _options():
    from experiments.evaluation.plan import Options
    from luspo_jax.benchmarks import protocol

    return Options(
        protocol=protocol(
            _PROTOCOL.value,
            temperature=_TEMPERATURE.value,
            top_p=_TOP_P.value,
            top_k=_TOP_K.value,
            max_response_length=_LENGTH.value,
            num_samples=_N.value,
        ),
        data=_DATA.value,
        dataset_options=_dataset_options(),
        cache_dir=_CACHE.value,
        limit=_LIMIT.value,
        seed=_SEED.value,
        template=_TEMPLATE.value,
        template_chat=_CHAT.value,
        system_prompt=_SYSTEM.value,
        image_dir=_IMAGES.value,
        min_pixels=_MIN_PIXELS.value,
        max_pixels=_MAX_PIXELS.value,
        blank_images=_BLANK.value,
        refusals=_REFUSALS.value,
        id_columns=tuple(_ID.value),
        prediction_column=_PREDICTION.value,
        enable_thinking=_THINKING.value,
        dtype=_DTYPE.value,
        tensor=_TENSOR.value,
        num_slots=_SLOTS.value,
        cache_gb=_CACHE_GB.value,
        budgets=_BUDGETS.value,
        save_every=_SAVE_EVERY.value,
        workers=_WORKERS.value,
        timeout_s=_TIMEOUT.value,
        step=_STEP.value,
    )


if __name__ == "__main__":
    sys.exit(command.call(main))
