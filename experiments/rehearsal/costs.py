"""Counts operations and bytes of a run's programs by hand, on one device.

Conventions. A product of [m, k] and [k, n] is 2·m·k·n operations. M is the entries of all layers'
matrices except those of experts; V·D those of the head. `pairs` are (query, key) pairs that a
kernel computes: T(T+1)/2 per row of T tokens, as the kernels skip only what is above the diagonal:
packed segments in a row are masked, not skipped. A pair costs 2·N·H operations per product and
layer.

Passes of a training step, in units of the forward pass:

    layers      forward 1, backward 2; plus what remat recomputes: "full" all but the last
                product (its result is not needed), "attention" and "offload" the same without the
                attention, "dots" the attention alone
    attention   forward 2 products a pair; backward 7 (two kernels, each with scores of its own;
                "cudnn" and "reference" 5)
    experts     products of an assignment (a token and one of its K experts): forward 3; backward 8,
                of which 2 recompute the hidden layer whatever remat says; remat adds nothing
    head        forward 1, backward 3 (logits again, and two gradients); unmasked tokens only

Memory traffic is the minimum of a program: every operand of a product is read and every result
written once per pass; weights are also written where they are gathered; logits of a chunk pass 3
times forward and 4 times backward, in float32; the optimizer 9 float32 per parameter. Link traffic
is the bytes that a device receives: (k − 1)/k of the result of an all-gather over k devices or the
input of a reduce-scatter, twice that for an all-reduce; a ring passes keys and values on k − 1
times. With experts over X devices, every assignment's row travels there and back, in buffers larger
than an even load fills. The load is assumed even: one round of exchange, and padding is sent like
other tokens. A decode step reads live keys and values, and for each row half of what a kernel loads
in one piece, as a row rarely ends where a page does; and the experts that its assignments reach,
each equally likely: E·(1 − (1 − 1/E)ⁿ) for n assignments. Without an expert axis, few rows have
theirs picked out (read, written, read). Devices decode in step, so the fullest decides.

Left out: norms, rotations, fused element-wise work, latencies, sampling, block tables, partial sums
of a kernel.
"""

import dataclasses
import math

import numpy as np

from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.experts import EXPERT_AXES, ROOM, id_type


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of one device: operations, bytes to and from its memory, bytes received from others."""

    flops: float = 0.0
    memory: float = 0.0
    links: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.memory + other.memory, self.links + other.links)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.memory * times, self.links * times)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Operations and bytes per second of one device, at peak or as expected."""

    flops: float
    memory: float
    links: float

    def seconds(self, work: Work) -> dict[str, float]:
        """Returns the seconds that each resource is busy; the largest is the roofline."""
        return {
            "compute": work.flops / self.flops,
            "memory": work.memory / self.memory,
            "interconnect": work.links / self.links,
        }

    def roofline(self, work: Work) -> float:
        """Returns the seconds if all three overlap perfectly."""
        return max(self.seconds(work).values())


@dataclasses.dataclass(frozen=True)
class Parts:
    """Sharding over devices: sizes of a layout's logical axes.

    Attributes:
      batch: rows.
      length: positions of a row in training, or of a page in the rollout.
      embed: devices over which weights are sharded and gathered.
      tensor: heads, mlp and vocabulary.
      copies: devices that hold the same part of the weights and sum gradients.
      experts: experts of a layer.
      expert_embed: devices over which an expert's kernels are sharded and gathered.
    """

    batch: int = 1
    length: int = 1
    embed: int = 1
    tensor: int = 1
    copies: int = 1
    experts: int = 1
    expert_embed: int = 1

    @property
    def tokens(self) -> int:
        """Returns the devices over which tokens are sharded."""
        return self.batch * self.length


