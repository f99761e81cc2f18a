"""A rehearsed case: a configuration resolved for a machine, without tokenizer, data or weights."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.command import UsageError
from experiments.rehearsal import costs, partial, playing, tower
from experiments.rehearsal.topologies import Topology
from luspo_jax import sharding
from luspo_jax.learner.plan import Plan
from luspo_jax.learner.programs import StepPrograms
from luspo_jax.learner.rows import Planner
from luspo_jax.learner.state import (
    UpdateRule,
    abstract_base,
    abstract_state,
    policy_params,
    with_base,
)
from luspo_jax.models import locate
from luspo_jax.models.decoder_config import DecoderConfig, decoder_config
from luspo_jax.models.low_rank import Adapter
from luspo_jax.ops.sizes import rounded_up
from luspo_jax.rollout import Engine
from luspo_jax.run import adapters, checks
from luspo_jax.run.arithmetic import BatchArithmetic, batch_arithmetic
from luspo_jax.run.build import layouts, planner, roles, sampler, update_rule
from luspo_jax.run.memory import param_bytes, trained_bytes
from luspo_jax.run.model import Model
from luspo_jax.sharding import Layout
from luspo_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Assumed token counts: every prompt has `prompt`, responses `power_lengths`.

    A prompt's tokens include its `images`, None if there are none.
    """

    prompt: int
    mean: float
    longest: int
    images: tower.Pictures | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration on a machine.

    Attributes:
      layouts: layouts of training, and of the rollout over all hosts.
      engine: the engine that samples on one host.
      held_out: the engine that samples held-out problems there.
    """

    config: ConfigDict
    topology: Topology
    lengths: Lengths
    model: DecoderConfig
    rule: UpdateRule
    layouts: tuple[Layout | None, Layout | None]
    engine: Engine
    held_out: Engine

    @property
    def sizes(self) -> BatchArithmetic:
        """The batch arithmetic."""
        return batch_arithmetic(self.config)

    @functools.cached_property
    def planner(self) -> Planner:
        """How responses are laid into rows."""
        with device_of(self.topology):
            return planner(self.config, self.model, self.layouts[0])

    @property
    def programs(self) -> StepPrograms:
        """The programs of a step that train."""
        train = self.config.train
        return StepPrograms(self.rule, train.num_minibatches, train.num_epochs)

    @property
    def num_params(self) -> int:
        """Parameters of the model."""
        return param_bytes(self.model, None, jnp.float32) // 4

    @property
    def adapter(self) -> Adapter | None:
        """What is trained in place of the weights; None where they are."""
        return self.rule.logprobs.how.adapter

    @property
    def trained_bytes(self) -> int:
        """Returns the bytes on a device of what is trained, weights or adapter."""
        return trained_bytes(self.model, self.layouts[0], self.adapter)

    @property
    def checkpoint_bytes(self) -> int:
        """Returns the bytes of a checkpoint of all devices, which leaves frozen weights out."""
        one = trained_bytes(self.model, None, self.adapter)
        copies = (self.state.ref_params, self.state.marked_params)
        return one * (3 + sum(copy is not None for copy in copies))

    @property
    def hands_over(self) -> bool:
        """Whether the sampler has weights of its own; if not, it reads the trainer's."""
        if self.config.rollout.lora == "apart":
            return False
        as_they_are = self.layouts[0] is None and self.config.model.rollout_dtype == "float32"
        return self.adapter is not None or self.apart > 0 or not as_they_are

    @functools.cached_property
    def state(self) -> TrainState:
        """Shapes and places of the train state."""
        state = abstract_state(self.rule, marked=self.config.length.every > 0)
        return self.on(with_base(state, abstract_base(self.rule.logprobs.how)))

    def policy(self, name: str = "params") -> Any:
        """Returns shapes and places of what a forward pass of a policy reads."""
        return policy_params(self.state, self.rule.logprobs.how, name)

    @property
    def width(self) -> int:
        """Returns the bytes of a value in training's compute type."""
        return np.dtype(jnp.dtype(self.config.model.dtype)).itemsize

    @functools.cached_property
    def train_parts(self) -> costs.Parts:
        """Returns how training is sharded."""
        return costs.parts(self.layouts[0])

    @functools.cached_property
    def rollout_parts(self) -> costs.Parts:
        """Returns how a rollout is sharded over the devices of one host."""
        return costs.parts(self.engine.layout, length="cache_length")

    def on(self, tree: Any) -> Any:
        """Places shapes on the only device, if there is one; leaves them as they are on a mesh."""
        if self.layouts[0] is not None:
            return tree
        where = jax.sharding.SingleDeviceSharding(self.topology.devices[0])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    def on_host(self, tree: Any, axes_tree: Any) -> Any:
        """Places shapes on the devices of one host, by their logical axes."""
        layout = self.engine.layout
        single = jax.sharding.SingleDeviceSharding(self.topology.devices[0])
        leaves, treedef = jax.tree.flatten(tree)
        axes = jax.tree.leaves(axes_tree, is_leaf=lambda node: type(node) is tuple)
        placed = [
            jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=layout.sharding(names) if layout else single
            )
            for x, names in zip(leaves, axes, strict=True)
        ]
        return jax.tree.unflatten(treedef, placed)

    @functools.cached_property
    def response_lengths(self) -> list[int]:
        """Returns assumed lengths of a step's responses, shuffled by a fixed seed."""
        found = self._power_lengths(self.sizes.responses_per_step)
        return np.random.default_rng(0).permutation(found).tolist()

    def _power_lengths(self, count):
        return costs.power_lengths(self.lengths.mean, self.lengths.longest, count)

    def share(self, total: int) -> int:
        """Returns the largest number of `total` prompts on one host."""
        return -(-total // self.topology.hosts)

    def prefilled_images(self, prompts: int, multiple: int) -> int:
        """Returns the image rows of a prefill of `prompts` prompts on `multiple` devices."""
        images = self.lengths.images
        return rounded_up(prompts * images.count, multiple) if images else 0

    def responses(self, held_out: bool = False) -> int:
        """Returns the most responses of a step, or of a held-out evaluation, on one host."""
        if held_out:
            return self.share(self.config.eval.num_problems) * self.config.eval.num_samples
        rollout = self.config.rollout
        return self.share(rollout.prompts_per_step + rollout.overlap) * rollout.group_size

    @property
    def apart(self) -> int:
        """Devices that only sample, while the others train; 0 if all do both."""
        return self.config.rollout_mesh.apart

    @property
    def stale(self) -> bool:
        """Whether earlier policies sampled some of a step's tokens."""
        return self.config.rollout.overlap > 0 or self.apart > 0

    @functools.cached_property
    def sampled(self) -> playing.Played:
        """The rollout of a step on one host; with overlap, steady ones on all hosts."""
        rollout = self.config.rollout
        if not rollout.overlap:
            return self._played(self.engine, self.responses(), rollout.group_size)
        # What is sampled beside a step is one step old when it is trained on.
        max_age = rollout.max_age - (self.apart > 0)
        pace = partial.Pace(rollout.prompts_per_step, rollout.overlap, max_age, self.topology.hosts)
        return partial.steady(self.engine, self.lengths.prompt, self._lengths_of, pace)

    def _lengths_of(self, step):
        """Assumed lengths [prompts, responses] of the responses that a step begins."""
        lengths = self._power_lengths(self.sizes.responses_per_step)
        found = np.random.default_rng(step).permutation(lengths)
        return found.reshape(-1, self.config.rollout.group_size)

    @functools.cached_property
    def tested(self) -> playing.Played:
        """The rollout of a held-out evaluation on one host."""
        return self._played(self.held_out, self.responses(True), self.config.eval.num_samples)

    def _played(self, engine, count, group_size):
        order = np.random.default_rng(0).permutation(self._power_lengths(count))
        return playing.played(engine, self.lengths.prompt, order, group_size)


def architecture(config: ConfigDict) -> DecoderConfig:
    """Returns the decoder of `config.model`, from its config.json alone."""
    values = locate.architecture(config.model.path)
    return decoder_config({**values, **config.model.overrides.to_dict()})


class _NoTokenizer:
    """Replaces a run's tokenizer, whose tokens change no size."""

    eos_token_id = None
    pad_token_id = None


def build(
    config: ConfigDict,
    topology: Topology,
    *,
    mean_length: float | None = None,
    max_length: int | None = None,
    live: int = 0,
    images: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> Case:
    """Resolves a configuration for a machine.

    Args:
      config: of the run.
      topology: the machine.
      mean_length: assumed mean of the response lengths; by default a quarter of the longest.
      max_length: assumed longest response; by default the configuration's limit. Allocations follow
        it, but the packed rows' length does not.
      live: sequences decoded together on a host, replacing rollout.num_slots.
      images: assumed images of a prompt, if the model reads images; by default 1.
      image_size: (height, width) of each in pixels; by default the largest square allowed.

    Raises:
      ConfigError, MeshError, UsageError: a mismatch, before anything is compiled.
    """
    config = config.copy_and_resolve_references()
    if live:
        config.rollout.num_slots = live
    checks.check(config)
    if config.rollout.overlap and config.rollout.late == "drop":
        raise UsageError(
            "rollout.late='drop' trains on shorter responses than it samples, how much shorter is "
            "not known here: rehearse with rollout.late='wait', or with rollout.overlap=0"
        )
    if config.rollout_mesh.apart and topology.hosts > 1:
        raise UsageError(
            f"rollout_mesh.apart={config.rollout_mesh.apart} on {topology.hosts} hosts sends "
            "weights through their memory, at a rate that is not known here: rehearse with "
            "rollout_mesh.apart=0, or on one host"
        )
    longest = max_length or config.rollout.max_response_length
    if not 1 <= longest <= config.rollout.max_response_length:
        raise UsageError(
            f"--max_length={longest} must lie between 1 and rollout.max_response_length="
            f"{config.rollout.max_response_length}"
        )
    mean = mean_length or max(1.0, longest / 4)
    if not 1 <= mean <= longest:
        raise UsageError(f"--mean_length={mean:g} must lie between 1 and the longest, {longest}")
    model = Model(locate.EMBEDDED, architecture(config), _NoTokenizer())
    pictures = tower.assumed(config, model.config, images, image_size)
    laid = layouts(config, model.config, topology.devices)
    made = adapters.adapter(config, model.config)
    adapters.check_rollout(config, made, roles(config, topology.devices))
    own = laid[0], _on_a_host(topology, laid[1])
    with device_of(topology):
        return Case(
            config=config,
            topology=topology,
            lengths=Lengths(config.data.max_prompt_length, mean, longest, pictures),
            model=model.config,
            rule=update_rule(config, model, laid[0]),
            layouts=laid,
            engine=sampler(config, model, config.rollout, own, topology.chip.usable),
            held_out=sampler(config, model, config.eval, own, topology.chip.usable),
        )


def _on_a_host(topology, layout):
    """Returns the rollout's layout on `Topology.host`, if it has devices of its own."""
    own = sharding.on_own_devices(layout)
    if own is None or not topology.host:
        return layout
    grid = np.array(topology.host).reshape(own.mesh.devices.shape)
    return Layout(Mesh(grid, sharding.MESH_AXES), layout.table)


@contextlib.contextmanager
def device_of(topology: Topology) -> Iterator[None]:
    """Enters a context, or decorates: without a mesh, jax's default device sets the platform."""
    if len(topology.devices) > 1 or topology.name == "local":
        yield
        return
    with jax.default_device(topology.devices[0]):
        yield


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """What a planner reads of a prompt; those of one group have equal tokens."""

    tokens: np.ndarray
    images: tuple = ()


def plan(case: Case, responses: int, start: int = 0) -> Plan:
    """Where `responses` of a step, from the one numbered `start`, lie in rows, at the assumed
    lengths."""
    chosen = slice(start, start + responses)
    lengths_B = np.array(case.response_lengths[chosen]) + case.lengths.prompt
    groups = np.arange(responses) // case.sizes.group_size
    prompts = [_Prompt(np.full(case.lengths.prompt, group, np.int32)) for group in groups]
    return case.planner.plan(lengths_B, row_length(case), prompts)


def images_at_once(case: Case, responses: int) -> int:
    """Rows of images of every micro-batch of the first `responses` of a step: of the micro-batch
    with the most prompts, each prompt's once, rounded up as training does."""
    if case.lengths.images is None:
        return 0
    parts_B = plan(case, responses).parts_B
    prompts_B = np.arange(responses) // case.sizes.group_size
    most = max(len(np.unique(prompts_B[parts_B == part])) for part in np.unique(parts_B))
    layout = case.layouts[0]
    return rounded_up(most * case.lengths.images.count, layout.size("batch") if layout else 1)


def row_length(case: Case) -> int:
    """Tokens of the arrays that have one row a response."""
    return case.planner.width([case.lengths.prompt + case.lengths.longest])


def whole_host(case: Case) -> str:
    """Describes the meshes in words."""

    def words(layout):
        if layout is None:
            return "one device"
        named = [f"{k} {v}" for k, v in layout.mesh.shape.items() if v > 1]
        return " × ".join(named) or "one device"

    return f"training {words(case.layouts[0])}; a host's rollout {words(case.engine.layout)}"
