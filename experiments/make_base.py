"""Trains a small base policy by supervised warm start, and measures its properties for RL.

  python -m experiments.make_base --task=label_sums --seed=0 --out=/tmp/label_sums

It takes under three minutes on two cores. The folder is a Hugging Face checkpoint: a 0.1 M Qwen3
with its tokenizer and a README that describes how it was made and its measured properties. Training
starts with traces that write down every step, since a mixture of styles alone teaches the
arithmetic far more slowly; then comes the mixture that gives the base policy its spread of lengths.
Flags set other seeds, sizes and mixtures; with --num_experts=8 it is a Qwen3-MoE. With
--task=shapes it is a Qwen2.5-VL of 0.4 M that answers questions about drawings, and takes some ten
minutes.
"""

import functools
import json
import pathlib
import sys
import tempfile
import textwrap
import time

import jax
import numpy as np
from absl import flags
from transformers import AutoTokenizer

from experiments import command
from experiments.bases import models, tasks
from luspo_jax import prompts
from luspo_jax.datasets import shapes
from luspo_jax.experience import groups as experience
from luspo_jax.experience import held_out
from luspo_jax.images.preparer import ImagePreparer
from luspo_jax.images.settings import read_settings
from luspo_jax.learner import optimizer
from luspo_jax.learner.demonstrations import nll_objective, update
from luspo_jax.learner.logprobs import LogprobRule
from luspo_jax.learner.programs import StepPrograms
from luspo_jax.learner.rows import Planner
from luspo_jax.learner.state import UpdateRule, initial_state
from luspo_jax.models import char_tokenizer, decoder, decoder_weights, kernels
from luspo_jax.models.decoder_config import DecoderConfig, hf_config
from luspo_jax.models.forward import Forward
from luspo_jax.models.safetensors_folder import WeightsError
from luspo_jax.prompts.demonstrations import Demonstration
from luspo_jax.rewards import Scorer
from luspo_jax.rollout import Engine, Request, Sampling

OUT = flags.DEFINE_string("out", None, "Folder to make.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the folder if it exists.")
TASK = flags.DEFINE_enum("task", "label_sums", list(tasks.TASKS), "What it learns.")
SEED = flags.DEFINE_integer("seed", 0, "Of weights, demonstrations and evaluation.", 0)

# Unset = the task's own.
CHAIN_STEPS = flags.DEFINE_integer("chain_steps", None, "Most steps on plain demonstrations.", 0)
CHAIN_LOSS = flags.DEFINE_float("chain_loss", None, "Loss at which they have been learnt.", 0.0)
MIXTURE_STEPS = flags.DEFINE_integer("mixture_steps", None, "Steps on the mixture of styles.", 0)
RATE = flags.DEFINE_float("learning_rate", None, "Peak rate of Adam.", 0.0)
RESULT_WEIGHT = flags.DEFINE_float("result_weight", None, "Loss weight of a result.", 0.0)
ROWS = flags.DEFINE_integer("rows_per_step", None, "Demonstrations in a step.", 1)
OWN = (CHAIN_STEPS, CHAIN_LOSS, MIXTURE_STEPS, RATE, RESULT_WEIGHT, ROWS)

EVAL_PROBLEMS = flags.DEFINE_integer("eval_problems", 512, "Held-out problems measured.", 1)
EVAL_SAMPLES = flags.DEFINE_integer("eval_samples", 12, "Responses to each.", 1)


def task() -> tasks.Task:
    """Returns the task named by the flags."""
    return tasks.TASKS[TASK.value]


def encoded(examples, tokenizer, folder, *, blank=False) -> list[prompts.PromptRecord]:
    """Encodes the prompts of problems; images are drawn here, once, and kept as bytes."""
    if not task().images:
        renderer = prompts.Renderer(tokenizer)
        return prompts.encode(examples, renderer, max_length=models.MAX_POSITION)[0]
    with ImagePreparer(read_settings(folder, blank=blank), workers=1) as preparer:
        renderer = prompts.Renderer(tokenizer, images=preparer)
        return prompts.encode(examples, renderer, max_length=models.MAX_POSITION)[0]