def parts(layout, *, length: str = "length") -> Parts:
    """Returns the Parts of a layout; None is one device."""
    if layout is None:
        return Parts()
    return Parts(
        batch=layout.size("batch"),
        length=layout.size(length),
        embed=layout.size("embed"),
        tensor=layout.size("mlp"),
        copies=layout.mesh.size // (layout.size("embed") * layout.size("mlp")),
        experts=layout.size("experts"),
        expert_embed=math.prod(layout.mesh.shape[name] for name in layout.cuts(EXPERT_AXES[0])[1]),
    )


def matrices(model: DecoderConfig) -> int:
    """Counts M: entries of all layers' matrices that process every token, including routers."""
    attention = model.embed_dim * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    mlps = _dense_layers(model) * 3 * model.embed_dim * model.mlp_dim
    routers = model.num_expert_layers * model.embed_dim * model.num_experts
    return model.num_layers * attention + mlps + routers


def expert_matrices(model: DecoderConfig) -> int:
    """Counts the entries of the kernels of all experts of all layers, 3·D·F each."""
    return model.num_expert_layers * model.num_experts * 3 * model.embed_dim * model.expert_dim


def head(model: DecoderConfig) -> int:
    """Counts V·D: entries of the output matrix."""
    return model.vocab_size * model.embed_dim


def kv_bytes(model: DecoderConfig, width: float) -> float:
    """Counts KV-cache bytes per token, all heads: 2·L·K·H values."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * width


def recorded_bytes(model: DecoderConfig) -> int:
    """Counts bytes per token of recorded expert ids: K · layers with experts, one id each."""
    ids = model.num_expert_layers * model.experts_per_token
    return ids * np.dtype(id_type(model.num_experts)).itemsize


def causal_pairs(rows: int, length: int) -> int:
    """Counts the pairs that causal kernels compute on whole rows."""
    return rows * length * (length + 1) // 2


@dataclasses.dataclass(frozen=True)
class Rows:
    """Input of one forward or training pass over all devices: one micro-batch.

    Attributes:
      tokens: rows × length, padding included.
      pairs: (query, key) pairs of one layer.
      scored: tokens whose log-probs the head computes, rounded up to chunks if that matters.
    """

    tokens: int
    pairs: int
    scored: int


def forward(model: DecoderConfig, rows: Rows, part: Parts, width: int) -> Work:
    """Counts the layers' forward pass over a micro-batch."""
    return (
        _matrix_pass(model, rows, part, width)
        + expert_pass(model, rows, part, width, gradient=False)
        + attention(model, rows, part, width, products=2)
    )


def _matrix_pass(model, rows, part, width, share=1.0):
    """Counts the forward products with M; `share` of them, for a recomputation."""
    M, c = matrices(model), width
    tokens, t = rows.tokens / part.tokens, part.tensor
    flops = 2 * tokens * M * share / t
    gathered = c * M / t
    memory = gathered * (2 if part.embed > 1 else 1) + c * tokens * _touched(model) / t
    links = gathered * others(part.embed)
    # All-reduces after the products that sum over heads and over mlp.
    sums = model.num_layers + _dense_layers(model)
    links += sums * 2 * c * tokens * model.embed_dim * others(t)
    return Work(flops, memory, links)


def expert_pass(
    model: DecoderConfig, rows: Rows, part: Parts, width: int, *, gradient: bool
) -> Work:
    """Counts experts of all layers over a micro-batch, forward or backward, with their exchange."""
    if not model.num_experts:
        return Work()
    D, F, c, t = model.embed_dim, model.expert_dim, width, part.tensor
    tokens = model.num_expert_layers * rows.tokens / part.tokens
    assigned = tokens * model.experts_per_token
    # An assignment's values: of products, and of sorting rows and restoring their order.
    products, of_D, of_F = (8, 7 + 7, 8) if gradient else (3, 2 + 4, 3)
    kernels = c * expert_matrices(model) / (part.experts * t)
    memory = kernels * (2 if part.expert_embed > 1 else 1)
    memory += c * assigned * (of_D * D + of_F * F / t)
    links = kernels * others(part.expert_embed)
    if part.experts > 1:  # rows, and in the backward pass gradients, there; results back
        sent = (3 if gradient else 2) * c * D + (12 if gradient else 4)
        memory += 2 * ROOM * assigned * sent
        links += ROOM * assigned * sent * others(part.experts)
    links += 2 * 4 * tokens * D * others(t)
    if gradient:
        grads = 4 * expert_matrices(model) / (part.experts * t)
        own = grads / part.expert_embed
        memory += 2 * grads + 3 * own
        links += grads * others(part.expert_embed)
    return Work(products * 2 * assigned * D * F / t, memory, links)


