"""Bytes of the cache that decoding reads, against those that are live.

A response with a prompt of P tokens reads, for its token t = 1 … n, the entries of P + t tokens.
These entries are live; a kernel over pages reads whole pages, and may read the full pages of a
prompt once for all of its samples.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from luspo_jax.models.decoder_config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes a decode step, mean over the rollout.

    Attributes:
      live: of every response's entries, its prompt's included.
      live_once: the same with a prompt's entries once while any of its samples is decoded.
      pages: of all pages that hold a response's entries.
      pages_once: the same with a prompt's full pages once while any of its samples is decoded; the
        least, as if the samples of a prompt were decoded side by side.
    """

    live: float
    live_once: float
    pages: float
    pages_once: float


def entry_bytes(model: DecoderConfig, itemsize: int) -> int:
    """Returns the bytes of one token's keys and values, 2 · L · K · H elements."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize


def traffic(
    prompts: Sequence[int],
    lengths: Sequence[int],
    *,
    page: int,
    steps: int,
    entry: int,
) -> Traffic:
    """Returns the Traffic of one rollout.

    Args:
      prompts: tokens of each prompt.
      lengths: tokens of the responses, prompt by prompt, the same number to each.
      page: tokens of a page.
      steps: decode steps.
      entry: bytes of one token's entry.
    """
    lengths_PG = np.reshape(np.asarray(lengths, np.int64), (len(prompts), -1))
    sums = np.zeros(4)
    for prompt, lengths_G in zip(prompts, lengths_PG, strict=True):
        seen = [prompt + np.arange(1, n + 1) for n in lengths_G]
        live = sum(int(positions.sum()) for positions in seen)
        paged = sum(int((-(-positions // page) * page).sum()) for positions in seen)
        again = int(lengths_G.sum() - lengths_G.max())  # steps that need not read the prompt
        sums += (live, live - again * prompt, paged, paged - again * (prompt // page * page))
    return Traffic(*(sums * entry / steps).tolist())


def live_peak(prompts: Sequence[int], lengths: Sequence[int]) -> int:
    """Returns the most entries live at once, prompts once, if all responses begin together."""
    lengths_PG = np.reshape(np.asarray(lengths, np.int64), (len(prompts), -1))
    steps = np.arange(1, lengths_PG.max() + 1)
    alive_GS = lengths_PG[:, :, None] >= steps
    own = (alive_GS * steps).sum(axis=(0, 1))
    shared = (alive_GS.any(axis=1) * np.asarray(prompts)[:, None]).sum(axis=0)
    return int((own + shared).max())


def live_pages_peak(prompts: Sequence[int], lengths: Sequence[int], page: int) -> int:
    """Returns the most pages with a live entry at once, a prompt's full pages once, if all begin
    together."""
    lengths_PG = np.reshape(np.asarray(lengths, np.int64), (len(prompts), -1))
    steps = np.arange(1, lengths_PG.max() + 1)
    alive_PGS = lengths_PG[:, :, None] >= steps
    full_P1, rest_P11 = np.asarray(prompts)[:, None] // page, np.asarray(prompts)[:, None, None]
    own_PGS = alive_PGS * -(-(rest_P11 % page + steps) // page)
    return int((own_PGS.sum(axis=(0, 1)) + (alive_PGS.any(axis=1) * full_P1).sum(axis=0)).max())


def timeline(values: Sequence[int], count: int = 12) -> str:
    """Shows `count` of the values, evenly spaced from first to last."""
    at = np.unique(np.linspace(0, len(values) - 1, count).round().astype(int))
    return " ".join(str(values[i]) for i in at)
