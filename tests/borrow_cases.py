"""Arrays of one step, as this library, Tunix and MaxText hold them."""

import dataclasses

import jax.numpy as jnp
import numpy as np

PROMPTS, GROUP, T = 3, 4, 7
B = PROMPTS * GROUP


def step(dtype=np.float64) -> dict[str, np.ndarray]:
    """Arrays of one step: every row has a token, a group's rows stand together."""
    rng = np.random.default_rng(0)
    length_B = rng.integers(1, T, B)
    live_BT = -rng.gamma(1.0, 0.8, (B, T)) - 0.01

    def near():
        # Within LUSPO's clip for some rows, beyond it for others.
        return (live_BT + 0.004 * rng.standard_normal((B, T))).astype(dtype)

    return {
        "live_BT": live_BT.astype(dtype),
        "old_BT": near(),
        "ref_BT": near(),
        "mask_BT": np.arange(T) < length_B[:, None],
        "rewards_B": rng.random(B).astype(dtype),
        "ids_B": np.repeat(np.arange(PROMPTS), GROUP),
    }


@dataclasses.dataclass(frozen=True)
class TrainExample:
    """The fields of google-tunix 0.1.7's `tunix.rl.common.TrainExample`."""

    prompt_ids: np.ndarray
    prompt_mask: np.ndarray
    completion_ids: np.ndarray
    completion_mask: np.ndarray
    advantages: np.ndarray
    ref_per_token_logps: np.ndarray | None
    old_per_token_logps: np.ndarray | None
    segment_ids: np.ndarray | None = None
    segment_positions: np.ndarray | None = None
    sampler_is_weights: np.ndarray | None = None


def tunix_example(arrays, advantages_B, kind=TrainExample, **changes):
    rng, mask_BT = np.random.default_rng(2), arrays["mask_BT"]
    fields = {
        "prompt_ids": rng.integers(1, 9, (B, 3)),
        "prompt_mask": np.ones((B, 3), bool),
        "completion_ids": np.where(mask_BT, rng.integers(1, 9, mask_BT.shape), 0),
        "completion_mask": mask_BT,
        "advantages": advantages_B,
        "ref_per_token_logps": None,
        "old_per_token_logps": arrays["old_BT"],
    }
    return kind(**(fields | changes))


def rows_of(example, rows):
    fields = {f.name: getattr(example, f.name) for f in dataclasses.fields(example)}
    return type(example)(**{k: None if x is None else x[rows] for k, x in fields.items()})


def maxtext_data(arrays, *, prompt=2, old=True):
    """A batch as `maxtext.experimental.rl` 0.2.5 holds it: prompt and completion in one row."""
    rng, mask_BT = np.random.default_rng(4), arrays["mask_BT"]
    mask_BL = np.pad(mask_BT, ((0, 0), (prompt, 0)))
    any_BL = mask_BL | (np.arange(mask_BL.shape[1]) < prompt)
    old_BL = np.pad(arrays["old_BT"], ((0, 0), (prompt, 0)), constant_values=-2.0)
    return {
        "prompt": rng.integers(1, 9, (B, prompt)),
        "prompt_true_length": np.full((B, 1), prompt),
        "prompt_completions": rng.integers(1, 9, mask_BL.shape),
        "prompt_completions_position": np.where(any_BL, np.arange(mask_BL.shape[1]), 0),
        "prompt_completions_segmentation": any_BL.astype(np.int32),
        "ar_completions_segmentation": mask_BL.astype(np.int32),
        "completions_logprobs": np.where(any_BL, old_BL, -np.inf) if old else None,
        "rewards": arrays["rewards_B"],
    }


def shifted(live_BT, prompt=2):
    """Log-probs [B, L − 1] whose column j is for token j + 1; 0 off the completion."""
    return jnp.pad(live_BT, ((0, 0), (prompt - 1, 0)))
