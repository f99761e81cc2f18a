"""Models that a machine is measured with, as cases of the rehearsal on one of its devices."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.machine.rates import PRODUCT, READING
from experiments.machine.records import Skipped
from experiments.machine.running import Known
from experiments.rehearsal import case as cases
from experiments.rehearsal.case import Case
from experiments.rehearsal.topologies import Chip, Topology
from luspo_jax.models import decoder_weights
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.run.fields import assign, default_config
from luspo_jax.run.memory import device_memory
from luspo_jax.types import TrainState

STATE_BYTES = 16  # a parameter: float32 weight, two moments, gradient
RESERVE = 0.1  # of the memory: the compiler's and jax's


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's shape.

    Attributes:
      name: of it.
      path: whose config.json is read.
      layers: how many of its layers; 0 for all.
    """

    name: str
    path: str
    layers: int = 0

    def __str__(self) -> str:
        return f"{self.name}, {self.layers} layers" if self.layers else self.name

    @property
    def large(self) -> bool:
        """Whether its rows may be long."""
        return model(self).max_position >= 2048


LARGE = Shape("Qwen2.5-7B", "hub:Qwen/Qwen2.5-7B")
SMALL = Shape("Qwen3-0.6B", "hub:Qwen/Qwen3-0.6B")
TINY = Shape("SmolLM2-135M", "hub:HuggingFaceTB/SmolLM2-135M-Instruct")
LEAST = Shape("label_sums", "embedded:label_sums")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a measured step.

    Attributes:
      rows: responses that are trained on, and decoded together.
      prompt, response: tokens of each.
      microbatches: in which an update is computed.
    """

    rows: int
    prompt: int
    response: int
    microbatches: int = 1


def topology(known: Known) -> Topology:
    """Returns the one device that is measured, with its measured rates."""
    dtype = "float32" if known.on_cpu else "bfloat16"
    memory, bandwidth = device_memory(known.device), known.rate(READING)
    chip = Chip(
        known.device.platform, memory, RESERVE * memory, known.rate(PRODUCT, dtype), bandwidth,
        bandwidth, 0.0, 1, (), f"measured here, products in {dtype}",
    )  # fmt: skip
    return Topology("local", chip, (known.device,))


def case(known: Known, shape: Shape, sizes: Sizes, **changes: object) -> Case:
    """Returns a run of a shape whose responses are all of one length.

    Args:
      known: has the measured rates.
      shape: of the model; its weights are random.
      sizes: of the step.
      changes: other fields of the configuration, with __ for a dot.
    """
    config = default_config()
    dtype = "float32" if known.on_cpu else "bfloat16"
    overrides = {"num_hidden_layers": shape.layers} if shape.layers else {}
    given = {
        "model.path": shape.path,
        "model.random_weights": True,
        "model.overrides": overrides,
        "model.stop_token_ids": "none",
        "model.dtype": dtype,
        "model.rollout_dtype": dtype,
        "data.name": "label_sums",  # a dataset and a reward must be named; none is read
        "data.max_prompt_length": sizes.prompt,
        "reward.parts": {"gsm8k": 1.0},
        "rollout.prompts_per_step": sizes.rows // 2,
        "rollout.group_size": 2,
        "rollout.max_response_length": sizes.response,
        "rollout.num_slots": sizes.rows,
        "rollout.chunk_length": 16,
        "rollout.cache_gb": 0.0,
        "train.num_microbatches": sizes.microbatches,
        "train.num_length_buckets": 1,
        "objective.preset": "luspo",
    }
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    assign(config, given)
    return cases.build(config, topology(known), mean_length=sizes.response)


def parameters(shape: Shape) -> int:
    """Counts the parameters of a shape."""
    return decoder_weights.num_params(model(shape))


@functools.cache
def model(shape: Shape) -> DecoderConfig:
    """Returns the decoder of a shape."""
    config = default_config()
    overrides = {"num_hidden_layers": shape.layers} if shape.layers else {}
    assign(config, {"model.path": shape.path, "model.overrides": overrides})
    return cases.architecture(config)


def usable(known: Known) -> float:
    """Returns the bytes of the device that programs may fill now."""
    stats = known.device.memory_stats() or {}
    return (1 - RESERVE) * device_memory(known.device) - stats.get("bytes_in_use", 0)


def fitted(known: Known, shape: Shape, beside: float) -> Shape:
    """Returns the shape, or as many of its layers as can be trained.

    Args:
      known: the machine.
      shape: to train.
      beside: share of the memory for activations.

    Raises:
      Skipped: not even two layers fit.
    """
    room = usable(known) * (1 - beside) / STATE_BYTES
    whole = parameters(shape)
    if whole <= room:
        return shape
    layers = model(shape).num_layers
    one = parameters(dataclasses.replace(shape, layers=2)) - parameters(
        dataclasses.replace(shape, layers=1)
    )
    fit = math.floor(layers - (whole - room) / one)
    if fit < 2:
        needed = STATE_BYTES * parameters(dataclasses.replace(shape, layers=2)) / 1e9
        raise Skipped(
            f"two layers of {shape.name} take {needed:.1f} GB to train beside activations, and "
            f"there are {usable(known) / 1e9:.1f}"
        )
    return dataclasses.replace(shape, layers=fit)


def chosen(known: Known, tokens: int) -> Shape:
    """Returns the largest shape of which a CPU trains so many tokens in time and memory.

    It is expected to reach a third of its matrix rate, and may take a sixteenth of the time that is
    left for each step.
    """
    if known.tiny:
        return LEAST
    rate = known.rate(PRODUCT, "float32")
    for shape in (SMALL, TINY):
        seconds = 3 * 6 * parameters(shape) * tokens / rate
        if 16 * seconds < known.left and 2 * STATE_BYTES * parameters(shape) < usable(known):
            return shape
    return LEAST


def random_tree(tree: Any, seed: int = 0) -> Any:
    """Returns a tree of shapes as arrays: matrices with deviation 0.02, norms 1, biases 0.

    One after the other, so that no more than the largest exists twice.
    """

    def one(path, x):
        name = path[-1].key
        if name in ("scale", "bias"):
            return jnp.full(x.shape, float(name == "scale"), x.dtype)
        number = seed + sum(map(ord, jax.tree_util.keystr(path)))
        return _hashed(np.uint32(number), x.shape, x.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _hashed(seed, shape, dtype):
    """Numbers between ±0.02·√3 that look random, by a hash of their places, which compiles fast."""
    bits = jax.lax.iota(jnp.uint32, math.prod(shape)) + seed * jnp.uint32(0x9E3779B9)
    for factor, shift in ((0x7FEB352D, 15), (0x846CA68B, 16)):
        bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
    uniform = (bits >> jnp.uint32(8)).astype(jnp.float32) * jnp.float32(2.0**-23) - 1
    return (0.02 * math.sqrt(3) * uniform).astype(dtype).reshape(shape)


def random_state(made: Case) -> TrainState:
    """Returns a train state of random weights that has taken no step."""
    abstract = made.state
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), dataclasses.replace(abstract, params=None)
    )
    return dataclasses.replace(zeros, params=random_tree(abstract.params))
