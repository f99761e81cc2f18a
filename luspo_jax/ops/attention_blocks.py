"""What every implementation of attention takes and gives: a block of queries and keys.

An implementation is a module with two functions. A ring calls them for one block of keys after
another, and joins the results.

  forward_block(inputs, *, causal) -> Results
  backward_block(inputs, results, grad_BTNH, *, causal) -> (dq_BTNH, dk_BSKH, dv_BSKH)

`results` of a backward pass come from the queries' attention over all their keys, including those
of other blocks; `grad_BTNH` is the cotangent of their `out`, and the gradients are those through
these keys.
"""

from typing import Any, NamedTuple


class Inputs(NamedTuple):
    """Queries and a block of keys; or one thing for each of the five, such as its axes.

    Attributes:
      query: [B, T, N, H].
      key: [B, S, K, H]; query head n reads key head n // (N / K).
      value: [B, S, K, H].
      segments: int32 segment ids of the queries, [B, T].
      key_segments: int32 segment ids of the keys, [B, S].
    """

    query: Any
    key: Any
    value: Any
    segments: Any
    key_segments: Any


class Results(NamedTuple):
    """Attention of queries over a block of keys, in a form that joins with other blocks.

    Attributes:
      out: weighted values, [B, T, N, H].
      lse: log Σ_s exp(score), [B, T, N], float32. If a query sees no key, `out` is finite and `lse`
        so low that its weight beside any other block is exactly 0.
    """

    out: Any
    lse: Any
