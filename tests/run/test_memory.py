"""What of a device's memory the rollout's pages get."""

import dataclasses
import json
import math

import jax
import pytest

from configs import quickstart
from luspo_jax import sharding
from luspo_jax.hosts.values import ConfigError
from luspo_jax.models import decoder, decoder_weights, low_rank
from luspo_jax.models.decoder_config import decoder_config
from luspo_jax.models.forward import Forward
from luspo_jax.models.locate import ARCHITECTURES
from luspo_jax.models.low_rank import Adapter
from luspo_jax.run import adapters, build, checks, memory
from luspo_jax.run.adapters import num_trained
from luspo_jax.run.memory import room_for_pages, state_memory
from luspo_jax.run.model import load_model

NOWHERE = (None, None)


@pytest.fixture(scope="module")
def model():
    return load_model(checks.check(quickstart.get_config()))


def _room(model, memory, **fields):
    config = quickstart.get_config()
    with config.unlocked():
        for name, value in fields.items():
            section, field = name.split("__")
            config[section][field] = value
    return room_for_pages(checks.check(config), model.config, NOWHERE, memory)


def test_pages_get_what_weights_and_state_leave(model):
    room = _room(model, 1e9)
    assert 0.5e9 < room < 0.9e9
    assert _room(model, 2e9) - room == pytest.approx(0.9e9)
    # Adam's two moments; a copy of the weights in two bytes; one more for the marked policy.
    one = 4 * sum(x.size for x in _leaves(model))
    assert _room(model, 1e9, train__offload="optimizer") - room == pytest.approx(2 * one)
    assert room - _room(model, 1e9, length__every=1) == pytest.approx(one)
    assert _room(model, 1e3) == 0


def _leaves(model):
    import jax

    from luspo_jax.models import decoder

    return jax.tree.leaves(decoder.abstract_params(model.config))


def _sampler(model, memory=None, **fields):
    config = quickstart.get_config()
    for name, value in fields.items():
        config.rollout[name] = value
    settings = checks.check(config)
    return build.sampler(settings, model, settings.rollout, NOWHERE, memory)


def test_the_pool_is_what_is_asked_for_and_never_more_than_can_be_used(model):
    asked = _sampler(model, cache_gb=0.001)
    assert asked.pool_bytes(128) == asked.pages_of(1e6, 128) * asked.page_bytes <= 1e6
    most = _sampler(model, memory=1e9)
    # 128 rows of 56 tokens: a page each, and the rest of a prompt; page 0.
    assert most.pages_of(most.cache.gb * 1e9, 128) == 1 + 128 * 2
    little = _sampler(model, memory=1e3)  # at least one response
    assert little.pages_of(little.cache.gb * 1e9, 128) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache_gb": 1e-6}, r"rollout\.cache_gb=1e-06 is too small: .*cache_gb=0\.000148"),
        ({"page_size": -1}, r"rollout\.page_size=-1"),
        ({"cache_dtype": "int4"}, r"rollout\.cache_dtype='int4'.*int8"),
    ],
)
def test_pages_that_cannot_be_are_refused_by_name(model, fields, message):
    with pytest.raises(ConfigError, match=message):
        _sampler(model, **fields)


def test_an_adapter_leaves_its_bytes_and_those_of_the_frozen_weights():
    """A 7B's state: 16 bytes a weight, or 2 (bfloat16), 1 or about 1/2, and 16 of an adapter."""
    model = decoder_config(json.loads((ARCHITECTURES / "Qwen--Qwen2.5-7B.json").read_text()))
    count = decoder_weights.num_params(model)
    whole = sum(state_memory(model, None).values())
    assert whole == 16 * count
    adapter = Adapter(rank=16, alpha=32.0)
    sizes = {
        kind: state_memory(model, None, dataclasses.replace(adapter, base=kind))
        for kind in low_rank.BASES
    }
    small = {kind: sum(found.values()) for kind, found in sizes.items()}
    trained = sizes["nf4"]["adapter (float32)"]
    assert small["bfloat16"] == 2 * count + 4 * trained
    assert trained == 4 * num_trained(model, adapter)
    tables = 2 * model.vocab_size * model.embed_dim  # embedding and head stay bfloat16
    matrices = count - tables
    assert small["nf4"] - 4 * trained == pytest.approx(2 * tables + matrices * (4.5 / 8), rel=1e-2)
    assert small["int8"] - 4 * trained == pytest.approx(2 * tables + matrices, rel=1e-2)


def test_a_rollout_that_reads_an_adapter_apart_has_a_part_of_its_own_on_a_mesh():
    model = decoder_config(json.loads((ARCHITECTURES / "Qwen--Qwen2.5-7B.json").read_text()))
    config = quickstart.get_config()
    config.lora.rank, config.lora.alpha, config.lora.base = 4, 8.0, "float32"
    config.rollout.lora = "apart"
    layout = sharding.layout("rollout", {"data": 2, "tensor": 4}, jax.devices())

    assert memory._rollout_weights(checks.check(config), model, None) == 0
    made = adapters.adapter(config, model)
    how = Forward(model, adapter=made)
    shapes = low_rank.composed(
        decoder.abstract_params(model), decoder.abstract_trained(how), made.scale
    )
    where = sharding.shardings(decoder.whole_axes(how), layout)
    expected = sum(
        4 * math.prod(place.shard_shape(x.shape))
        for x, place in zip(*map(jax.tree.leaves, (shapes, where)), strict=True)
    )
    found = memory._rollout_weights(checks.check(config), model, layout)
    assert found == expected > 0
    config.rollout.lora = "merged"
    assert memory._rollout_weights(checks.check(config), model, layout) < expected