def attention(model: DecoderConfig, rows: Rows, part: Parts, width: int, *, products: int) -> Work:
    """Counts `products` products per pair; queries, keys, values and results pass memory once."""
    pairs = rows.pairs / (part.tokens * part.tensor)
    tokens = rows.tokens / part.tokens
    flops = products * 2 * model.num_heads * model.head_dim * model.num_layers * pairs
    values = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim / part.tensor
    memory = products / 2 * width * tokens * values * model.num_layers
    ring = (part.length - 1) * tokens * kv_bytes(model, width) / part.tensor
    if products > 2:  # gradients of keys and values travel with them, in float32
        ring += (part.length - 1) * tokens * kv_bytes(model, 4) / part.tensor
    return Work(flops, memory, ring)


RECOMPUTED = {"none": (0, 0), "full": (1, 1), "attention": (1, 0), "offload": (1, 0),
               "dots": (0, 1)}  # fmt: skip


def backward(
    model: DecoderConfig,
    rows: Rows,
    part: Parts,
    width: int,
    *,
    remat: str,
    kernel: str,
    frozen: bool = False,
) -> Work:
    """Counts the layers' backward pass, with recomputation; of `frozen` matrices only by inputs."""
    M, c, t = matrices(model), width, part.tensor
    tokens = rows.tokens / part.tokens
    layers, with_attention = RECOMPUTED[remat]
    # The products themselves twice; weights gathered once more, gradients reduced in float32.
    work = _matrix_pass(model, rows, part, width)
    if not frozen:
        work = Work(2 * work.flops, 2 * work.memory, work.links)
        grads = 4 * M / t
        work += Work(0, 2 * grads + 3 * grads / part.embed, grads * others(part.embed))
    work += expert_pass(model, rows, part, width, gradient=True)
    products = 5 if kernel in ("cudnn", "reference") else 7
    work += attention(model, rows, part, width, products=products)
    if layers:
        last = _dense_layers(model) * model.embed_dim * model.mlp_dim
        work += _matrix_pass(model, rows, part, width, share=1 - last / M)
    if with_attention:
        work += attention(model, rows, part, width, products=2)
    if not frozen:  # rows of the embedding travel as activations, and their gradients
        values = tokens * model.embed_dim
        work += Work(0, 4 * values, c * values * others(part.embed))
    return work


def scoring(
    model: DecoderConfig,
    rows: Rows,
    part: Parts,
    width: int,
    chunk: int,
    *,
    gradient: bool,
    frozen: bool = False,
) -> Work:
    """Counts the head over the unmasked tokens, forward, and backward with `gradient`."""
    VD, t = head(model), part.tensor
    scored = rows.scored / part.tokens
    passes, touched, gathers = (4 - frozen, 7 - frozen, 2) if gradient else (1, 3, 1)
    chunks = math.ceil(scored / chunk) if scored else 0
    memory = 4 * touched * scored * model.vocab_size / t + passes * chunks * width * VD / t
    links = gathers * width * VD / t * others(part.embed)
    if gradient and not frozen:
        memory += 3 * 4 * VD / t * chunks  # the gradient is summed in float32, chunk by chunk
        links += 4 * VD / t * others(part.embed)
    return Work(passes * 2 * scored * VD / t, memory, links)


