"""Every field of a run's configuration: its default, and what its value may be."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from luspo_jax import objectives
from luspo_jax.datasets import DATASETS
from luspo_jax.datasets.templates import TEMPLATES
from luspo_jax.experience import shaping
from luspo_jax.experience.shaping import Shaping
from luspo_jax.learner.logprobs import REPLAYS
from luspo_jax.learner.offload import OFFLOADS
from luspo_jax.length.settings import LengthSettings
from luspo_jax.models.decoder import REMAT
from luspo_jax.ops import attention, grouped_matmul
from luspo_jax.values import SEED, TEMPERATURE, Number, OneOf, Rule, Text, nearest, refusal, shown
from luspo_jax.watchdog import BEAT_S


def default_config() -> ConfigDict:
    """A new configuration with every field there is, at its default; `configs/` fill it in."""
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 100  # Rollout steps.

    config.model = ConfigDict()
    # A folder in Hugging Face format, "embedded:NAME" for a model inside this package, or
    # "hub:OWNER/NAME" to download one.
    config.model.path = ""
    config.model.tokenizer = ""  # Folder; empty = the model's.
    # Ids, joined with commas, that end a response beside those that the model's files name; "none"
    # where nothing but the length limit may end one.
    config.model.stop_token_ids = ""
    config.model.random_weights = False  # Read config.json only and draw weights from `seed`.
    config.model.overrides = ConfigDict()  # Fields of config.json, with random_weights only.
    config.model.dtype = "float32"  # Compute dtype of training; master weights are float32.
    config.model.rollout_dtype = "float32"  # Of sampling: weights, activations and KV cache.
    config.model.remat = "none"  # What is kept for the backward pass: a key of decoder.REMAT.
    config.model.attention = "auto"  # By platform, or a name of luspo_jax.ops.attention.
    config.model.experts = "auto"  # By platform, or a name of luspo_jax.ops.grouped_matmul.
    config.model.head_chunk_tokens = 2048  # Tokens whose logits exist at one time on a device.

    # Devices of training, of all processes; one size may be -1, for as many as the others leave.
    config.mesh = ConfigDict()
    config.mesh.data = 1  # Copies of the weights.
    config.mesh.fsdp = -1  # Rows and weights cut alike; weights are gathered a layer at a time.
    config.mesh.expert = 1  # As fsdp, and experts are cut over it.
    config.mesh.context = 1  # Parts of a row.
    config.mesh.tensor = 1  # Parts of heads, mlp and vocabulary.

    # Devices of the rollout; one copy of the weights lies within a process.
    config.rollout_mesh = ConfigDict()
    config.rollout_mesh.data = -1
    config.rollout_mesh.expert = 1
    config.rollout_mesh.context = 1  # Parts of the KV cache's positions.
    config.rollout_mesh.tensor = 1

    config.data = ConfigDict()
    config.data.name = ""  # One of luspo_jax.datasets.DATASETS.
    config.data.path = ""  # Local file of a dataset that is not generated.
    config.data.split = "train"
    config.data.options = ConfigDict()  # Of a generated dataset.
    # Several sources to train on in place of `name`: a name of yours → {name, path, split, weight,
    # problem_column, answer_column, image_column, image_dir}; weight is a share of the prompts.
    config.data.mixture = ConfigDict()
    config.data.eval_name = ""  # Held-out set; empty = data.name.
    config.data.eval_path = ""  # Empty = data.path, of the same dataset.
    config.data.eval_split = "test"
    config.data.cache_dir = ""  # Where built datasets are kept; empty = the user's cache folder.
    config.data.problem_column = ""  # Of a user's own jsonl or parquet.
    config.data.answer_column = ""
    config.data.eval_problem_column = ""  # Of the held-out set; empty = as the training set's.
    config.data.eval_answer_column = ""
    config.data.eval_image_column = ""
    config.data.drop_bad_rows = False  # Leave out and count rows that cannot be used, or refuse.
    # One of luspo_jax.datasets.templates.TEMPLATES, or a text of your own, such as
    # "{problem}\nAnswer with a number." It holds {problem} once, and other columns as {hint}.
    config.data.template = "plain"
    # Of such a text: whether it is a user message in the tokenizer's chat template, or the whole
    # prompt; unset = a message where the tokenizer has a chat template.
    config.data.template_chat = placeholder(bool)
    config.data.system_prompt = ""
    config.data.enable_thinking = placeholder(bool)  # Passed to the chat template where set.
    # Of models that read images; 0 = as the model's preprocessor_config.json says.
    config.data.min_pixels = 0
    config.data.max_pixels = 0
    config.data.image_column = ""  # Empty = the dataset's; of a file, image or images.
    config.data.image_dir = ""  # Folder of images; empty = the data file's.
    config.data.eval_image_dir = ""  # Likewise of the held-out set, where it has a file of its own.
    config.data.blank_images = False  # Every image white, of its own size: what is answered blind.
    config.data.text_blank = 0  # Side of a white image for problems without one; 0 = none.
    config.data.image_workers = 0  # Processes that decode images; 0 = one a core, at most 8.
    config.data.max_prompt_length = 1024  # Tokens; longer prompts are dropped and counted.

    config.reward = ConfigDict()
    config.reward.parts = ConfigDict()  # Verifier → weight.
    # Verifier → its options, e.g. overlong: {buffer: 4096, factor: 0.3}. A reward of your own is
    # any name with the option function: "module:function" or "file.py:function".
    config.reward.options = ConfigDict()
    config.reward.timeout_s = 10.0  # Of one verification.
    config.reward.num_workers = 2  # Processes for verifiers that need a hard time limit.
    config.reward.max_failure_rate = 0.05  # Share of time-outs and errors that stops the run.

    config.rollout = ConfigDict()
    config.rollout.prompts_per_step = 16
    config.rollout.group_size = 8
    config.rollout.max_response_length = 256
    config.rollout.temperature = 1.0
    config.rollout.top_p = 1.0
    config.rollout.top_k = 0  # 0 = off.
    config.rollout.num_slots = 128  # Sequences decoded at once.
    config.rollout.chunk_length = 64  # Decode steps between two looks by the host.
    # |sampler − trainer| log-prob of one token that is refused at the first step. In float32 more
    # than 0.05 is a fault; in bfloat16 rounding makes 0.2 to 0.5 (a model of 135M: 0.21 at
    # temperature 1, 0.44 at 0.6) and more in larger runs: set 1 there. Real faults are of nats.
    config.rollout.mismatch_limit = 0.05

    config.shaping = ConfigDict()  # See luspo_jax.shaping.Shaping.
    for field in dataclasses.fields(Shaping):
        config.shaping[field.name] = field.default

    config.objective = ConfigDict()
    config.objective.preset = "luspo"
    for field in dataclasses.fields(objectives.Objective):
        # Unset = the preset's value.
        config.objective[field.name] = placeholder(_plain_type(field))

    config.train = ConfigDict()
    config.train.num_minibatches = 1  # Optimizer steps a pass over the rollouts.
    config.train.num_microbatches = 1  # Parts of a minibatch, to bound memory.
    # Lay responses end to end in dense rows; micro-batches then hold as many as fit.
    config.train.packing = False
    config.train.microbatch_tokens = 0  # Of a packed micro-batch: rows × pack_length, at most.
    config.train.pack_length = 0  # Tokens of a packed row; 0 = the longest sequence allowed.
    config.train.num_length_buckets = 4  # Row lengths a step may have: each compiles once.
    # What waits in host memory during the rollout: a key of update.OFFLOADS.
    config.train.offload = "none"
    # Experts that a mixture's update uses in place of its routers' choice: those of the trainer's
    # pass before the step ("old", R2), of the sampler ("sampler", R3), or "none".
    config.train.router_replay = "none"
    config.train.freeze_vision = False  # Leave the tower of a vision-language model as it is.
    config.train.router_aux_coef = 0.0  # Of the load-balancing loss; Qwen's files say 0.001.
    config.train.num_epochs = 1  # Passes over the rollouts.
    config.train.learning_rate = 1e-6
    config.train.warmup_steps = 20  # Rollout steps.
    config.train.b1 = 0.9
    config.train.b2 = 0.999
    config.train.eps = 1e-8
    config.train.weight_decay = 0.0
    config.train.max_grad_norm = 1.0  # 0 = off.
    # Every so many rollout steps, π_ref ← ref_decay · π_ref + (1 − ref_decay) · π; 0 = never.
    config.train.ref_every = 0
    config.train.ref_decay = 0.0

    config.length = ConfigDict()  # See luspo_jax.length.settings.LengthSettings.
    for field in dataclasses.fields(LengthSettings):
        config.length[field.name] = field.default

    config.eval = ConfigDict()
    config.eval.every = 10  # Rollout steps; 0 = only before and after training.
    config.eval.num_problems = 500
    config.eval.num_samples = 4  # Responses a problem.
    config.eval.temperature = 1.0
    config.eval.top_p = 1.0
    config.eval.top_k = 0
    config.eval.num_slots = 256
    config.eval.seed = 7  # Of the noise: one value for all runs, so that runs compare in pairs.
    # Reward part that counts as accuracy; may stay empty where there is only one.
    config.eval.metric = ""

    config.output = ConfigDict()
    config.output.checkpoint_every = 10  # Rollout steps; 0 = only at the end.
    config.output.keep_latest = 2
    config.output.keep_best = 1  # By held-out accuracy.
    config.output.dump_every = 1  # Rollout steps between dumps of all responses; 0 = never.
    config.output.tensorboard = True
    config.output.wandb_project = ""  # Empty = no Weights & Biases.
    config.output.export = True  # Write a Hugging Face folder at the end.

    config.hosts = ConfigDict()  # Of a run of several processes; see luspo_jax.watchdog.
    config.hosts.dead_after_s = 30.0  # Without a sign of life a process counts as dead.
    config.hosts.phase_timeout_s = 0.0  # Longest that a phase may take; 0 = no limit.
    config.lock()
    return config


def _plain_type(field: dataclasses.Field) -> type:
    for plain in (bool, int, float, str):
        if field.type is plain or (plain.__name__ in str(field.type)):
            return plain
    raise TypeError(f"Objective.{field.name} has type {field.type}, which no flag can set")


_MOST = 2**31 - 1  # what int32 holds
_SIZE, _COUNT = Number(1, _MOST), Number(0, _MOST)
_LONGEST = Number(1, 2**24)  # tokens
_PROCESSES = 1024
_AXIS = Number(1, 2**16, also=(-1,))
_SHARE = Number(0, 1)
_TYPES = OneOf(("bfloat16", "float32"))

# Field → what it may be beside its type. Every field that is a number is here, but those of
# Objective and LengthSettings, which check their own.
RULES: dict[str, Rule] = {
    "seed": SEED,
    "num_steps": _SIZE,
    "model.path": Text("name a folder in Hugging Face format, or embedded:NAME"),
    "model.dtype": _TYPES,
    "model.rollout_dtype": _TYPES,
    "model.remat": OneOf(REMAT),
    "model.attention": OneOf(("auto", *attention.IMPLEMENTATIONS)),
    "model.experts": OneOf(("auto", *grouped_matmul.IMPLEMENTATIONS)),
    "model.head_chunk_tokens": _SIZE,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.expert": _AXIS,
    "mesh.context": _AXIS,
    "mesh.tensor": _AXIS,
    "rollout_mesh.data": _AXIS,
    "rollout_mesh.expert": _AXIS,
    "rollout_mesh.context": _AXIS,
    "rollout_mesh.tensor": _AXIS,
    "data.name": OneOf(DATASETS),
    "data.split": Text("say train, or another split of the dataset"),
    "data.eval_name": OneOf(("", *DATASETS)),
    "data.eval_split": Text("say test, or another split of the dataset"),
    "data.template": OneOf(TEMPLATES, mark="{problem}"),
    "data.min_pixels": _COUNT,
    "data.max_pixels": _COUNT,
    "data.text_blank": Number(0, 2**14),
    "data.image_workers": Number(0, _PROCESSES),
    "data.max_prompt_length": _LONGEST,
    "reward.timeout_s": Number(0.01, 1e5),
    "reward.num_workers": Number(1, _PROCESSES),
    "reward.max_failure_rate": _SHARE,
    "rollout.prompts_per_step": Number(1, 2**20),
    "rollout.group_size": Number(
        2, 2**16, why="an advantage compares the responses to one prompt with each other"
    ),
    "rollout.max_response_length": _LONGEST,
    "rollout.temperature": dataclasses.replace(
        TEMPERATURE, why="colder responses are greedy and carry no gradient"
    ),
    "rollout.top_p": Number(0, 1, open_low=True),
    "rollout.top_k": _COUNT,
    "rollout.num_slots": _SIZE,
    "rollout.chunk_length": _SIZE,
    "rollout.mismatch_limit": Number(0, 1e30, open_low=True, why="rounding is never 0"),
    "train.num_minibatches": _SIZE,
    "train.num_microbatches": _SIZE,
    "train.microbatch_tokens": Number(0, 2**28),
    "train.pack_length": Number(0, 2**25),
    "train.num_length_buckets": _SIZE,
    "train.offload": OneOf(OFFLOADS),
    "train.router_replay": OneOf(REPLAYS),
    "train.router_aux_coef": Number(0, 1e3),
    "train.num_epochs": _SIZE,
    "train.learning_rate": Number(0, 1, open_low=True),
    "train.warmup_steps": _COUNT,
    "train.b1": Number(0, 1, open_high=True),
    "train.b2": Number(0, 1, open_high=True),
    "train.eps": Number(1e-30, 1, why="of AdamW, beside the root of the second moment"),
    "train.weight_decay": Number(0, 1e3),
    "train.max_grad_norm": Number(0, 1e30),
    "train.ref_every": _COUNT,
    "train.ref_decay": Number(0, 1, open_high=True),
    "eval.every": _COUNT,
    "eval.num_problems": _SIZE,
    "eval.num_samples": Number(1, 2**16),
    "eval.temperature": dataclasses.replace(
        TEMPERATURE, also=(0,), why="0 takes the likeliest token"
    ),
    "eval.top_p": Number(0, 1, open_low=True),
    "eval.top_k": _COUNT,
    "eval.num_slots": _SIZE,
    "eval.seed": SEED,
    "output.checkpoint_every": _COUNT,
    "output.keep_latest": _SIZE,
    "output.keep_best": _COUNT,
    "output.dump_every": _COUNT,
    "hosts.dead_after_s": Number(
        3 * BEAT_S, 1e6, why=f"processes give a sign of life every {BEAT_S:g} s"
    ),
    "hosts.phase_timeout_s": Number(0, 1e6),
    **{f"shaping.{name}": rule for name, rule in shaping.RULES.items()},
}

# A source of data.mixture: field → (type, what it may be).
SOURCE_FIELDS: dict[str, tuple[type, Rule | None]] = {
    "name": (str, OneOf(DATASETS)),
    "path": (str, None),
    "split": (str, RULES["data.split"]),
    "weight": (float, Number(0, 1e15, open_low=True)),
    "problem_column": (str, None),
    "answer_column": (str, None),
    "image_dir": (str, None),
    "image_column": (str, None),
}

# Sections whose field names are not ours to know.
OPEN_SECTIONS = (
    "model.overrides.", "data.mixture.", "data.options.", "reward.parts.", "reward.options.",
)  # fmt: skip


def wrong_fields(config: Mapping[str, Any]) -> Iterator[str]:
    """A line for each field that is unknown, missing, of another type or out of range."""
    yield from _wrong_fields(config, _known(), "")


_known = functools.cache(default_config)  # never handed out


def _wrong_fields(config, known, prefix):
    for key in config:
        if key not in known:
            names = [f"{prefix}{name}" for name in known]
            yield f"unknown field {prefix}{key}: {nearest(f'{prefix}{key}', names)}"
    missing = [f"{prefix}{key}" for key in known if key not in config]
    if missing:
        yield f"missing {', '.join(missing)}: start from luspo_jax.config.default_config()"
    for key in config:
        if key not in known:
            continue
        field, kind = f"{prefix}{key}", known.get_type(key)
        if kind is ConfigDict:
            if not isinstance(config[key], ConfigDict | Mapping):
                yield f"{field}={shown(config[key])} must be a section: {{'name': value, …}}"
            elif f"{field}." not in OPEN_SECTIONS:
                yield from _wrong_fields(config[key], known[key], f"{field}.")
        elif config[key] is not None or known[key] is not None:  # None where the default is unset
            problem = refusal(field, config[key], kind, RULES.get(field))
            yield from [problem] if problem else []
