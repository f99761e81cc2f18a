"""The model of a configuration: architecture, folder and tokenizer."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np

from luspo_jax.hosts import fetched
from luspo_jax.hosts.values import ConfigError
from luspo_jax.models import decoder
from luspo_jax.models.decoder_config import DecoderConfig, decoder_config, read_config
from luspo_jax.models.locate import model_folder
from luspo_jax.run.settings import Config, section

# By these the answer is found: they stay in the text where a tokenizer counts them as special.
_TAGS = ("<think>", "</think>")
_PROBE = "If a + b = 4,\nthen 2 a is 8 - 2 b."


@dataclasses.dataclass(frozen=True)
class Model:
    """The policy's architecture, the folder it came from, and its tokenizer."""

    folder: pathlib.Path
    config: DecoderConfig
    tokenizer: Any

    def decode(self, tokens: np.ndarray) -> str:
        """Decodes response tokens, without special tokens but with the tags of reasoning."""
        hidden = self._hidden
        if hidden is None:
            return self.tokenizer.decode(tokens, skip_special_tokens=True)
        return self.tokenizer.decode([t for t in tokens.tolist() if t not in hidden])

    @functools.cached_property
    def _hidden(self) -> frozenset[int] | None:
        """Special tokens other than the tags; None if no tag is special."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {str(token): index for index, token in added.items() if token.special}
        if special.keys().isdisjoint(_TAGS):
            return None
        return frozenset(index for text, index in special.items() if text not in _TAGS)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a response: those of the model and of the tokenizer."""
        own = self.tokenizer.eos_token_id
        return tuple(sorted({*self.config.eos_token_ids, *([] if own is None else [own])}))

    @property
    def pad_token_id(self) -> int:
        """The token that pads; any will do, as segment ids mark padding."""
        return self.tokenizer.pad_token_id or 0


@fetched.addressed()
def load_model(config: Config, *, weights: bool = True) -> Model:
    """Loads architecture and tokenizer of `config.model`.

    Args:
      config: the configuration.
      weights: whether weights are downloaded too, of a model on the hub; none are read here.
    """
    settings = section(config, "model")
    from transformers import AutoTokenizer  # Slow to import; nothing else here needs it.

    folder = model_folder(settings.path, weights=weights)
    if settings.random_weights:
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: model.path must hold a config.json")
        hf = json.loads(path.read_text()) | settings.overrides
        architecture = decoder_config(hf)
    else:
        architecture = read_config(folder)
    source = model_folder(settings.tokenizer, weights=False) if settings.tokenizer else folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers raises many types for a missing or broken file
        raise FileNotFoundError(
            f"no tokenizer could be read from {source} ({str(error).splitlines()[0][:200]}): put "
            "tokenizer files there, or name another folder in model.tokenizer"
        ) from error
    _check_spaces(tokenizer, source)
    _check_sampler(settings, architecture)
    model = _with_stops(settings, Model(folder, architecture, tokenizer))
    if len(tokenizer) > architecture.vocab_size:
        raise ConfigError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens and the model of {folder} a "
            f"vocabulary of {architecture.vocab_size}: they do not belong together"
        )
    return model


def _check_sampler(settings, architecture):
    """Refuses a type of the sampler's weights that does not cover the model."""
    try:
        decoder.param_axes(architecture, settings.rollout_dtype)
    except ValueError as error:
        raise ConfigError(
            f"model.rollout_dtype={settings.rollout_dtype}: {error} of a {architecture.model_type} "
            "model: use bfloat16"
        ) from None


def _check_spaces(tokenizer, source):
    """Refuses a tokenizer that loses spaces which its own tokenizer.json keeps.

    Early transformers 5 gave every file that calls itself LlamaTokenizerFast, as DeepSeek's do,
    Llama's way with spaces, without a warning (huggingface/transformers issue 45488).
    """

    def kept(ids_of, text_of):
        # The tokenizer of a small task may know none of these characters; Llama's adds a space.
        return text_of(ids_of(_PROBE, add_special_tokens=False)).strip() == _PROBE

    file = source / "tokenizer.json"
    if kept(tokenizer.encode, tokenizer.decode) or not file.is_file():
        return
    import tokenizers

    own = tokenizers.Tokenizer.from_file(str(file))
    if kept(lambda text, **how: own.encode(text, **how).ids, own.decode):
        raise ConfigError(
            f"the tokenizer of {source} was read as a {type(tokenizer).__name__}, which loses "
            "spaces that its tokenizer.json keeps: pip install -U transformers, or set "
            '"tokenizer_class": "PreTrainedTokenizerFast" in a copy of its tokenizer_config.json '
            "and name that folder in model.tokenizer"
        )


def _with_stops(settings, model):
    """Returns the model with `model.stop_token_ids` added to the tokens that end a response."""
    own, size = settings.own_stop_ids, model.config.vocab_size
    if any(token >= size for token in own):
        raise ConfigError(
            f"model.stop_token_ids={settings.stop_token_ids!r} must be tokens of the model's "
            f"vocabulary of {size}"
        )
    ids = tuple(sorted({*model.config.eos_token_ids, *own}))
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_ids=ids))
    if not model.stop_token_ids and settings.stop_token_ids != "none":
        raise ConfigError(
            f"no token ends a response: neither config.json nor generation_config.json of "
            f"{model.folder} nor its tokenizer names an eos token, and every response would be cut "
            "at its limit: add eos_token_id to generation_config.json, or set model.stop_token_ids "
            '("none" where that is meant)'
        )
    return model
