"""Makes a small base policy by supervised warm start, and measures what RL will find in it.

  python -m experiments.make_base --task=label_sums --seed=0 --out=/tmp/label_sums

Under three minutes on two cores. The folder is a Hugging Face checkpoint: a 0.1 M Qwen3 with
its tokenizer and a README of how it was made and of its measured properties. Training starts with
traces that write down every step, since a mixture of styles alone teaches the arithmetic far more
slowly; then comes the mixture that gives the base policy its spread of lengths. Other seeds,
sizes and mixtures are flags away; with --num_experts=8 it is a Qwen3-MoE.
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
from luspo_jax import evaluate, logprobs, optimizer, packing, prompts
from luspo_jax.datasets import Example, label_lookup, label_sums
from luspo_jax.models import char_tokenizer, decoder, decoder_weights
from luspo_jax.models.decoder_config import DecoderConfig, hf_config
from luspo_jax.models.safetensors_folder import WeightsError
from luspo_jax.ops import grouped_matmul
from luspo_jax.rewards import Scorer
from luspo_jax.rollout import Engine, Request, Sampling

OUT = flags.DEFINE_string("out", None, "Folder to make.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the folder if it exists.")
TASK = flags.DEFINE_enum("task", "label_sums", ["label_sums", "label_lookup"], "What it learns.")
SEED = flags.DEFINE_integer("seed", 0, "Of weights, demonstrations and evaluation.", 0)
NUM_TERMS = flags.DEFINE_integer("num_terms", 6, "Labelled values in a problem.", 2, 9)

LAYERS = flags.DEFINE_integer("num_layers", 3, "Decoder layers.", 1)
EMBED = flags.DEFINE_integer("embed_dim", 64, "Width; a head is a quarter of it.", 8)
MLP = flags.DEFINE_integer("mlp_dim", 128, "Width of the MLP.", 1)

EXPERTS = flags.DEFINE_integer("num_experts", 0, "Experts of a layer in place of its MLP.", 0)
EXPERTS_EACH = flags.DEFINE_integer("experts_per_token", 2, "Experts that a token goes to.", 1)
EXPERT_DIM = flags.DEFINE_integer("expert_dim", 32, "Width of an expert.", 1)
NORM_TOPK = flags.DEFINE_bool("norm_topk", True, "The weights of a token's experts sum to one.")
BALANCE = flags.DEFINE_float("balance", 0.01, "Coefficient of the load-balancing loss.", 0.0)

CHAIN_STEPS = flags.DEFINE_integer("chain_steps", 800, "Most steps on plain demonstrations.", 0)
CHAIN_LOSS = flags.DEFINE_float("chain_loss", 0.02, "Loss at which they have been learnt.", 0.0)
MIXTURE_STEPS = flags.DEFINE_integer("mixture_steps", 400, "Steps on the mixture of styles.", 0)
ROWS = flags.DEFINE_integer("rows_per_step", 64, "Demonstrations in a step.", 1)
RATE = flags.DEFINE_float("learning_rate", 5e-3, "Peak rate of Adam.", 0.0)
RESULT_WEIGHT = flags.DEFINE_float("result_weight", 6.0, "Loss weight of a computed digit.", 0.0)

# Of label_sums: share of answers without a trace, lowest style (1 skips no term), and the most
# terms from one written sum to the next.
DIRECT = flags.DEFINE_float("direct", 0.4, "Share of direct answers.", 0.0, 1.0)
CHUNK_LOW = flags.DEFINE_float("chunk_low", 0.4, "Lowest style of traces.", 0.01, 1.0)
CHUNK_MAX = flags.DEFINE_integer("chunk_max", 3, "Most terms a step of a trace adds.", 1)
# Of label_lookup: share of answers drawn at random, and the styles of its filler.
WRONG = flags.DEFINE_float("wrong", 0.6, "Share of random answers.", 0.0, 1.0)
FILLER_LOW = flags.DEFINE_float("filler_low", 0.04, "Lowest style: longest filler.", 0.01, 1.0)
FILLER_HIGH = flags.DEFINE_float("filler_high", 0.25, "Highest style of filler.", 0.01, 1.0)

EVAL_PROBLEMS = flags.DEFINE_integer("eval_problems", 512, "Held-out problems measured.", 1)
EVAL_SAMPLES = flags.DEFINE_integer("eval_samples", 12, "Responses to each.", 1)

# All that decides the folder's content, as the model card repeats it.
RECIPE = (
    *(TASK, SEED, NUM_TERMS, LAYERS, EMBED, MLP),
    *(CHAIN_STEPS, CHAIN_LOSS, MIXTURE_STEPS, ROWS, RATE, RESULT_WEIGHT),
)
OF_EXPERTS = (EXPERTS, EXPERTS_EACH, EXPERT_DIM, NORM_TOPK, BALANCE)  # where there are any
MIXTURE = {
    "label_sums": (DIRECT, CHUNK_LOW, CHUNK_MAX),
    "label_lookup": (WRONG, FILLER_LOW, FILLER_HIGH),
}

CHARACTERS = " =?.0123456789" + label_sums.LABELS
MAX_POSITION = 128

TASKS = {"label_sums": label_sums.LabelSums, "label_lookup": label_lookup.LabelLookup}


def sums_demonstration(example: Example, rng: np.random.Generator, *, plain: bool) -> str:
    """A response to a label_sums problem: every step if `plain`, else in a random style."""
    values = example.meta["values"]
    if plain:
        return label_sums.trace(values, (1,) * len(values))
    chunks = label_sums.random_chunks(
        rng, len(values), direct=DIRECT.value, low=CHUNK_LOW.value, largest=CHUNK_MAX.value
    )
    return label_sums.trace(values, chunks)


def lookup_demonstration(example: Example, rng: np.random.Generator, *, plain: bool) -> str:
    """A response to a label_lookup problem: right and direct if `plain`, else as the flags say."""
    if plain:
        return label_lookup.response(int(example.answer), 0)
    filler = label_lookup.random_filler(
        rng, low=FILLER_LOW.value, high=FILLER_HIGH.value, largest=max_response_length() - 8
    )
    guess = rng.random() < WRONG.value
    answer = int(rng.integers(label_sums.MODULUS)) if guess else int(example.answer)
    return label_lookup.response(answer, filler)


DEMONSTRATIONS = {"label_sums": sums_demonstration, "label_lookup": lookup_demonstration}


def max_response_length() -> int:
    """Tokens that training should allow: the longest trace, its answer, and six to spare."""
    return 5 * NUM_TERMS.value + 10


def model_config(vocab_size: int) -> DecoderConfig:
    """The Qwen3, or the Qwen3-MoE, that the flags ask for."""
    experts = {}
    if EXPERTS.value:
        experts = {
            "num_experts": EXPERTS.value,
            "experts_per_token": EXPERTS_EACH.value,
            "expert_dim": EXPERT_DIM.value,
            "norm_topk": NORM_TOPK.value,
        }
    return DecoderConfig(
        model_type="qwen3_moe" if experts else "qwen3",
        vocab_size=vocab_size,
        num_layers=LAYERS.value,
        embed_dim=EMBED.value,
        mlp_dim=MLP.value,
        num_heads=4,
        num_kv_heads=2,
        head_dim=EMBED.value // 4,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        qkv_bias=False,
        qk_norm=True,
        tie_embeddings=True,
        max_position=MAX_POSITION,
        eos_token_ids=(char_tokenizer.END_ID,),
        pad_token_id=char_tokenizer.PAD_ID,
        dtype="float32",
        **experts,
    )


def demonstrations(problems, tokenizer, rng, *, plain):
    """(rows, weights_BT) of one step: problems, each with one response, and the loss weights."""
    demonstrate = DEMONSTRATIONS[TASK.value]
    chosen = [problems[int(i)] for i in rng.integers(len(problems), size=ROWS.value)]
    prompt_ids = [tokenizer.encode(example.problem) for example in chosen]
    response_ids = [
        [*tokenizer.encode(demonstrate(example, rng, plain=plain)), char_tokenizer.END_ID]
        for example in chosen
    ]
    longest = max(len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True))
    rows = packing.padded_rows(
        prompt_ids,
        response_ids,
        length=-(-longest // 16) * 16,  # few lengths: each compiles once
        pad_id=char_tokenizer.PAD_ID,
    )
    weights_BT = np.where(computed(rows.tokens_BT), RESULT_WEIGHT.value, 1.0)
    return rows, (weights_BT * rows.response_mask_BT).astype(np.float32)


def computed(tokens_BT: np.ndarray) -> np.ndarray:
    """Where a token is the digit after `=` or after `#### `."""
    vocabulary = char_tokenizer.vocabulary(CHARACTERS)
    after = np.zeros(tokens_BT.shape, bool)
    after[:, 1:] |= tokens_BT[:, :-1] == vocabulary.index("=")
    after[:, 2:] |= tokens_BT[:, :-2] == vocabulary.index(char_tokenizer.ANSWER_MARK)
    return after


@functools.partial(jax.jit, static_argnames=("config", "adam"), donate_argnums=(0, 1))
def train_step(params, opt_state, rows, weights_BT, rate, *, config, adam):
    """One step of Adam on Σ w · (−log p) / Σ w, and with experts on their balance.

    Gives params, opt_state, the first term, and the most that an expert's load is over an even one.
    """

    def loss(params):
        scoring = logprobs.Scoring(
            config, head_chunk_tokens=weights_BT.size, experts=expert_products()
        )
        found = logprobs.scored(params, rows, scoring=scoring)
        value = -(weights_BT * found.logprobs_BT).sum() / weights_BT.sum()
        if found.router is None:
            return value, (value, 0.0)
        balance, excess = load_balance(found.router)
        return value + BALANCE.value * balance, (value, excess)

    (_, measured), grads = jax.value_and_grad(loss, has_aux=True)(params)
    grads, _, _ = optimizer.clip_by_global_norm(grads, 1.0)
    params, opt_state = optimizer.apply(adam, params, grads, opt_state, rate=rate)
    return params, opt_state, *measured


def expert_products() -> str:
    """The name of the grouped product of experts on this platform."""
    return grouped_matmul.resolve("auto", platform=jax.default_backend())


def load_balance(router: logprobs.RouterPass) -> tuple[jax.Array, jax.Array]:
    """(mean over layers of E · Σ_e f_e · P_e, the fullest expert's load over an even one's − 1).

    f_e is the tokens sent to expert e over all tokens, a constant to the gradient, and P_e the mean
    of the router's probability: K where either is even (Switch Transformer, arXiv:2101.03961,
    equations 4–6).
    """
    share_LE = jax.lax.stop_gradient(router.load_LE) / router.tokens
    mean_LE = router.mass_LE / router.tokens
    num_experts = share_LE.shape[1]
    loss = num_experts * (share_LE * mean_LE).sum(axis=1).mean()
    return loss, (share_LE / share_LE.mean(axis=1, keepdims=True)).max() - 1


class WarmStart:
    """Adam on demonstrations, one call of `phase` after another."""

    def __init__(self, problems, tokenizer, config):
        self._problems, self._tokenizer, self._config = problems, tokenizer, config
        self._adam = optimizer.adamw(b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0)
        self._rng = np.random.default_rng(SEED.value)
        self.params = decoder.init_params(jax.random.key(SEED.value), config)
        self._opt_state = self._adam.init(self.params)
        self.step = 0

    def phase(self, num_steps: int, *, plain: bool, until: float = 0.0, decay: bool = False):
        """Takes `num_steps` steps, fewer once the loss is below `until`; their last loss."""
        for index in range(num_steps):
            rows, weights_BT = demonstrations(
                self._problems, self._tokenizer, self._rng, plain=plain
            )
            rate = RATE.value * min(1.0, (self.step + 1) / 20)
            rate *= 1.0 - 0.9 * index / num_steps if decay else 1.0
            self.params, self._opt_state, loss, excess = train_step(
                self.params,
                self._opt_state,
                rows,
                weights_BT,
                np.float32(rate),
                config=self._config,
                adam=self._adam,
            )
            self.step += 1
            if self.step % 50 == 0:
                load = f"  fullest expert +{float(excess):.0%}" if EXPERTS.value else ""
                print(f"step {self.step:4d}  loss {float(loss):.4f}{load}", flush=True)
            if loss < until:
                break
        return float(loss)


def measure(params, config, tokenizer) -> dict[str, str]:
    """Properties of the base policy on held-out problems, at temperature 1: name → value."""
    held_out = TASKS[TASK.value]("test", NUM_TERMS.value)
    wanted = [held_out[i] for i in range(min(EVAL_PROBLEMS.value, len(held_out)))]
    records, _ = prompts.encode(wanted, prompts.Renderer(tokenizer), max_length=MAX_POSITION)
    sampling = Sampling(
        max_response_length=max_response_length(), stop_token_ids=config.eos_token_ids
    )
    engine = Engine(
        config,
        sampling,
        num_slots=256,
        max_prompt_length=len(records[0].tokens),
        chunk_length=16,
        experts=expert_products(),
        record_experts=config.num_experts > 0,
    )
    responses, _ = engine.generate(
        params,
        [Request(record.prompt_id, record.tokens) for record in records],
        group_size=EVAL_SAMPLES.value,
        seed=SEED.value,
    )
    texts = [tokenizer.decode(r.tokens, skip_special_tokens=True) for r in responses]
    with Scorer({"gsm8k": 1.0}) as scorer:
        rewards = evaluate.score(
            scorer, records, responses, texts=texts, max_length=sampling.max_response_length
        )
    result = evaluate.summarize(responses, rewards, metric="gsm8k", num_samples=EVAL_SAMPLES.value)
    table = properties(result, np.array([len(response.tokens) for response in responses]))
    return table | router_load(responses, config)


def properties(result: evaluate.Evaluation, lengths_B: np.ndarray) -> dict[str, str]:
    """The table of the model card."""
    shortest, middle, longest = (100 * share for share in result.accuracy_by_third)
    percentiles = np.percentile(lengths_B, (5, 25, 50, 75, 95, 99)).astype(int)
    total = result.num_problems * result.num_samples
    return {
        "held-out problems × responses": f"{result.num_problems} × {result.num_samples}",
        "right": "{:.1f} % ({:.1f} … {:.1f})".format(
            *(100 * x for x in (result.accuracy, *result.accuracy_ci95))
        ),
        f"truncated at {max_response_length()} tokens": f"{100 * result.truncated:.2f} %",
        "no answer found": f"{100 * result.statuses.get('unparsed', 0) / total:.2f} %",
        "right, shortest third of each problem's responses": f"{shortest:.1f} %",
        "right, middle third": f"{middle:.1f} %",
        "right, longest third": f"{longest:.1f} %",
        "response length, mean ± SD": f"{lengths_B.mean():.1f} ± {lengths_B.std():.1f} tokens",
        "response length, percentiles 5 25 50 75 95 99": " ".join(map(str, percentiles)),
    }


def router_load(responses, config: DecoderConfig) -> dict[str, str]:
    """How many of the response tokens each expert got; nothing without experts."""
    if not config.num_experts:
        return {}
    # A stop token is sampled, but nothing reads it.
    ids_NLK = np.concatenate([response.experts[:-1] for response in responses])
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
    """The README of the folder."""
    of_experts = OF_EXPERTS if config.num_experts else ()
    recipe = (*RECIPE, *of_experts, *MIXTURE[TASK.value], EVAL_PROBLEMS, EVAL_SAMPLES)
    command = " ".join(flag.serialize() for flag in recipe)
    kind = "Qwen3 "
    if config.num_experts:
        kind = (
            f"Qwen3-MoE, {config.num_experts} experts a layer and {config.experts_per_token} a "
            "token,\n"
        )
    command = textwrap.fill(
        f"python -m experiments.make_base {command} --out=FOLDER",
        width=96,
        initial_indent="    ",
        subsequent_indent="        ",
        break_on_hyphens=False,
    ).replace("\n", " \\\n")
    held_out = TASKS[TASK.value]("test", NUM_TERMS.value)
    rows = "\n".join(f"| {name} | {value} |" for name, value in table.items())
    return f"""# {TASK.value}: a base policy of {decoder_weights.num_params(config):,} parameters

