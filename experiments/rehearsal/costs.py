"""Operations and bytes of a run's programs, counted by hand, on one device.

Conventions. A product of [m, k] and [k, n] is 2·m·k·n operations. M is the entries of all layers'
matrices but those of experts, V·D those of the head. `pairs` are (query, key) pairs that a kernel
computes: T(T+1)/2 a row of T tokens, as the kernels skip what lies above the diagonal, and nothing
else: packed segments in a row are masked, not skipped. A pair costs 2·N·H operations a product and
layer.

Passes of a training step, in units of the forward pass:

    layers      forward 1, backward 2; again what remat computes again: "full" all but the last
                product (its result is not needed), "attention" and "offload" the same without the
                attention, "dots" the attention alone
    attention   forward 2 products a pair; backward 7 (two kernels, each with scores of its own;
                "cudnn" and "reference" 5)
    experts     products of an assignment (a token and one of its K experts): forward 3; backward 8,
                of which 2 compute the hidden layer again, whatever remat says, and remat nothing
    head        forward 1, backward 3 (logits again, and two gradients); scored tokens only

Memory traffic is the least a program can do: every operand of a product read and every result
written once a pass, weights also written where they are gathered; logits of a chunk 3 times
forward and 4 times backward, in float32; the optimizer 9 float32 a parameter. Links: bytes that a
device receives: (k − 1)/k of what an all-gather over k devices makes whole or a reduce-scatter
adds up, twice that of an all-reduce; a ring passes keys and values on k − 1 times. Experts over X
devices: every assignment's row travels there and back, in buffers larger than an even load fills.
The load is taken to be even: one round of exchange, and padding is sent like other tokens. A step
of decoding reads the experts that its assignments touch, each as likely as the next:
E·(1 − (1 − 1/E)ⁿ) of n. Without an expert axis, few rows have theirs picked out (read, written,
read).

What is left out: norms, rotations, element-wise work that compilers fuse, latencies, sampling.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.experts import EXPERT_AXES, ROOM, id_type


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device: operations, bytes to and from its memory, bytes received from others."""

    flops: float = 0.0
    memory: float = 0.0
    links: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.memory + other.memory, self.links + other.links)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.memory * times, self.links * times)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Operations and bytes a second of one device, at their peak or as they are expected."""

    flops: float
    memory: float
    links: float

    def seconds(self, work: Work) -> dict[str, float]:
        """Seconds that each resource is busy; the largest is the roofline."""
        return {
            "compute": work.flops / self.flops,
            "memory": work.memory / self.memory,
            "interconnect": work.links / self.links,
        }

    def roofline(self, work: Work) -> float:
        """Seconds where all three overlap perfectly."""
        return max(self.seconds(work).values())


@dataclasses.dataclass(frozen=True)
class Parts:
    """How many devices share what: sizes of a layout's logical axes.

    Attributes:
      batch: rows.
      length: positions of a row in training, or of the cache in the rollout.
      embed: devices that weights are cut over and gathered from.
      tensor: heads, mlp and vocabulary.
      copies: devices that hold the same part of the weights and sum gradients.
      experts: experts of a layer.
      expert_embed: devices that the kernels of an expert are cut over and gathered from.
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
        """Devices that tokens are spread over."""
        return self.batch * self.length


def parts(layout, *, length: str = "length") -> Parts:
    """The Parts of a layout; None is one device."""
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
    """M: entries of all layers' matrices that every token meets, routers among them."""
    attention = model.embed_dim * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    mlps = _dense_layers(model) * 3 * model.embed_dim * model.mlp_dim
    routers = model.num_expert_layers * model.embed_dim * model.num_experts
    return model.num_layers * attention + mlps + routers


def expert_matrices(model: DecoderConfig) -> int:
    """Entries of the kernels of all experts of all layers, 3·D·F each."""
    return model.num_expert_layers * model.num_experts * 3 * model.embed_dim * model.expert_dim


def head(model: DecoderConfig) -> int:
    """V·D: entries of the output matrix."""
    return model.vocab_size * model.embed_dim


def kv_bytes(model: DecoderConfig, width: int) -> int:
    """Bytes of cache a token, all heads: 2·L·K·H values."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * width


def recorded_bytes(model: DecoderConfig) -> int:
    """Bytes a token of recorded experts, an id each: K · layers that have experts."""
    ids = model.num_expert_layers * model.experts_per_token
    return ids * np.dtype(id_type(model.num_experts)).itemsize


def causal_pairs(rows: int, length: int) -> int:
    """Pairs that causal kernels compute on whole rows."""
    return rows * length * (length + 1) // 2


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a forward or training pass reads at once, over all devices: one micro-batch.

    Attributes:
      tokens: rows × length, padding included.
      pairs: (query, key) pairs of one layer.
      scored: tokens that the head scores, rounded up to chunks where that matters.
    """

    tokens: int
    pairs: int
    scored: int


