"""How response length relates to advantage and to correctness."""

import zlib

import numpy as np


def advantage_length_correlation(
    advantages_B: np.ndarray, lengths_B: np.ndarray, group_ids_B: np.ndarray
) -> float:
    """Returns the within-group correlation of advantage and length; NaN if either is constant.

    Σ_i (A_i − Ā_g)(L_i − L̄_g) / √(Σ_i (A_i − Ā_g)² · Σ_i (L_i − L̄_g)²), pooled over groups
    """
    a_B = _centered(np.asarray(advantages_B, np.float64), group_ids_B)
    l_B = _centered(np.asarray(lengths_B, np.float64), group_ids_B)
    scale = np.sqrt(np.sum(a_B**2) * np.sum(l_B**2))
    return float(np.sum(a_B * l_B) / scale) if scale > 0 else float("nan")


def length_by_correctness(lengths_B: np.ndarray, correct_B: np.ndarray) -> tuple[float, float]:
    """Returns the mean length in tokens of correct and incorrect responses; NaN if none."""
    correct_B = np.asarray(correct_B, bool)
    return tuple(
        float(np.mean(lengths_B[rows])) if rows.any() else float("nan")
        for rows in (correct_B, ~correct_B)
    )


def accuracy_by_length_third(
    lengths_B: np.ndarray, correct_B: np.ndarray, group_ids_B: np.ndarray
) -> np.ndarray:
    """Returns the accuracy of the shortest, middle and longest third of each problem's responses.

    Ranking within a problem compares long and short answers to the same question; the thirds are
    pooled over problems. Responses of equal length share their accuracy evenly (each counts with
    their mean), so that the order of rows does not matter.
    """
    hits, counts = np.zeros(3), np.zeros(3)
    for group in np.unique(group_ids_B):
        rows = np.flatnonzero(group_ids_B == group)
        order = rows[np.argsort(lengths_B[rows], kind="stable")]
        lengths, correct = lengths_B[order], np.asarray(correct_B, np.float64)[order]
        _, run, size = np.unique(lengths, return_inverse=True, return_counts=True)
        shared = (np.bincount(run, weights=correct) / size)[run]
        third = np.arange(len(order)) * 3 // len(order)
        hits += np.bincount(third, weights=shared, minlength=3)
        counts += np.bincount(third, minlength=3)
    return np.divide(hits, counts, out=np.full(3, np.nan), where=counts > 0)


def length_by_pass_rate(
    lengths_B: np.ndarray, correct_B: np.ndarray, group_ids_B: np.ndarray
) -> tuple[float, np.ndarray]:
    """Returns the mean length on solved prompts, and by quartile of the pass rate; NaN if none.

    The pass rate p of a prompt is the share of its responses that are right. Solved: p = 1, so that
    the group has no gradient of its own. Quartile q = 1 … 4 holds (q − 1)/4 < p ≤ q/4; prompts
    without a right response are in none. Means are over responses.

    Returns:
      Tokens; tokens by quartile [4].
    """
    _, group = np.unique(group_ids_B, return_inverse=True)
    right_G, size_G = np.bincount(group, weights=correct_B), np.bincount(group)
    # −1 if none is right; whole numbers, as rounding would move 1/4 out of its quartile.
    quartile_B = (-(-4 * right_G.astype(np.int64) // size_G) - 1)[group]
    solved_B = (right_G == size_G)[group]
    rows = [solved_B, *(quartile_B == q for q in range(4))]
    solved, *quartiles = (np.mean(lengths_B[chosen]) if chosen.any() else np.nan for chosen in rows)
    return float(solved), np.array(quartiles)


def repetition(tokens: np.ndarray, *, ngram: int = 4) -> float:
    """Returns the share of a response's n-grams that occur earlier in it: 0 = none, →1 = a loop."""
    total = len(tokens) - ngram + 1
    if total < 1:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), ngram)
    return 1.0 - len(np.unique(windows, axis=0)) / total


def compress_ratio(text: str) -> float:
    """Returns the bytes of `text` over its zlib-compressed bytes; rises with repetition."""
    raw = text.encode("utf-8")
    return len(raw) / len(zlib.compress(raw)) if raw else 1.0


def _centered(values_B, group_ids_B):
    _, group = np.unique(group_ids_B, return_inverse=True)
    means = np.bincount(group, weights=values_B) / np.bincount(group)
    return values_B - means[group]
