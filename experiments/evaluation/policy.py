"""The evaluated model: a Hugging Face folder, one in the package, or a run's weights."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from luspo_jax import sharding
from luspo_jax.hosts.buckets import Bucket, is_bucket
from luspo_jax.learner.state import abstract_state, policy_params, with_base
from luspo_jax.models import decoder, decoder_weights
from luspo_jax.rollout.handover import rollout_params
from luspo_jax.run import adapters, fields
from luspo_jax.run import workdir as workdirs
from luspo_jax.run.build import update_rule
from luspo_jax.run.checkpoint import Checkpointer, CheckpointError
from luspo_jax.run.checks import check_sft
from luspo_jax.run.model import Model, load_model
from luspo_jax.run.settings import kind_of, section
from luspo_jax.run.sft import build as sft
from luspo_jax.run.sft.sections import SftSettings
from luspo_jax.sharding import Layout, MeshError


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with its weights.

    Attributes:
      name: the user's name for it, and the step of a run.
      model: architecture, tokenizer, folder.
      params: weights in the dtype of sampling.
      layout: their layout; None on one device.
      digest: twelve hex digits that change with any weight.
      pixels: least and most pixels of an image, if a run sets them; 0 for the model's own.
    """

    name: str
    model: Model
    params: Any
    layout: Layout | None
    digest: str
    pixels: tuple[int, int] = (0, 0)


def load(path: str, *, step: str, dtype: str, tensor: int = 1) -> Policy:
    """Loads the policy at a path, as given to `--model`.

    Args:
      path: a folder with config.json and safetensors, embedded:NAME, gguf:FILE, hub:OWNER/NAME, or
        the workdir of a run; folders and workdirs also by their addresses in a bucket.
      step: latest, best or a number; for a run only.
      dtype: float32 or bfloat16.
      tensor: devices that share one copy of the weights; there are as many copies as fit.

    Raises:
      FileNotFoundError, CheckpointError, WorkdirError, WeightsError: missing files, named in the
        message.
      MeshError: `tensor` does not divide the devices or the model.
    """
    layout = sharding.layout("rollout", {"data": -1, "tensor": tensor})
    if _is_run(path):
        return _of_run(path, step, dtype, layout)
    config = fields.default_config()
    config.model.path = path
    model = load_model(config)
    _check(model, layout)
    params = decoder_weights.load_params(
        model.folder, model.config, dtype=jnp.dtype(dtype), layout=layout
    )
    return _policy(path, model, params, dtype, layout)


def _is_run(path: str) -> bool:
    if is_bucket(path):
        return Bucket(path).read("run.json") is not None
    return (pathlib.Path(path) / "run.json").is_file()


def _of_run(workdir: str, step: str, dtype: str, layout: Layout | None) -> Policy:
    stored = stored_policy(workdir, step, spread=layout is not None)
    _check(stored.model, layout)
    name, data = f"{workdir} step {stored.step}", stored.config.data
    policy = _policy(name, stored.model, stored.params, dtype, layout)
    pixels = tuple(getattr(data, f"{name}_pixels", 0) for name in ("min", "max"))
    return dataclasses.replace(policy, pixels=pixels)


@dataclasses.dataclass(frozen=True)
class StoredPolicy:
    """The policy in a run's checkpoint, and its step."""

    config: ConfigDict
    model: Model
    params: Any
    step: int


def stored_policy(workdir: str | os.PathLike, step: str, *, spread: bool = False) -> StoredPolicy:
    """Loads the policy of a run's checkpoint; changes nothing there, and needs no data file.

    Args:
      workdir: of the run, which may be in progress; a folder or the address of a bucket.
      step: latest, best or a number.
      spread: whether to shard it over all devices.

    Raises:
      CheckpointError, WorkdirError: missing or damaged files, named in the message.
    """
    config = workdirs.stored_config(workdir)
    with contextlib.closing(
        Checkpointer(workdirs.checkpoint_folder(workdir), read_only=True)
    ) as checkpointer:
        number = chosen_step(checkpointer, step)
        if number is None:
            raise CheckpointError(f"{workdir} holds no {step} checkpoint")
        model = load_model(config)
        # The optimizer's state comes along with the weights, so all of it is cut over the devices.
        cut = sharding.layout("train", {"fsdp": -1}) if spread else None
        if sharding.misfits(cut, {"hidden_size": ("embed", model.config.embed_dim)}):
            cut = sharding.layout("train", {"data": -1})
        rule, marked = _rule(config, model, cut)
        state, _, _ = checkpointer.restore(number, abstract_state(rule, marked=marked))
    how = rule.logprobs.how
    if how.adapter is not None:
        state = with_base(state, adapters.beginning(config, model, how)[1])
    return StoredPolicy(config, model, policy_params(state, how), number)


def _rule(config, model, layout):
    """Returns the rule of a run of either kind, and whether its state has room for a mark."""
    if kind_of(config) is SftSettings:
        return sft.update_rule(check_sft(config), model, layout), False
    return update_rule(config, model, layout), section(config, "length").every > 0


def _check(model, layout):
    sizes = {n: s for n, s in decoder.cut_sizes(model.config).items() if n != "hidden_size"}
    problems = sharding.misfits(layout, sizes)
    if problems:
        raise MeshError("; ".join(problems) + "; choose another --tensor")


def chosen_step(checkpointer: Checkpointer, step: str) -> int | None:
    """Returns the number of the latest, best or numbered checkpoint; None if there is none.

    Raises:
      CheckpointError: neither of these words nor a number.
    """
    if step == "latest":
        return checkpointer.latest_step()
    if step == "best":
        return checkpointer.best_step()
    if not step.isdigit():
        raise CheckpointError(f"--step={step!r}: give latest, best or a number")
    return int(step)


def _policy(name, model, params, dtype, layout) -> Policy:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf).astype(np.float32)
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    if layout is None:
        cast = decoder.cast(jax.tree.map(jnp.asarray, params), jnp.dtype(dtype))
    else:
        cast = rollout_params(params, config=model.config, layout=layout, dtype=dtype)
    return Policy(name, model, cast, layout, digest.hexdigest()[:12])