def forward(model: DecoderConfig, rows: Rows, part: Parts, width: int) -> Work:
    """Layers forward over a micro-batch."""
    return (
        _matrix_pass(model, rows, part, width)
        + expert_pass(model, rows, part, width, gradient=False)
        + attention(model, rows, part, width, products=2)
    )


def _matrix_pass(model, rows, part, width, share=1.0):
    """Products with M forward; `share` of them, for a recomputation."""
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
    """Experts of all layers over a micro-batch, forward or backward, with their exchange."""
    if not model.num_experts:
        return Work()
    D, F, c, t = model.embed_dim, model.expert_dim, width, part.tensor
    tokens = model.num_expert_layers * rows.tokens / part.tokens
    assigned = tokens * model.experts_per_token
    # An assignment's values: of products, and of putting rows in order and back.
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
        links += grads * others(part.expert_embed) + 2 * own * others(part.copies)
    return Work(products * 2 * assigned * D * F / t, memory, links)


def attention(model: DecoderConfig, rows: Rows, part: Parts, width: int, *, products: int) -> Work:
    """`products` products a pair; queries, keys, values and results pass memory once."""
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
    model: DecoderConfig, rows: Rows, part: Parts, width: int, *, remat: str, kernel: str
) -> Work:
    """Layers backward, with what is computed again."""
    M, c, t = matrices(model), width, part.tensor
    tokens = rows.tokens / part.tokens
    layers, with_attention = RECOMPUTED[remat]
    # The products themselves twice; weights gathered once more, gradients reduced in float32.
    work = _matrix_pass(model, rows, part, width)
    work = Work(2 * work.flops, 2 * work.memory, work.links)
    grads = 4 * M / t
    work += Work(0, 2 * grads + 3 * grads / part.embed, grads * others(part.embed))
    work += Work(0, 0, 2 * grads / part.embed * others(part.copies))
    work += expert_pass(model, rows, part, width, gradient=True)
    products = 5 if kernel in ("cudnn", "reference") else 7
    work += attention(model, rows, part, width, products=products)
    if layers:
        last = _dense_layers(model) * model.embed_dim * model.mlp_dim
        work += _matrix_pass(model, rows, part, width, share=1 - last / M)
    if with_attention:
        work += attention(model, rows, part, width, products=2)
    # Rows of the embedding travel as activations, and their gradients.
    work += Work(0, 4 * tokens * model.embed_dim, c * tokens * model.embed_dim * others(part.embed))
    return work


def scoring(
    model: DecoderConfig, rows: Rows, part: Parts, width: int, chunk: int, *, gradient: bool
) -> Work:
    """The head over the scored tokens, forward, and backward with `gradient`."""
    VD, t = head(model), part.tensor
    scored = rows.scored / part.tokens
    passes, touched, gathers = (4, 7, 2) if gradient else (1, 3, 1)
    chunks = math.ceil(scored / chunk) if scored else 0
    memory = 4 * touched * scored * model.vocab_size / t + passes * chunks * width * VD / t
    links = gathers * width * VD / t * others(part.embed)
    if gradient:
        memory += 3 * 4 * VD / t * chunks  # the gradient is summed in float32, chunk by chunk
        links += 4 * VD / t * others(part.embed)
        links += 2 * 4 * VD / t / part.embed * others(part.copies)
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
) -> Work:
    """One micro-batch of an update: forward, head, backward."""
    return (
        forward(model, rows, part, width)
        + scoring(model, rows, part, width, chunk, gradient=True)
        + backward(model, rows, part, width, remat=remat, kernel=kernel)
    )


def optimizer(params: float) -> Work:
    """AdamW: clip (read, write), then weights, both moments and the gradient, `params` bytes."""
    return Work(0, 9 * params, 0)


def prefill(model: DecoderConfig, prompts: int, length: int, part: Parts, width: int) -> Work:
    """Forward over a batch of prompts on a rollout's mesh; the cache is written."""
    rows = Rows(prompts * length, causal_pairs(prompts, length), 0)
    written = rows.tokens / part.batch * kv_bytes(model, width) / part.tensor
    return forward(model, rows, dataclasses.replace(part, length=1), width) + Work(0, written, 0)


