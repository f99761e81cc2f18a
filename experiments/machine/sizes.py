"""Micro-batches of an update chosen by measuring it on this machine, and remembered.

`python -m experiments.train … --measure_sizes` times updates of random weights at the run's shapes:
as configured, in rows of one response each, and in packed rows of several lengths. The fastest is
kept in a file of the user's cache; the next run of such shapes takes it from there, and a run that
is continued keeps its own.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.command import UsageError
from experiments.machine import training
from experiments.machine.advice import estimated_bytes
from experiments.machine.rates import processor
from experiments.machine.running import out_of_memory
from experiments.machine.units import shown_time
from experiments.rehearsal import case as cases
from experiments.rehearsal import topologies
from experiments.rehearsal.case import Case
from experiments.rehearsal.search import changed
from experiments.rehearsal.topologies import Topology
from luspo_jax.hosts import files
from luspo_jax.hosts.values import ConfigError
from luspo_jax.run import fields
from luspo_jax.sharding import MeshError

CHUNK = "model.head_chunk_tokens"
FIELDS = (
    *("train.packing", "train.pack_length", "train.microbatch_tokens", "train.num_microbatches"),
    CHUNK,
)
FILE = "sizes.json"
Sizes = dict[str, Any]  # field → value

_TOKENS = (1024, 2048, 4096, 8192, 16384)  # of a device's packed micro-batch
_ROWS = (1, 2, 4, 8, 16)  # micro-batches of an update in rows of one response each
_CHUNKS = (128, 256, 512, 1024, 2048, 4096)  # tokens whose logits exist at once
_ENOUGH = 1.1  # so many times the least seconds end the search among larger ones
_LIKE_NOW = 0.97  # what is not faster than this part of the configured sizes is no reason to move


def resolved(
    config: ConfigDict,
    known: ConfigDict | None,
    *,
    mean_length: float | None = None,
    say: Callable[[str], None] = print,
    cache: pathlib.Path | None = None,
    topology: Topology | None = None,
) -> ConfigDict:
    """Returns the configuration with measured sizes.

    Args:
      config: of the run.
      known: the configuration of the run that is continued, whose sizes hold; None of a new one.
      mean_length: assumed mean tokens of a response; by default a quarter of the longest.
      say: told what is measured.
      cache: folder of the file that remembers; by default the user's cache.
      topology: the machine; by default all local devices.

    Raises:
      UsageError: a run of several processes or with images, which are not measured.
      ConfigError, MeshError: incompatible fields.
    """
    if known is not None:
        return with_sizes(config, _sizes_of(known))
    if jax.process_count() > 1:
        raise UsageError(
            "--measure_sizes measures one process: of several, take experiments.rehearse --search"
        )
    topology = topology or topologies.topology("local")
    made = cases.build(config, topology, mean_length=mean_length)
    if made.lengths.images:
        raise UsageError("--measure_sizes does not measure images: experiments.rehearse --search")
    file = (cache or files.user_cache()) / FILE
    key, remembered = _key(made), _read(file, say)
    if key in remembered:
        sizes = remembered[key]["sizes"]
        say(f"sizes     : {shown(sizes)}; measured before ({file})")
        return with_sizes(config, sizes)
    seconds = measured(made, say)
    sizes = fastest(seconds, _sizes_of(made.config))
    tried = [{"sizes": dict(each), "seconds": s} for each, s in seconds]
    remembered = _read(file, say) | {key: {"sizes": sizes, "tried": tried, "of": _described(made)}}
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(file, json.dumps(remembered, indent=1, sort_keys=True) + "\n")
    say(f"sizes     : {shown(sizes)}; measured, kept in {file}")
    return with_sizes(config, sizes)


def with_sizes(config: ConfigDict, sizes: Sizes) -> ConfigDict:
    """Returns a copy of the configuration with these sizes."""
    config = config.copy_and_resolve_references()
    fields.assign(config, sizes)
    return config


def shown(sizes: Sizes) -> str:
    """Describes sizes in a line, as flags."""
    unset = {"train.pack_length": 0, "train.microbatch_tokens": 0, "train.num_microbatches": 1}
    told = {name: value for name, value in sizes.items() if value != unset.get(name)}
    return " ".join(f"--config.{name}={value}" for name, value in told.items())


def options(made: Case) -> Iterator[list[Sizes]]:
    """Yields lists of sizes: rows of one response in more and more parts; longer dense rows."""
    responses, chunk = made.sizes.responses_per_minibatch, made.config.model.head_chunk_tokens
    own = [count for count in _ROWS if responses % count == 0]
    base = {"train.packing": False, "train.pack_length": 0, "train.microbatch_tokens": 0}
    yield [{**base, "train.num_microbatches": count, CHUNK: chunk} for count in own]
    parts, longest = made.train_parts.batch, made.sizes.tokens_per_row
    most = responses * longest
    lengths = sorted({max(longest, tokens) for tokens in _TOKENS if tokens <= most} or {longest})
    yield [
        {
            "train.packing": True,
            "train.pack_length": length,
            "train.microbatch_tokens": length * parts,
            "train.num_microbatches": 1,
            CHUNK: chunk,
        }
        for length in lengths
    ]


def measured(made: Case, say: Callable[[str], None]) -> list[tuple[Sizes, float]]:
    """Returns sizes and least seconds of an update, for all that was measured, as configured first.

    The head's chunks are varied with the fastest rows. Sizes that do not fit are left out, and in a
    list of options those after a slower one.
    """
    say(
        f"sizes     : measuring updates of {made.sizes.responses_per_minibatch} responses, "
        f"{made.lengths.mean:g} tokens each on average"
    )
    found: list[tuple[Sizes, float]] = []
    for group in ([_sizes_of(made.config)], *options(made)):
        _measure(made, group, found, say)
    if not found:
        raise UsageError(
            "--measure_sizes: no update fits: make rows shorter (experiments.rehearse)"
        )
    best = min(found, key=lambda pair: pair[1])[0]
    larger = [chunk for chunk in _CHUNKS if chunk > best[CHUNK]]
    smaller = [chunk for chunk in reversed(_CHUNKS) if chunk < best[CHUNK]]
    for chunks in (larger, smaller):
        _measure(made, [best, *({**best, CHUNK: chunk} for chunk in chunks)], found, say)
    return found


def _measure(made, group, found, say):
    """Adds what was measured of a list of sizes, until one is slower than those before."""
    known, least = {shown(sizes): seconds for sizes, seconds in found}, None
    for sizes in group:
        seconds = known.get(shown(sizes))
        if seconds is None:
            seconds = _seconds(made, sizes)
            if seconds is None:
                say(f"            {shown(sizes)}: does not fit")
                continue
            say(f"            {shown(sizes)}: {shown_time(seconds)}")
            found.append((sizes, seconds))
        if least is not None and seconds > _ENOUGH * least:
            return
        least = seconds if least is None else min(seconds, least)


def fastest(seconds: list[tuple[Sizes, float]], now: Sizes) -> Sizes:
    """Returns the sizes of least seconds, or those of now if nothing is clearly faster."""
    best, least = min(seconds, key=lambda pair: pair[1])
    for sizes, taken in seconds:
        if sizes == now and least > _LIKE_NOW * taken:
            return sizes
    return best


def _seconds(made, sizes):
    """Least seconds of an update; None if it does not fit."""
    try:
        other = changed(made, sizes)
    except (ConfigError, MeshError):
        return None
    if estimated_bytes(other) > other.topology.chip.usable:
        return None
    try:
        return training.timed(other)[0]
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        return None


def _sizes_of(config):
    return {name: config[section][field] for name in FIELDS for section, field in [name.split(".")]}


def _described(made):
    """What decides which sizes are fastest."""
    device = made.topology.devices[0]
    how = made.rule.logprobs.how
    return {
        "device": f"{len(made.topology.devices)} × {device.device_kind}",
        "processor": processor() if device.platform == "cpu" else "",
        "jax": jax.__version__,
        "model": dataclasses.asdict(made.model),
        "how": [how.dtype, how.products, how.attention, how.remat],
        "adapter": str(made.adapter),
        "mesh": str(made.layouts[0] and made.layouts[0].mesh.shape),
        "responses": [made.sizes.group_size, made.sizes.responses_per_minibatch],
        "lengths": dataclasses.asdict(made.lengths),
        "objective": made.rule.objective.kl_coef > 0,
        "configured": _sizes_of(made.config),
        "share_prompts": made.config.train.share_prompts,
    }


def _key(made):
    text = json.dumps(_described(made), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(file, say):
    """What the file remembers; nothing if it cannot be read, which is said."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        if not all(set(each["sizes"]) == set(FIELDS) for each in found.values()):
            raise ValueError("an entry has other sizes")
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        say(f"sizes     : {file} cannot be read ({error}) and is written anew")
        return {}
    return found