A {kind}with random weights, trained on demonstrations of `luspo_jax.datasets.{TASK.value}` by
`experiments/make_base.py`, so that RL has something to find. Prompts look like
`{held_out[0].problem}`, right responses like
`{DEMONSTRATIONS[TASK.value](held_out[0], np.random.default_rng(0), plain=True)}`.

Measured on held-out problems at temperature 1, scored by the gsm8k verifier:

| | |
| --- | --- |
{rows}

Made by

{command}

The same command gives the same weights on the same machine and versions; elsewhere rounding
differs, and with it the weights, while the properties stay alike.

Apache-2.0, as the code. No data but generated problems went into it.
"""


def main() -> None:
    """Makes the folder that the flags describe, and prints what was measured."""
    out, start = pathlib.Path(OUT.value), time.perf_counter()
    if out.exists() and not OVERWRITE.value:
        raise WeightsError(f"--out={out} exists: choose another folder, or pass --overwrite")
    with tempfile.TemporaryDirectory() as source:
        char_tokenizer.write_tokenizer(pathlib.Path(source), CHARACTERS, max_length=MAX_POSITION)
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = model_config(len(tokenizer))
        warm_start = WarmStart(list(TASKS[TASK.value]("train", NUM_TERMS.value)), tokenizer, config)
        warm_start.phase(CHAIN_STEPS.value, plain=True, until=CHAIN_LOSS.value)
        warm_start.phase(MIXTURE_STEPS.value, plain=False, decay=True)
        print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)
        (pathlib.Path(source) / "config.json").write_text(json.dumps(hf_config(config)))
        decoder_weights.export(
            out, warm_start.params, config, source=source, overwrite=OVERWRITE.value
        )
    table = measure(warm_start.params, config, tokenizer)
    (out / "README.md").write_text(card(config, table), encoding="utf-8")
    for name, value in table.items():
        print(f"{name:50s} {value}")
    print(f"{out} made in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(command.call(main, required=("out",)))