def training(
    model: DecoderConfig,
    rows: Rows,
    part: Parts,
    width: int,
    *,
    remat: str,
    kernel: str,
    chunk: int,
    frozen: bool = False,
) -> Work:
    """Counts one micro-batch of an update: forward, head, backward."""
    return (
        forward(model, rows, part, width)
        + scoring(model, rows, part, width, chunk, gradient=True, frozen=frozen)
        + backward(model, rows, part, width, remat=remat, kernel=kernel, frozen=frozen)
    )


def summed(params: float, copies: int) -> Work:
    """Counts the sum of gradients, `params` bytes, over devices that hold the same part of them."""
    return Work(0, 0, 2 * params * others(copies))


def optimizer(params: float) -> Work:
    """Counts AdamW: clip (read, write), then weights, both moments and gradient, `params` bytes."""
    return Work(0, 9 * params, 0)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The sampler's matrices, and its keys and values.

    Attributes:
      width: bytes of an entry; of int8, each output channel has a float32 scale besides.
      copied: whether a layer's experts are first written out in the activations' type.
      cached: bytes of a key's element in pages, its part of a scale included; 0: as activations.
    """

    width: int
    copied: bool = False
    cached: float = 0.0


@dataclasses.dataclass(frozen=True)
class Runs:
    """Input of one prefill of a host.

    Attributes:
      rows: of all devices, one run each.
      length: tokens of a run, padding included.
      before: entries of its row that a run reads from pages, a whole page at a time.
    """

    rows: int
    length: int
    before: int = 0


def prefill(
    model: DecoderConfig, runs: Runs, part: Parts, width: int, kernels: Kernels | None = None
) -> Work:
    """Counts the forward pass over runs of prompts on a rollout's mesh; pages are written, and read
    where a run is not the first of its row."""
    kernels = kernels or Kernels(width)
    rows = Rows(runs.rows * runs.length, causal_pairs(runs.rows, runs.length), 0)
    # Every device along positions computes all of a run, and attends to its part of the pages.
    work = forward(model, rows, dataclasses.replace(part, length=1), width)
    experts = expert_matrices(model) / (part.experts * part.tensor)
    token = kv_bytes(model, kernels.cached or width) / part.tensor
    memory = rows.tokens / part.batch * token / part.length
    memory -= (width - kernels.width) * (matrices(model) / part.tensor + experts)
    memory += 2 * width * experts if kernels.copied else 0.0
    seen = runs.rows / part.batch * runs.before / part.length
    memory += seen * token
    flops = 4 * model.num_heads * model.head_dim * model.num_layers * seen * runs.length
    return work + Work(flops / part.tensor, memory, 0)


@dataclasses.dataclass(frozen=True)
class Step:
    """Input of one decode step of a host.

    Attributes:
      rows: of the program, all devices.
      live: those that draw or read a token.
      entries: keys that a device's live rows read; where positions are dealt out, its part is one
        of `Parts.length`.
    """

    rows: float
    live: float
    entries: float


def decode_step(
    model: DecoderConfig, step: Step, part: Parts, width: int, kernels: Kernels | None = None
) -> Work:
    """Counts one token for every row of a host.

    All weights are read but those of experts without tokens, and of pages what `step.entries` says.
    """
    kernels = kernels or Kernels(width)
    rows, t = step.rows / part.batch, part.tensor
    weights = matrices(model) + head(model)
    seen = step.entries / part.length
    flops = 2 * rows * weights / t
    flops += 4 * model.num_heads * model.head_dim * model.num_layers * seen / t
    memory = kernels.width * weights / t + seen * kv_bytes(model, kernels.cached or width) / t
    if kernels.width == 1:
        memory += 4 * channels(model) / t
    memory += 4 * 4 * rows * model.vocab_size
    reduced = model.num_layers + _dense_layers(model)
    # Products with scales are summed in float32.
    summed = width if kernels.width == width else 4
    links = 2 * reduced * summed * rows * model.embed_dim * others(t)
    links += 4 * rows * model.vocab_size * others(t)
    sums = 2 * 4 * model.num_heads * (model.head_dim + 1) / t * model.num_layers * rows
    own = Work(flops, memory, links + sums * others(part.length))
    return own + _decoding_experts(model, step, part, width, kernels)


def channels(model: DecoderConfig) -> int:
    """Counts output channels of the head and of all layers' matrices but routers and experts."""
    attention = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim + model.embed_dim
    mlps = _dense_layers(model) * (2 * model.mlp_dim + model.embed_dim)
    return model.num_layers * attention + mlps + model.vocab_size


