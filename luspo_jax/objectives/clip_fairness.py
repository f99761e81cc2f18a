"""How evenly clipping treats the lengths of responses."""

import math
from collections.abc import Mapping

_SIGNS = ("pos", "neg")


def reweighting_error(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Returns the length reweighting error of clipping, from sums over all updates of a step.

    LRE = Σ_k n_k |(1 − c_k)/(1 − c) − 1|, c = Σ_k n_k c_k: of the tokens with A ≠ 0, n_k is the
    share in length bin k and c_k the clipped share of bin k. Clipping weights bin k by
    (1 − c_k)/(1 − c) against the sample, so 0 = all lengths are clipped alike; LRE < 2. The idea is
    that of FSPO (arXiv:2509.09177); this form of it, by bins and shares of tokens, is ours.

    Args:
      sums: (sum, count) of `actor/clipfrac/{pos,neg}/bin_k`; others are ignored.

    Returns:
      `actor/clip_lre`: 0 without such tokens, NaN if all are clipped; nothing without length bins.
    """
    heads = [f"actor/clipfrac/{sign}/bin_" for sign in _SIGNS]
    bins = sorted({name.removeprefix(heads[0]) for name in sums if name.startswith(heads[0])})
    if not bins:
        return {}
    clipped, tokens = (
        [math.fsum(float(sums[head + k][part]) for head in heads) for k in bins] for part in (0, 1)
    )
    total, kept = math.fsum(tokens), math.fsum(tokens) - math.fsum(clipped)
    if not kept > 0:
        return {"actor/clip_lre": math.nan if total else 0.0}
    # n_k |(1 − c_k)/(1 − c) − 1| = |a share of the unclipped tokens − a share of all|
    gaps = [abs((n - c) / kept - n / total) for c, n in zip(clipped, tokens, strict=True)]
    return {"actor/clip_lre": math.fsum(gaps)}