def decode_step(model: DecoderConfig, slots: int, room: int, part: Parts, width: int) -> Work:
    """One token for every slot of a host: the whole cache is read, and all weights but those of
    experts that no token goes to.

    `room` is the allocated length of the cache, which is read however short the rows are.
    """
    rows, t = slots / part.batch, part.tensor
    weights = matrices(model) + head(model)
    seen = room / part.length
    flops = 2 * rows * weights / t
    flops += 4 * model.num_heads * model.head_dim * model.num_layers * rows * seen / t
    memory = width * weights / t + rows * seen * kv_bytes(model, width) / t
    memory += 4 * 4 * rows * model.vocab_size
    reduced = model.num_layers + _dense_layers(model)
    links = 2 * reduced * width * rows * model.embed_dim * others(t)
    links += 4 * rows * model.vocab_size * others(t)
    sums = 2 * 4 * model.num_heads * (model.head_dim + 1) / t * model.num_layers * rows
    own = Work(flops, memory, links + sums * others(part.length))
    return own + _decoding_experts(model, rows, part, width)


def touched(assignments: float, num_experts: int) -> float:
    """How many experts n assignments reach if each is as likely as the next: E·(1 − (1 − 1/E)ⁿ)."""
    return num_experts * (1 - (1 - 1 / num_experts) ** assignments)


def _decoding_experts(model, rows, part, width):
    """Experts of all layers, a token for each of `rows` rows of a device."""
    if not model.num_experts:
        return Work()
    E, X, t = model.num_experts, part.experts, part.tensor
    assigned, kernel = rows * model.experts_per_token, 3 * model.embed_dim * model.expert_dim / t
    few = X == 1 and 2 * assigned <= E
    read = 3 * assigned if few else touched(assigned * X, E) / X
    # All devices along the axis see all rows; their results are added up in float32.
    seen = rows * X
    links = seen * ((width + 4) * model.embed_dim + 8 * model.experts_per_token) * others(X)
    links += 2 * 4 * seen * model.embed_dim * others(t)
    one = Work(2 * assigned * kernel, width * read * kernel, links)
    return one * model.num_expert_layers


def fill(
    model: DecoderConfig, prompts: int, length: int, slots: int, part: Parts, width: int
) -> Work:
    """Prompts of the pool into slots: every device gathers the pool, and copies one to each."""
    a_token = kv_bytes(model, width) / (part.tensor * part.length)
    copied = slots / part.batch * length * a_token
    return Work(0, 2 * copied, prompts * length * a_token * others(part.batch))


def hand_over(own: float, cast: float, wanted: float) -> Work:
    """Master weights read, cast, and made as whole as the rollout wants them.

    Args:
      own: bytes of a device's part of the master weights.
      cast: of the same in the sampler's type.
      wanted: of what the sampler wants on a device.
    """
    return Work(0, own + cast + wanted, max(0.0, wanted - cast))


def power_lengths(mean: float, longest: int, count: int) -> list[int]:
    """`count` response lengths with about this mean, up to `longest`: longest · uᵏ at even u.

    ∫ uᵏ du = 1/(k+1), so k = longest/mean − 1: mostly short ones, and a few of the longest.
    """
    if not 1 <= mean <= longest:
        raise ValueError(f"a mean length of {mean:g} must lie between 1 and {longest}")
    power = longest / mean - 1
    return [
        max(1, round(longest * ((i + 0.5) / count) ** power)) if i < count - 1 else longest
        for i in range(count)
    ]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What continuous batching makes of a set of lengths.

    Attributes:
      steps: decode steps until the last response ends.
      by_room: steps at each allocated cache length.
      utilisation: share of slot-steps that make a token.
    """

    steps: int
    by_room: Mapping[int, int]
    utilisation: float


def decoding(lengths: list[int], prompt: int, slots: int, rooms: list[int]) -> Decoding:
    """Responses into slots in turn, as slots come free; caches grow as the longest does.

    Args:
      lengths: of the responses, in the order in which they start.
      prompt: tokens before each.
      slots: decoded together.
      rooms: cache lengths that are allocated, ascending; the last holds the longest.
    """
    free = [0] * min(slots, len(lengths))
    starts = []
    for length in lengths:
        slot = min(range(len(free)), key=free.__getitem__)
        starts.append(free[slot])
        free[slot] += length
    steps = max(free)
    reached = [0]  # the step at which each room but the first is first needed
    for room in rooms[:-1]:
        needed = room - prompt
        times = [s + max(0, needed) for s, n in zip(starts, lengths, strict=True) if n > needed]
        reached.append(min(times, default=steps))
    reached.append(steps)
    by_room = {room: max(0, reached[i + 1] - reached[i]) for i, room in enumerate(rooms)}
    return Decoding(steps, by_room, sum(lengths) / (steps * len(free)))


def _touched(model):
    """Values a token that a layer's products read and write, all layers."""
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
    """(k − 1)/k: the share that a device gets from the k − 1 others."""
    return (count - 1) / count