def touched(assignments: float, num_experts: int) -> float:
    """Returns the experts that n equally likely assignments reach: E·(1 − (1 − 1/E)ⁿ)."""
    return num_experts * (1 - (1 - 1 / num_experts) ** assignments)


def _decoding_experts(model, step, part, width, kernels):
    """Counts experts of all layers; rows without work go to none."""
    if not model.num_experts:
        return Work()
    E, X, t = model.num_experts, part.experts, part.tensor
    rows, live = step.rows / part.batch, step.live / part.batch
    assigned, kernel = rows * model.experts_per_token, 3 * model.embed_dim * model.expert_dim / t
    few = X == 1 and 2 * assigned <= E
    real = live * model.experts_per_token
    read = 3 * assigned if few else touched(real * X, E) / X
    # All devices along the axis process all rows; their results are summed in float32.
    seen = rows * X
    links = seen * ((width + 4) * model.embed_dim + 8 * model.experts_per_token) * others(X)
    links += 2 * 4 * seen * model.embed_dim * others(t)
    memory = kernels.width * read * kernel
    if kernels.copied and not few:
        memory = ((kernels.width + width) * E / X + width * read) * kernel
    one = Work(2 * (assigned if few else real) * kernel, memory, links)
    return one * model.num_expert_layers


def copy_pages(pages: int, page_bytes: int) -> Work:
    """Counts copying a device's pages: each is read and written."""
    return Work(0, 2 * pages * page_bytes, 0)


def hand_over(own: float, cast: float, wanted: float) -> Work:
    """Counts the hand-over: master weights are read, cast, and gathered as the rollout needs.

    Args:
      own: bytes of a device's part of the master weights.
      cast: bytes of the same part in the sampler's type.
      wanted: bytes that the sampler needs on a device.
    """
    return Work(0, own + cast + wanted, max(0.0, wanted - cast))


def power_lengths(mean: float, longest: int, count: int) -> list[int]:
    """Returns `count` response lengths of about this mean: longest · uᵏ at even u.

    ∫ uᵏ du = 1/(k+1), so k = longest/mean − 1: mostly short ones, and a few of the longest.
    """
    if not 1 <= mean <= longest:
        raise ValueError(f"a mean length of {mean:g} must lie between 1 and {longest}")
    power = longest / mean - 1
    return [
        max(1, round(longest * ((i + 0.5) / count) ** power)) if i < count - 1 else longest
        for i in range(count)
    ]


def _touched(model):
    """Counts values per token that a layer's products read and write, all layers."""
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    attention = model.embed_dim + heads + model.num_heads * model.head_dim + model.embed_dim
    mlp = model.embed_dim + 2 * model.mlp_dim + model.mlp_dim + model.embed_dim
    router = model.embed_dim + model.num_experts
    return (
        model.num_layers * attention + _dense_layers(model) * mlp + model.num_expert_layers * router
    )


def _dense_layers(model):
    return model.num_layers - model.num_expert_layers


def others(count: int) -> float:
    """Returns (k − 1)/k: the share that a device receives from the k − 1 others."""
    return (count - 1) / count
