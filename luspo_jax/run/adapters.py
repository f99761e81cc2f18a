"""The low-rank adapter of a run: which matrices it has, how it begins, and its frozen weights."""

import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from luspo_jax.datasets.store import file_sha256
from luspo_jax.hosts.roles import Roles
from luspo_jax.hosts.values import ConfigError
from luspo_jax.models import (
    adapter_files,
    decoder,
    decoder_weights,
    low_rank,
    safetensors_folder,
)
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.forward import Forward
from luspo_jax.models.low_rank import Adapter
from luspo_jax.run.model import Model
from luspo_jax.run.settings import Config, section

_DRAW = 1  # folded into the key of the run's seed, which itself draws random weights


def adapter(config: Config, model: DecoderConfig) -> Adapter | None:
    """Returns the adapter that a configuration asks for; None where weights are trained.

    Raises:
      ConfigError: the model has no such matrices, or smaller ones than the rank.
    """
    asked = section(config, "lora")
    if not asked.rank:
        return None
    made = Adapter(
        rank=asked.rank,
        alpha=asked.alpha,
        targets=asked.names,
        experts=asked.experts,
        vision=asked.vision,
        rslora=asked.rslora,
        init=asked.init,
        base=asked.base,
    )
    for field, has in (("experts", model.num_experts), ("vision", model.vision)):
        if getattr(asked, field) and not has:
            raise ConfigError(f"lora.{field} is set, and the model of {config.model.path} has none")
    if asked.vision and getattr(config.train, "freeze_vision", True):
        raise ConfigError(
            "lora.vision trains a tower that stays as it is in this run (train.freeze_vision, or "
            "supervised fine-tuning): leave it out"
        )
    shapes, places = (
        decoder.abstract_params(model),
        low_rank.places(decoder.param_axes(model), made),
    )
    if not places:
        raise ConfigError(
            f"lora.targets={asked.targets}: the model has these in its experts alone: set "
            "lora.experts=True, or adapt its attention too"
        )
    for path, place in places.items():
        least = min(place.sizes(low_rank.at(shapes, path).shape))
        if asked.rank > least:
            raise ConfigError(
                f"lora.rank={asked.rank} exceeds the {least} of the smaller side of "
                f"{'/'.join(path[:-1])}: an adapter of more than its rank adds nothing"
            )
    return made


def beginning(config: Config, model: Model, how: Forward) -> tuple[Any, Any]:
    """Returns (what is trained, base) as a run begins: (weights, None), or (adapter, weights)."""
    made = how.adapter
    # Principal parts are taken of the weights before they are rounded.
    dtype = jnp.float32 if made is None or made.init == "pissa" else low_rank.float_type(made)
    if config.model.random_weights:
        key = jax.random.key(config.seed)
        weights = decoder.init_params(key, model.config, dtype, layout=how.layout)
    else:
        weights = decoder_weights.load_params(
            model.folder, model.config, dtype=dtype, layout=how.layout
        )
    if made is None:
        return weights, None
    key = jax.random.fold_in(jax.random.key(config.seed), _DRAW)
    base, trained = low_rank.begun(key, weights, decoder.param_axes(model.config), made, how.layout)
    start = section(config, "lora").start
    if start:
        stored = adapter_files.read(start, model.config, made)
        trained = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), stored, trained)
    return trained, base


def check_rollout(config: Config, made: Adapter | None, roles: Roles) -> None:
    """Refuses an adapter apart from its weights in a rollout that cannot read the trainer's.

    Raises:
      ConfigError: naming the field to change.
    """
    if config.rollout.lora == "merged":
        return
    if made is None:
        raise ConfigError("rollout.lora=apart is of an adapter, and lora.rank=0 trains the weights")
    if config.model.rollout_dtype == "int8":
        raise ConfigError(
            "rollout.lora=apart reads the weights as lora.base stores them: set that, and "
            "model.rollout_dtype to the type of activations"
        )
    if roles.split:
        raise ConfigError(
            "rollout.lora=apart is not implemented where processes sample that do not train: use "
            "rollout.lora=merged with rollout_mesh.apart over several processes"
        )


def copies_reference(config: Config) -> bool:
    """Whether a KL term's reference is another policy than the frozen weights alone."""
    asked = section(config, "lora")
    if not asked.rank or asked.start or config.train.ref_every > 0:
        return True
    return asked.init == "pissa"  # whose principal parts are missing in the frozen weights


def facts(config: Config, model: Model, made: Adapter | None) -> dict[str, Any]:
    """Returns what a run with an adapter depends on besides its configuration; {} without one.

    A checkpoint does not hold the frozen weights: a resumed run reads them again, and is refused
    if they are others.
    """
    if made is None:
        return {}
    found = {"adapter_parameters": num_trained(model.config, made)}
    if not config.model.random_weights:
        stored = safetensors_folder.contents(model.folder)
        digests = [file_sha256(file) for file in sorted({one.file for one in stored.values()})]
        found["base_sha256"] = hashlib.sha256("".join(digests).encode()).hexdigest()
    start = section(config, "lora").start
    if start:
        found["start_sha256"] = file_sha256(pathlib.Path(start) / adapter_files.WEIGHTS)
    return found


def num_trained(model: DecoderConfig, made: Adapter) -> int:
    """Counts the numbers of an adapter."""
    shapes = decoder.abstract_trained(Forward(model, adapter=made))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
