"""Workload of a benchmark: a random-weight Qwen3, prompts of one length, a reward that half win.

Everything is written to a folder as real files, so that every library reads the same.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np

from luspo_jax.hosts.values import ConfigError
from luspo_jax.models import decoder, decoder_weights
from luspo_jax.models.decoder_config import DecoderConfig

LEARNING_RATE = 1e-6
CLIP_LOW, CLIP_HIGH = 2e-3, 2.5e-3  # arXiv 2602.05261 §5.1
END = "<end>"  # not a token of the model: responses always reach their full length
MODEL, PROMPTS = "model", "prompts.jsonl"


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes of one RL step: prompts × group responses, one LUSPO update; every length is exact.

    Raises:
      ConfigError: an invalid flag, named in the message.
    """

    prompts: int = 8
    group: int = 8
    prompt_length: int = 64
    response_length: int = 128
    embed_dim: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 768
    vocab: int = 4096
    dtype: str = "float32"
    microbatches: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"--{field.name}={value} must be at least 1")
        if self.group < 2:
            raise ConfigError(f"--group={self.group}: a group of one response has no advantage")
        if self.responses % self.microbatches:
            raise ConfigError(
                f"--microbatches={self.microbatches} does not divide the {self.responses} responses"
            )
        _ = self.model  # Refuses impossible decoders.

    @property
    def responses(self) -> int:
        """Returns the responses per step."""
        return self.prompts * self.group

    @property
    def model(self) -> DecoderConfig:
        """Returns a Qwen3 with a tied head and no token that ends a response."""
        return DecoderConfig(
            model_type="qwen3",
            vocab_size=self.vocab,
            num_layers=self.layers,
            embed_dim=self.embed_dim,
            mlp_dim=self.mlp_dim,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            qkv_bias=False,
            qk_norm=True,
            tie_embeddings=True,
            max_position=self.prompt_length + self.response_length,
        )

    def __str__(self) -> str:
        return (
            f"{self.prompts} prompts × {self.group} responses, {self.prompt_length} prompt + "
            f"{self.response_length} response tokens; Qwen3 with D {self.embed_dim}, "
            f"{self.layers} layers, {self.heads}/{self.kv_heads} heads of {self.head_dim}, "
            f"F {self.mlp_dim}, V {self.vocab}, {decoder_weights.num_params(self.model):,} "
            f"parameters; {self.dtype}, LUSPO, one update"
        )


# A step of a moment, to try a benchmark.
SMALL = Workload(
    prompts=2,
    group=2,
    prompt_length=8,
    response_length=16,
    embed_dim=32,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=16,
    mlp_dim=32,
    vocab=64,
)


def words(vocab: int) -> list[str]:
    """Returns token texts: number and parity, so that a text shows what the reward requires."""
    return [f"{token}{'eo'[token % 2]}" for token in range(vocab)]


def write(workload: Workload, folder: pathlib.Path, *, seed: int) -> None:
    """Writes `folder`/model (weights, tokenizer) and `folder`/prompts.jsonl."""
    params = decoder.init_params(jax.random.key(seed), workload.model)
    model = folder / MODEL
    decoder_weights.export(model, jax.device_get(params), workload.model)
    _write_tokenizer(model, workload)
    rng = np.random.default_rng(seed)
    names = words(workload.vocab)
    with (folder / PROMPTS).open("w", encoding="utf-8") as file:
        for _ in range(workload.prompts):
            tokens = rng.integers(workload.vocab, size=workload.prompt_length)
            row = {"problem": " ".join(names[token] for token in tokens), "answer": "e"}
            file.write(json.dumps(row) + "\n")


def prompt_texts(folder: pathlib.Path) -> list[str]:
    """Reads the prompts from `write`."""
    lines = (folder / PROMPTS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["problem"] for line in lines]


def _write_tokenizer(folder, workload):
    names = words(workload.vocab)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {name: token for token, name in enumerate(names)},
            "unk_token": names[0],
        },
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