def demonstration(record, tokenizer, rng, *, plain) -> Demonstration:
    """Draws a response to a problem, with the loss weights of its tokens."""
    text = task().demonstrate(record.example, rng, plain=plain)
    response = np.array([*tokenizer.encode(text), char_tokenizer.END_ID], np.int32)
    tokens = np.concatenate([record.tokens, response])
    trained = np.arange(len(tokens)) >= len(record.tokens)
    (looked_up,) = task().looked_up(tokens[None], vocabulary())
    weights = np.where(looked_up, RESULT_WEIGHT.value, 1.0).astype(np.float32)
    return Demonstration(record, tokens, trained, weights=weights)


def vocabulary() -> list[str]:
    """Returns the tokens of the task's tokenizer, by id."""
    return char_tokenizer.vocabulary(task().characters, images=task().images)


def forward(config: DecoderConfig) -> Forward:
    """How the model is computed: with the grouped product of experts of this platform."""
    return kernels.resolved(Forward(config, expert_kernel="auto"))


class WarmStart:
    """Supervised steps on demonstrations, one call of `phase` after another.

    The step is that of `experiments.sft`. With experts, the loss has their balance as a term.
    """

    def __init__(self, records, tokenizer, config):
        self._records, self._tokenizer = records, tokenizer
        rows, longest = ROWS.value, models.MAX_POSITION
        # Rows of few lengths, 16, 32, …: each compiles once.
        self._planner = Planner(config, longest, longest // 16, rows, pictured_at_once=rows)
        rule = UpdateRule(
            LogprobRule(forward(config), head_chunk_tokens=rows * longest),
            nll_objective(),
            optimizer.adamw(b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0),
            max_grad_norm=1.0,
            router_aux_coef=models.BALANCE.value if config.num_experts else 0.0,
        )
        self._programs = StepPrograms(rule)
        self._rng = np.random.default_rng(SEED.value)
        self._state = initial_state(decoder.init_params(jax.random.key(SEED.value), config), rule)
        self.step = 0

    @property
    def params(self):
        """The weights so far."""
        return self._state.params

    def phase(self, num_steps: int, *, plain: bool, until: float = 0.0, decay: bool = False):
        """Takes `num_steps` steps, fewer once the loss is below `until`."""
        for index in range(num_steps):
            rate = RATE.value * min(1.0, (self.step + 1) / 20)
            rate *= 1.0 - 0.9 * index / num_steps if decay else 1.0
            chosen = self._rng.integers(len(self._records), size=ROWS.value)
            drawn = [
                demonstration(self._records[int(i)], self._tokenizer, self._rng, plain=plain)
                for i in chosen
            ]
            self._state, metrics = update(
                self._programs, self._planner, self._state, drawn, rate=rate
            )
            self.step += 1
            if self.step % 50 == 0:
                excess = metrics.get("router/max_violation/worst_layer")
                load = "" if excess is None else f"  fullest expert +{excess:.0%}"
                print(f"step {self.step:4d}  loss {metrics['sft/loss']:.4f}{load}", flush=True)
            if metrics["sft/loss"] < until:
                break


def measure(params, config, tokenizer, folder) -> dict[str, str]:
    """Measures the base policy on held-out problems, at temperature 1: name → value."""
    problems = task().problems("test")
    wanted = [problems[i] for i in range(min(EVAL_PROBLEMS.value, len(problems)))]
    records = encoded(wanted, tokenizer, folder)
    groups = ask(params, config, tokenizer, records)
    responses = [response for group in groups for response in group.responses]
    result = held_out.summarize(groups, metric=task().reward)
    table = properties(result, np.array([len(response.tokens) for response in responses]))
    if task().images:
        blank = encoded(wanted, tokenizer, folder, blank=True)
        table |= looking(groups, ask(params, config, tokenizer, blank), wanted)
    return table | router_load(responses, config)


def ask(params, config, tokenizer, records):
    """Judged responses, prompt by prompt."""
    sampling = Sampling(
        max_response_length=task().max_response_length(), stop_token_ids=config.eos_token_ids
    )
    engine = Engine(
        forward(config),
        sampling,
        num_slots=256,
        max_prompt_length=max(len(record.tokens) for record in records),
        chunk_length=16,
        record_experts=config.num_experts > 0,
    )
    responses, _ = engine.generate(
        params,
        [Request(record.prompt_id, record.tokens, record.images) for record in records],
        group_size=EVAL_SAMPLES.value,
        seed=SEED.value,
    )
    with Scorer({task().reward: 1.0}, options={task().reward: task().options}) as scorer:
        return experience.judged(
            records,
            responses,
            scorer=scorer,
            decode=functools.partial(tokenizer.decode, skip_special_tokens=True),
            max_length=sampling.max_response_length,
        )


def looking(groups, blank_groups, examples) -> dict[str, str]:
    """What the images tell: accuracy of each kind, with blank images, and of constant answers."""

    def by_kind(groups):
        right_P = np.array([(group.values(task().reward) > 0.5).mean() for group in groups])
        kinds_P = np.array([example.meta["kind"] for example in examples])
        return {"all": right_P.mean()} | {
            kind: right_P[kinds_P == kind].mean() for kind in tasks.KINDS.value
        }

    def listed(shares):
        return ", ".join(f"{kind} {100 * shares[kind]:.1f} %" for kind in by_kind(groups))

    return {
        "right, by kind": listed(by_kind(groups)),
        "right with blank images": listed(by_kind(blank_groups)),
        "right without looking: the best constant answers": listed(
            shapes.blind_accuracy(task().problems("test"))  # on few problems it would be high
        ),
    }


def properties(result: held_out.Evaluation, lengths_B: np.ndarray) -> dict[str, str]:
    """The table of the model card."""
    shortest, middle, longest = (100 * share for share in result.accuracy_by_third)
    percentiles = np.percentile(lengths_B, (5, 25, 50, 75, 95, 99)).astype(int)
    total = result.num_problems * result.num_samples
    return {
        "held-out problems × responses": f"{result.num_problems} × {result.num_samples}",
        "right": "{:.1f} % ({:.1f} … {:.1f})".format(
            *(100 * x for x in (result.accuracy, *result.accuracy_ci95))
        ),
        f"truncated at {task().max_response_length()} tokens": f"{100 * result.truncated:.2f} %",
        "no answer found": f"{100 * result.statuses.get('unparsed', 0) / total:.2f} %",
        "right, shortest third of each problem's responses": f"{shortest:.1f} %",
        "right, middle third": f"{middle:.1f} %",
        "right, longest third": f"{longest:.1f} %",
        "response length, mean ± SD": f"{lengths_B.mean():.1f} ± {lengths_B.std():.1f} tokens",
        "response length, percentiles 5 25 50 75 95 99": " ".join(map(str, percentiles)),
    }


def router_load(responses, config: DecoderConfig) -> dict[str, str]:
    """Returns the share of response tokens per expert; empty without experts."""
    if not config.num_experts:
        return {}
    # A stop token is sampled, but nothing reads it.
    ids_NLK = np.concatenate([response.expert_ids[:-1] for response in responses])
    load_LE = np.stack(
        [
            np.bincount(ids.reshape(-1), minlength=config.num_experts)
            for ids in ids_NLK.swapaxes(0, 1)
        ]
    )
    over_LE = load_LE / load_LE.mean(axis=1, keepdims=True)

    def listed(values):
        return " ".join(f"{value:.2f}" for value in values)

    return {
        "load of the fullest expert over an even one, layer by layer": listed(over_LE.max(axis=1)),
        "load of the emptiest expert over an even one": listed(over_LE.min(axis=1)),
    }


def card(config, table: dict[str, str]) -> str:
    """Returns the README of the folder."""
    recipe = [*(TASK, SEED), *task().flags, *models.SIZES]
    recipe += models.OF_EXPERTS if config.num_experts else ()
    recipe += models.OF_VISION if config.vision else ()
    recipe += OWN
    recipe += (EVAL_PROBLEMS, EVAL_SAMPLES)
    command = textwrap.fill(
        f"python -m experiments.make_base {' '.join(flag.serialize() for flag in recipe)} "
        "--out=FOLDER",
        width=96,
        initial_indent="    ",
        subsequent_indent="        ",
        break_on_hyphens=False,
    ).replace("\n", " \\\n")
    rows = "\n".join(f"| {name} | {value} |" for name, value in table.items())
    first = task().problems("test")[0]
    response = task().demonstrate(first, np.random.default_rng(0), plain=True)
    asked = f"`{first.problem}`{' after an image' if config.vision else ''}"
    return f"""# {TASK.value}: a base policy of {decoder_weights.num_params(config):,} parameters

A {kind(config)}with random weights, trained on demonstrations of `luspo_jax.datasets.{TASK.value}`
by `experiments/make_base.py`, so that RL has something to find. Prompts look like
{asked}, right responses like `{response}`.

Measured on held-out problems at temperature 1, scored by the {task().reward} verifier:

| | |
| --- | --- |
{rows}

Made by

{command}

The same command gives the same weights on the same machine and versions; elsewhere rounding
differs, and with it the weights, while the properties stay alike.

Apache-2.0, as the code. No data but generated problems went into it.
"""


def kind(config: DecoderConfig) -> str:
    """Describes the model, for its card."""
    if config.vision:
        return f"Qwen2.5-VL, {config.vision.depth} blocks in its tower,\n"
    if config.num_experts:
        return (
            f"Qwen3-MoE, {config.num_experts} experts a layer and {config.experts_per_token} a "
            "token,\n"
        )
    return "Qwen3 "


def main() -> None:
    """Builds the folder that the flags describe, and prints the measurements."""
    out, start = pathlib.Path(OUT.value), time.perf_counter()
    if out.exists() and not OVERWRITE.value:
        raise WeightsError(f"--out={out} exists: choose another folder, or pass --overwrite")
    if task().images and models.EXPERTS.value:
        raise WeightsError(f"--num_experts={models.EXPERTS.value}: {TASK.value} needs a Qwen2.5-VL")
    for flag, value in zip(OWN, task().training, strict=True):
        flags.FLAGS[flag.name].value = value if flag.value is None else flag.value
    with tempfile.TemporaryDirectory() as source:
        source = pathlib.Path(source)
        char_tokenizer.write_tokenizer(
            source, task().characters, max_length=models.MAX_POSITION, images=task().images
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = write_config(source, len(tokenizer))
        records = encoded(list(task().problems("train")), tokenizer, source)
        warm_start = WarmStart(records, tokenizer, config)
        warm_start.phase(CHAIN_STEPS.value, plain=True, until=CHAIN_LOSS.value)
        warm_start.phase(MIXTURE_STEPS.value, plain=False, decay=True)
        print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)
        decoder_weights.export(
            out, warm_start.params, config, source=source, overwrite=OVERWRITE.value
        )
    table = measure(warm_start.params, config, tokenizer, out)
    (out / "README.md").write_text(card(config, table), encoding="utf-8")
    for name, value in table.items():
        print(f"{name:50s} {value}")
    print(f"{out} made in {time.perf_counter() - start:.0f} s")


def write_config(folder: pathlib.Path, vocab_size: int) -> DecoderConfig:
    """Writes config.json, and a vision model's image processor settings."""
    config = models.image_config(vocab_size) if task().images else models.text_config(vocab_size)
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    if config.vision:
        processor = json.dumps(models.image_processor(config), indent=2)
        (folder / "preprocessor_config.json").write_text(processor + "\n")
    return config


if __name__ == "__main__":
    sys.exit(command.call(main, required=("out",)))
