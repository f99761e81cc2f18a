"""How a forward pass is computed: one object, from a run's configuration down to the layers."""

import dataclasses

from luspo_jax.models.decoder_config import DecoderConfig
from luspo_jax.models.low_rank import Adapter
from luspo_jax.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Forward:
    """How a forward pass is computed; static under jit.

    Attributes:
      model: the decoder's configuration, its vision tower's within.
      dtype: name of the type of activations, matmuls and the cache; norms, rotation, softmax and
        routers are float32.
      attention: an implementation of `ops.attention`, of whole sequences.
      vision_attention: likewise, of the patches of an image.
      paged_attention: an implementation of `ops.paged_attention`, of a token over pages; the engine
        decides on "auto", as it knows the pages.
      expert_kernel: an implementation of `ops.grouped_matmul`.
      remat: what of a layer is kept for the backward pass, a key of `decoder.REMAT`.
      products: "bfloat16" rounds the operands of the decoder's projections and of the head's
        products to it, with sums in float32, where `dtype` is float32; "" leaves them as they are.
      layout: where parameters, rows, positions and heads lie; None on one device.
      adapter: what is trained in place of the weights; None where they are.
    """

    model: DecoderConfig
    dtype: str = "float32"
    attention: str = "reference"
    vision_attention: str = "reference"
    paged_attention: str = "auto"
    expert_kernel: str = "reference"
    remat: str = "none"
    products: str = ""
    layout: Layout | None = None
    adapter: Adapter | None = None

    @property
    def rounds_products(self) -> bool:
        """Whether operands of products are rounded to bfloat16."""
        return self.products == "bfloat16" and self.dtype == "float32"

    def with_reference_kernels(self) -> "Forward":
        """The same without kernels, whose backward pass may be differentiated."""
        return dataclasses.replace(
            self,
            attention="reference",
            vision_attention="reference",
            expert_kernel="reference",
        )
