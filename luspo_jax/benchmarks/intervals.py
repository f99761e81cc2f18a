"""95 % intervals of an accuracy measured on few problems with several responses each.

Responses to one problem are correlated, so n responses to each of N problems carry less information
than N·n independent ones. There are two methods, each used where its coverage is correct
(`python -m experiments.bench.coverage` measures it):

* Wilson's score interval at the effective number of responses, estimated from the spread between
  problems. It assumes little about the problems' difficulty, but needs right and wrong answers on
  several of them.
* The beta-binomial model: each problem's accuracy is a draw from a beta distribution of mean μ and
  intra-problem correlation ρ; μ has Jeffreys' prior, ρ a uniform one. It is used if fewer than
  `FEW` problems' worth of answers are right (or wrong): the observed spread then says too little of
  the true one, and a normal interval at μ = 0.02 covers 60 to 90 %.
"""

import math
from collections.abc import Sequence

import numpy as np

FEW = 2.0  # problems' worth of right, or of wrong, answers
_T_SMALL = {1: 12.7062, 2: 4.3027, 3: 3.1824}
_Z = 1.959964
_MEANS, _CORRELATIONS = 400, 24  # cells of the posterior's grid


def accuracy_interval(right: Sequence[int], total: Sequence[int]) -> tuple[float, float]:
    """Returns (low, high) of a 95 % interval for the mean accuracy over similar problems.

    Args:
      right: right responses to each problem.
      total: responses to each problem, at least one.

    Raises:
      ValueError: no problem, or invalid counts.
    """
    right, total = np.asarray(right, np.int64), np.asarray(total, np.int64)
    if not len(right) or len(right) != len(total):
        raise ValueError(f"need one count of each kind a problem, not {len(right)}, {len(total)}")
    if (total < 1).any() or (right < 0).any() or (right > total).any():
        raise ValueError("counts of right responses must lie in 0 … responses, at least one")
    shares = right / total
    mean = float(shares.mean())
    if len(shares) < 2:
        return _beta_binomial(right, total)
    low, high = _wilson(shares, int(total.sum()))
    if len(shares) * min(mean, 1 - mean) >= FEW:
        return low, high
    # Near the middle take the wider of both; near the edge the model, which accounts for the edge.
    model_low, model_high = _beta_binomial(right, total)
    if mean <= 0.5:
        return model_low, max(high, model_high)
    return min(low, model_low), model_high


def paired_interval(
    ours: tuple[Sequence[int], Sequence[int]], theirs: tuple[Sequence[int], Sequence[int]]
) -> tuple[float, float]:
    """Returns (low, high) of a 95 % interval for an accuracy difference on the same problems.

    It combines both accuracies' intervals (l, u) and the correlation r of the problems' shares, as
    Newcombe (1998, method 10) does for paired proportions: low = d − √((p − l)² − 2r(p − l)(u' −
    p') + (u' − p')²), and high likewise. Unlike a t interval, it is not empty if all differences
    are zero.

    Args:
      ours: (right, total) by problem, as in `accuracy_interval`.
      theirs: the same problems in the same order.
    """
    shares = [np.asarray(right) / np.asarray(total) for right, total in (ours, theirs)]
    if len(shares[0]) != len(shares[1]):
        raise ValueError(f"not paired: {len(shares[0])} problems and {len(shares[1])}")
    (p, q), r = (float(s.mean()) for s in shares), _correlation(*shares)
    (low, high), (other_low, other_high) = accuracy_interval(*ours), accuracy_interval(*theirs)

    def width(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * r * a * b + b * b, 0.0))

    down, up = width(p - low, other_high - q), width(high - p, q - other_low)
    return max(-1.0, p - q - down), min(1.0, p - q + up)


def t_quantile(freedom: int) -> float:
    """Returns Student's t at 97.5 %: table below four degrees, else Cornish-Fisher (to 0.002)."""
    if freedom < 1:
        raise ValueError("a t quantile needs at least one degree of freedom")
    if freedom in _T_SMALL:
        return _T_SMALL[freedom]
    z, f = _Z, freedom
    return (
        z
        + (z**3 + z) / (4 * f)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * f**3)
    )


def _wilson(shares: np.ndarray, responses: int) -> tuple[float, float]:
    """Returns the score interval at n_eff = p(1 − p) N / s², clipped to [N, responses]."""
    count, p = len(shares), float(shares.mean())
    spread, t = float(shares.var(ddof=1)), t_quantile(count - 1)
    size = p * (1 - p) * count / spread if spread > 0 else responses
    size = min(max(size, count), responses)
    center = (p + t * t / (2 * size)) / (1 + t * t / size)
    half = t / (1 + t * t / size) * math.sqrt(p * (1 - p) / size + (t / (2 * size)) ** 2)
    return max(0.0, center - half), min(1.0, center + half)


def _beta_binomial(right: np.ndarray, total: np.ndarray) -> tuple[float, float]:
    """Returns the equal-tailed 95 % of the posterior of μ; closed at 0 or 1 if all agree."""
    theta = (np.arange(_MEANS) + 0.5) / _MEANS * np.pi / 2  # uniform in θ is Jeffreys' in sin²θ
    mean_M1 = np.sin(theta)[:, None] ** 2
    rho = (np.arange(_CORRELATIONS) + 0.5) / _CORRELATIONS
    strength = (1 - rho) / rho
    log_weight = _log_likelihood(right, total, mean_M1 * strength, (1 - mean_M1) * strength)
    weight = np.exp(log_weight - log_weight.max()).sum(axis=1)
    cdf = np.concatenate([[0.0], np.cumsum(weight / weight.sum())])
    edges = np.sin(np.arange(_MEANS + 1) / _MEANS * np.pi / 2) ** 2
    low, high = (float(np.interp(level, cdf, edges)) for level in (0.025, 0.975))
    return (low if right.any() else 0.0), (high if (right < total).any() else 1.0)


def _log_likelihood(
    right: np.ndarray, total: np.ndarray, a_MR: np.ndarray, b_MR: np.ndarray
) -> np.ndarray:
    """Returns Σ log Γ(c + a)Γ(n − c + b)Γ(a + b) / (Γ(a)Γ(b)Γ(n + a + b)) over problems, in [M, R].

    Γ(c + a)/Γ(a) = Π_{j < c} (a + j), so each j counts once per problem with c > j.
    """
    result = np.zeros_like(a_MR)
    for j in range(int(total.max())):
        hits, misses = int((right > j).sum()), int((total - right > j).sum())
        if hits:
            result += hits * np.log(a_MR + j)
        if misses:
            result += misses * np.log(b_MR + j)
        result -= int((total > j).sum()) * np.log(a_MR + b_MR + j)
    return result


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    scale = a.std() * b.std()
    return float(np.mean((a - a.mean()) * (b - b.mean())) / scale) if scale > 0 else 0.0
