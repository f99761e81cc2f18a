"""What one RL step of the benchmark does: a model, prompts, and the length of every response.

Every side reads the same folder and is told the same lengths, so all do equal work. Responses of a
real model have the lengths at which the model itself ended them in a rollout beforehand (`real`):
lengths that each side draws for itself would differ, and a padded batch costs what its longest
response costs.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import sampling_work
from experiments.bench import workload as workloads
from experiments.bench.sampling_sides import Engine
from experiments.bench.workload import Workload
from luspo_jax.hosts.values import ConfigError
from luspo_jax.models import decoder, decoder_weights
from luspo_jax.models.decoder_config import DecoderConfig, read_config
from luspo_jax.models.forward import Forward

ANSWER = "e"  # of every problem: the last e or o of a response decides its reward
PATTERN = "[eo]"


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts × group responses of fixed lengths, and one LUSPO update on them.

    Attributes:
      name: what it is, in words.
      folder: of the model.
      problems: texts of the problems, to which our side's chat template adds what it adds.
      prompts: texts that the model reads.
      prompt_tokens: their token ids.
      lengths: tokens of each response, by prompt; its end token, where there is one, counts.
      dtype: of the arithmetic; master weights are float32.
      end: the token that ends a response; None if the model has none.
      pad: a token that is never sampled where responses end.
    """

    name: str
    folder: pathlib.Path
    problems: tuple[str, ...]
    prompts: tuple[str, ...]
    prompt_tokens: tuple[tuple[int, ...], ...]
    lengths: tuple[tuple[int, ...], ...]
    dtype: str = "float32"
    end: int | None = None
    pad: int = 0

    @property
    def model(self) -> DecoderConfig:
        """Returns the model's configuration."""
        return read_config(self.folder)

    @property
    def group(self) -> int:
        """Returns the responses to each prompt."""
        return len(self.lengths[0])

    @property
    def flat_lengths(self) -> list[int]:
        """Returns the tokens of every response, prompt by prompt."""
        return [n for group in self.lengths for n in group]

    @property
    def longest_prompt(self) -> int:
        """Returns the tokens of the longest prompt."""
        return max(map(len, self.prompt_tokens))

    @property
    def longest(self) -> int:
        """Returns the tokens of the longest response."""
        return max(self.flat_lengths)

    @property
    def generated(self) -> int:
        """Returns the tokens that a step samples, which are those that it scores."""
        return sum(self.flat_lengths)

    def doubled(self) -> "Task":
        """Returns the same with twice the tokens in every response."""
        lengths = tuple(tuple(2 * n for n in group) for group in self.lengths)
        return dataclasses.replace(self, lengths=lengths, name=f"{self.name}, responses doubled")

    def with_lengths(self, lengths: Sequence[int]) -> "Task":
        """Returns the same with other lengths, given prompt by prompt."""
        grouped = np.reshape(np.asarray(lengths, int), (-1, self.group)).tolist()
        return dataclasses.replace(self, lengths=tuple(map(tuple, grouped)))

    def logprob(self) -> float:
        """Returns the mean log-probability of the first prompt's tokens after its first, in nats.

        The other sides compute it with their own models: it tells that they read the same.
        """
        params = decoder_weights.load_params(self.folder, self.model, dtype="float32")
        tokens_BT = jnp.array([self.prompt_tokens[0]])
        how = Forward(self.model)
        places_BT = jnp.arange(tokens_BT.shape[1])[None]
        hidden = decoder.hidden_states(
            params, tokens_BT, places_BT, jnp.ones_like(tokens_BT), how=how
        )
        logprobs = jax.nn.log_softmax(decoder.logits(params, hidden[0, :-1], how=how))
        return float(jnp.take_along_axis(logprobs, tokens_BT[0, 1:, None], axis=-1).mean())

    def spec(self) -> dict[str, Any]:
        """Returns all that another process needs, as JSON values."""
        return {
            **dataclasses.asdict(self),
            "folder": str(self.folder),
            "group": self.group,
            "learning_rate": workloads.LEARNING_RATE,
            "clip_low": workloads.CLIP_LOW,
            "clip_high": workloads.CLIP_HIGH,
        }

    def __str__(self) -> str:
        few, many = min(self.flat_lengths), self.longest
        spread = f"{many}" if few == many else f"{few} to {many} (mean {self._mean:.0f})"
        short = min(map(len, self.prompt_tokens))
        read = f"{short}" if short == self.longest_prompt else f"{short} to {self.longest_prompt}"
        count = decoder_weights.num_params(self.model)
        return (
            f"{self.name}: {len(self.prompts)} prompts of {read} tokens × {self.group} responses "
            f"of {spread} tokens; {count:,} parameters; {self.dtype}, LUSPO, one update"
        )

    @property
    def _mean(self):
        return self.generated / len(self.flat_lengths)


def synthetic(sizes: Workload, folder: pathlib.Path, *, seed: int) -> Task:
    """A random Qwen3 and prompts of one length; no token ends a response.

    Args:
      sizes: of model and step.
      folder: a new one, in which model and prompts are written.
      seed: of weights and prompts.
    """
    workloads.write(sizes, folder, seed=seed)
    texts = tuple(workloads.prompt_texts(folder))
    names = {name: token for token, name in enumerate(workloads.words(sizes.vocab))}
    return Task(
        name=(
            f"Qwen3 with D {sizes.embed_dim}, {sizes.layers} layers, "
            f"{sizes.heads}/{sizes.kv_heads} heads of {sizes.head_dim}, F {sizes.mlp_dim}, "
            f"V {sizes.vocab}"
        ),
        folder=folder / workloads.MODEL,
        problems=texts,
        prompts=texts,
        prompt_tokens=tuple(tuple(names[word] for word in text.split()) for text in texts),
        lengths=((sizes.response_length,) * sizes.group,) * sizes.prompts,
        dtype=sizes.dtype,
    )


def real(sizes: Workload, data: pathlib.Path, *, seed: int) -> Task:
    """SmolLM2-135M-Instruct on GSM8K, or on sums where that is absent.

    Responses have the lengths at which the model ends them, at temperature 1, in one rollout of
    ours; `sizes` bounds them.

    Args:
      sizes: its prompts, group, response length and type count.
      data: folder of the problems.
      seed: of the rollout.

    Raises:
      ConfigError: the package with the model is not installed.
    """
    from transformers import AutoTokenizer

    try:
        work = sampling_work.real(
            data, prompts=sizes.prompts, group=sizes.group, limit=sizes.response_length
        )
    except FileNotFoundError as error:
        raise ConfigError(f"--workload=smollm2: {error}") from error
    tokenizer = AutoTokenizer.from_pretrained(work.folder)
    problems, _ = sampling_work.real_problems(data, sizes.prompts)
    unknown = tokenizer.convert_tokens_to_ids(tokenizer.unk_token)
    return Task(
        name=work.name,
        folder=work.folder,
        problems=tuple(problems),
        prompts=tuple(tokenizer.decode(tokens) for tokens in work.prompts),
        prompt_tokens=work.prompts,
        lengths=((sizes.response_length,) * sizes.group,) * sizes.prompts,
        dtype=sizes.dtype,
        end=work.stops[0],
        pad=unknown,
    ).with_lengths(Engine(work).sample(seed).lengths)


def write_problems(task: Task, path: pathlib.Path) -> None:
    """Writes the problems as our side reads them."""
    rows = [{"problem": problem, "answer": ANSWER} for problem in task.problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
