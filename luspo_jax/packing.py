"""Rollouts → training rows."""

from collections.abc import Sequence

import numpy as np

from luspo_jax.types import TokenBatch


def bucket_length(longest: int, maximum: int, *, num_buckets: int) -> int:
    """Smallest of `num_buckets` equally spaced row lengths up to `maximum` that holds `longest`.

    A step compiles once a bucket; more buckets compute less padding.
    """
    if longest > maximum:
        raise ValueError(f"a row of {longest} tokens exceeds the maximum of {maximum}")
    size = -(-maximum // num_buckets)
    return min(maximum, max(1, -(-longest // size)) * size)


def padded_rows(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], *, length: int, pad_id: int
) -> TokenBatch:
    """One sequence a row: prompt, response, padding up to `length`.

    Args:
      prompts: B int arrays of prompt tokens.
      responses: B int arrays of response tokens, stop token included.
      length: T.
      pad_id: any valid token; padding is known by its segment id 0.

    Returns:
      A TokenBatch of NumPy arrays [B, T].

    Raises:
      ValueError: naming the row that does not fit.
    """
    rows = len(prompts)
    tokens_BT = np.full((rows, length), pad_id, np.int32)
    segment_ids_BT = np.zeros((rows, length), np.int32)
    response_mask_BT = np.zeros((rows, length), bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = len(prompt), len(prompt) + len(response)
        if end > length or not start:
            raise ValueError(
                f"row {row} ({start} prompt + {len(response)} response tokens) does not fit in "
                f"{length} or has no prompt"
            )
        tokens_BT[row, :start] = prompt
        tokens_BT[row, start:end] = response
        segment_ids_BT[row, :end] = 1
        response_mask_BT[row, start:end] = True
    positions_BT = np.where(segment_ids_BT > 0, np.arange(length, dtype=np.int32)[None], 0)
    return TokenBatch(tokens_BT, positions_BT.astype(np.int32), segment_ids_BT, response_mask_BT)


def response_mask(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], *, length: int
) -> np.ndarray:
    """Bool [B, T]: true on every response token of `padded_rows`, whatever is trained on."""
    starts_B = np.array([len(prompt) for prompt in prompts])[:, None]
    ends_B = starts_B + np.array([len(response) for response in responses])[:, None]
    places = np.arange(length)[None]
    return (places >= starts_B) & (places < ends_B)


def place_responses(
    values: Sequence[np.ndarray], response_mask_BT: np.ndarray, dtype: type = np.float32
) -> np.ndarray:
    """Per-token values of B responses → [B, T], each at the token it belongs to, 0 elsewhere."""
    placed_BT = np.zeros(response_mask_BT.shape, dtype)
    placed_BT[response_mask_BT] = np.concatenate([np.asarray(v, dtype) for v in values])
    return placed_BT
