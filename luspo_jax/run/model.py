"""The model of a configuration: architecture, folder and tokenizer."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from luspo_jax.hosts.values import ConfigError
from luspo_jax.models.decoder_config import DecoderConfig, decoder_config, read_config
from luspo_jax.models.locate import model_folder
from luspo_jax.run.settings import Config, section


@dataclasses.dataclass(frozen=True)
class Model:
    """The policy's architecture, the folder it came from, and its tokenizer."""

    folder: pathlib.Path
    config: DecoderConfig
    tokenizer: Any

    def decode(self, tokens: np.ndarray) -> str:
        """Decodes response tokens, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a response: those of the model and of the tokenizer."""
        own = self.tokenizer.eos_token_id
        return tuple(sorted({*self.config.eos_token_ids, *([] if own is None else [own])}))

    @property
    def pad_token_id(self) -> int:
        """The token that pads; any will do, as segment ids mark padding."""
        return self.tokenizer.pad_token_id or 0


def load_model(config: Config) -> Model:
    """Loads architecture and tokenizer of `config.model`."""
    settings = section(config, "model")
    from transformers import AutoTokenizer  # Slow to import; nothing else here needs it.

    folder = model_folder(settings.path)
    if settings.random_weights:
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: model.path must hold a config.json")
        hf = json.loads(path.read_text()) | settings.overrides
        architecture = decoder_config(hf)
    else:
        architecture = read_config(folder)
    source = model_folder(settings.tokenizer) if settings.tokenizer else folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers raises many types for a missing or broken file
        raise FileNotFoundError(
            f"no tokenizer could be read from {source} ({str(error).splitlines()[0][:200]}): put "
            "tokenizer files there, or name another folder in model.tokenizer"
        ) from error
    model = _with_stops(settings, Model(folder, architecture, tokenizer))
    if len(tokenizer) > architecture.vocab_size:
        raise ConfigError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens and the model of {folder} a "
            f"vocabulary of {architecture.vocab_size}: they do not belong together"
        )
    return model


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
