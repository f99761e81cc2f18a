"""Counts the work of low-rank adapters and of the frozen matrices beside them, on one device.

Conventions are those of `costs`; beside a layers' forward pass over n tokens:

    A and B   2·n·(entries of A and B) operations; inputs are read and outputs written once more,
              and what lies between x · A and (x · A) · B is written and read
    int8      forward, entries are read as they are stored; backward as nf4
    nf4       entries are read as they are stored, written in the activations' type, and read

A backward pass has input gradients alone of frozen matrices, and both of A and B; what remat
recomputes is recomputed of all of it. Experts of few bits are made whole too, adapted ones as
W + s · A · B, forward and again backward; of the latter, gradients are by the whole matrices.
"""

import dataclasses
import functools
import math

from experiments.rehearsal import costs
from experiments.rehearsal.costs import Parts, Rows, Work, others
from luspo_jax.models import decoder, low_rank
from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.low_rank import Adapter
from luspo_jax.models.nf4 import BLOCK

# Bytes of a frozen entry; a scale for each output channel of int8 is nearly nothing.
STORED = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / BLOCK}


@dataclasses.dataclass(frozen=True)
class Beside:
    """What an adapter adds to all layers, experts and the image tower aside.

    Attributes:
      entries: of A and B.
      last: entries of B in the last product of each layer, which remat does not recompute.
      values: that a token's products with them read and write.
      products: multiplications of all A · B.
      last_products: those of the last product of each layer.
    """

    entries: int
    last: int
    values: int
    products: int
    last_products: int


@functools.cache  # traces the model
def beside(model: DecoderConfig, adapter: Adapter) -> Beside:
    """Counts an adapter's matrices in the layers."""
    shapes = decoder.abstract_params(model)
    entries = last = values = products = last_products = 0
    for path, place in low_rank.places(decoder.param_axes(model), adapter).items():
        if path[0] == "vision" or "experts" in place.axes:
            continue
        shape = low_rank.at(shapes, path).shape
        layers, (inputs, outputs) = math.prod(shape[: place.lead]), place.sizes(shape)
        entries += layers * adapter.rank * (inputs + outputs)
        values += layers * (inputs + 2 * adapter.rank + outputs)
        last += layers * adapter.rank * outputs * (path[-2] == "down")
        products += layers * adapter.rank * inputs * outputs
        last_products += layers * adapter.rank * inputs * outputs * (path[-2] == "down")
    return Beside(entries, last, values, products, last_products)


def forward(model: DecoderConfig, adapter: Adapter, tokens: float, part: Parts, width: int) -> Work:
    """Counts what a forward pass over `tokens` tokens of a device takes beyond `costs.forward`."""
    whole = adapter.base == "nf4"
    return _low(model, adapter, tokens, part, width) + _frozen(model, adapter, part, width, whole)


def training(
    model: DecoderConfig, adapter: Adapter, rows: Rows, part: Parts, width: int, *, remat: str
) -> Work:
    """Counts what a micro-batch of an update takes beyond `costs.training` of frozen weights."""
    tokens, few = rows.tokens / part.tokens, adapter.base in ("int8", "nf4")
    if width == 4 and part == Parts():  # W + s · A · B, as models.layers.project does
        found, again = beside(model, adapter), costs.RECOMPUTED[remat][0]
        times = 3 if again else 2
        flops = 2 * (times * found.products - again * found.last_products)
        work = _frozen(model, adapter, part, width, whole=True) * times
        work += Work(flops, times * width * found.entries)
        work += _low(model, adapter, tokens, part, width) * 2
        return work + _experts(model, adapter, tokens, part)
    work = forward(model, adapter, tokens, part, width)
    if costs.RECOMPUTED[remat][0]:
        work += _frozen(model, adapter, part, width, adapter.base == "nf4")
        work += _low(model, adapter, tokens, part, width, recomputed=True)
    work += _low(model, adapter, tokens, part, width) * 2
    work += _frozen(model, adapter, part, width, few)
    return work + _experts(model, adapter, tokens, part)


def _experts(model, adapter, tokens, part):
    """Counts what an update takes beyond `costs.expert_pass`, which has all kernels' gradients."""
    if not model.num_experts:
        return Work()
    names = {low_rank.MODULES[name] for name in adapter.targets}
    wanted = len(names & {"gate", "up", "down"}) if adapter.experts else 0
    share, t = 1 - wanted / 3, part.tensor
    assigned = model.num_expert_layers * tokens * model.experts_per_token
    gradients = costs.expert_matrices(model) / (part.experts * t)
    flops = -share * 3 * 2 * assigned * model.embed_dim * model.expert_dim / t
    # A · B is made twice, and has two gradients.
    flops += wanted / 3 * 4 * 2 * adapter.rank * gradients
    memory = -share * 4 * gradients * (2 + 3 / part.expert_embed)
    return Work(flops, memory, -share * 4 * gradients * others(part.expert_embed))


def _low(model, adapter, tokens, part, width, *, recomputed=False):
    found = beside(model, adapter)
    entries = found.entries - (found.last if recomputed else 0)
    memory = width * (tokens * found.values + found.entries) / part.tensor
    links = width * found.entries / part.tensor * others(part.embed)
    return Work(2 * tokens * entries / part.tensor, memory, links)


def _frozen(model, adapter, part, width, whole):
    """Counts reading frozen matrices as they are stored, `whole` if they are written out first."""
    if adapter.base not in ("int8", "nf4"):
        return Work()
    stored = STORED[adapter.base]
    entries = costs.matrices(model) / part.tensor
    memory = entries * (stored + width if whole else stored - width)
    experts = costs.expert_matrices(model) / (part.experts * part.tensor)
    memory += experts * (stored + width)
    links = (stored - width) * (entries * others(part.embed) + experts * others(part.expert_embed))
    return Work(0, memory, links)
