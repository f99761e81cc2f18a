"""The presets once more, in float64 NumPy, row by row, from the papers' formulas.

Nothing here is shared with the package: constants are written out, products are products, groups
are dictionaries. `live` log-probs carry the gradient and `frozen` ones are the same numbers behind
a stop-gradient, so that finite differences see what automatic differentiation sees.
"""

import dataclasses
import math
from collections import defaultdict

import numpy as np


@dataclasses.dataclass
class Row:
    """One response: vectors over its tokens."""

    live: np.ndarray
    frozen: np.ndarray
    old: np.ndarray
    ref: np.ndarray
    sampler: np.ndarray
    entropy: np.ndarray
    collision: np.ndarray
    starts: np.ndarray
    advantage: float | np.ndarray = 0.0

    @property
    def length(self) -> int:
        return len(self.live)


# Advantages: (rewards, groups, lengths) -> list of floats, all responses present.


def by_group(groups):
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    return [members[group] for group in groups]


def group_mean(rewards, groups, lengths):
    return [
        reward - sum(rewards[j] for j in mates) / len(mates)
        for reward, mates in zip(rewards, by_group(groups), strict=True)
    ]


def group_std(rewards, groups, lengths):
    centred = group_mean(rewards, groups, lengths)
    return [
        a / (np.std([rewards[j] for j in mates], ddof=1) + 1e-6)
        for a, mates in zip(centred, by_group(groups), strict=True)
    ]


def rloo(rewards, groups, lengths):
    return [
        rewards[i] - sum(rewards[j] for j in mates if j != i) / (len(mates) - 1)
        for i, mates in enumerate(by_group(groups))
    ]


def maxrl(rewards, groups, lengths):
    means = [sum(rewards[j] for j in mates) / len(mates) for mates in by_group(groups)]
    return [(reward - m) / (m + 1e-6) for reward, m in zip(rewards, means, strict=True)]


def opo(rewards, groups, lengths):
    result = []
    for i, mates in enumerate(by_group(groups)):
        weight = sum(lengths[j] for j in mates)
        result.append(rewards[i] - sum(lengths[j] * rewards[j] for j in mates) / weight)
    return result


def batch_std(rewards, groups, lengths):
    return [a / (np.std(rewards, ddof=1) + 1e-6) for a in group_mean(rewards, groups, lengths)]


def reinforce_pp_baseline(rewards, groups, lengths):
    centred = group_mean(rewards, groups, lengths)
    tokens = np.concatenate([[a] * int(n) for a, n in zip(centred, lengths, strict=True)])
    return list((np.array(centred) - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8))


def gdpo(rewards, groups, lengths, parts, weights):
    score = np.zeros(len(rewards))
    for part, weight in zip(parts, weights, strict=True):
        for i, mates in enumerate(by_group(groups)):
            values = [part[j] for j in mates]
            score[i] += weight * (part[i] - np.mean(values)) / (np.std(values, ddof=1) + 1e-4)
    return list((score - score.mean()) / (score.std(ddof=1) + 1e-4))


def otb(rewards, groups, lengths, rows):
    """Token by token, over the responses that still go on."""
    energy = [np.cumsum(1 - 2 * np.exp(row.old) + row.collision) for row in rows]
    result = []
    for i, mates in enumerate(by_group(groups)):
        tokens = np.zeros(lengths[i])
        for t in range(lengths[i]):
            on = [j for j in mates if lengths[j] > t]
            tokens[t] = rewards[i]
            if len(on) > 1:
                weight = [energy[j][t] for j in on]
                tokens[t] -= np.dot(weight, [rewards[j] for j in on]) / sum(weight)
        result.append(tokens)
    return result


def shaped_qglas(rewards, groups, lengths):
    base = group_std(rewards, groups, lengths)
    result = list(base)
    for i, mates in enumerate(by_group(groups)):
        if base[i] > 0:
            reference = np.mean([lengths[j] for j in mates if base[j] > 0])
            saved = min(max((reference - lengths[i]) / (reference + 1e-6), 0), 0.5) / 0.5
            result[i] += 0.5 * np.std([rewards[j] for j in mates], ddof=1) * saved
    return result


def shaped_intern_s2(rewards, groups, lengths):
    base = group_std(rewards, groups, lengths)
    result = list(base)
    for i, mates in enumerate(by_group(groups)):
        good = [j for j in mates if base[j] > 0]
        if base[i] <= 0 or len(good) < 0.5 * len(mates):
            continue
        least, most = (f(lengths[j] for j in good) for f in (min, max))
        weight = {j: 0.5 + 0.5 * (1 - (lengths[j] - least) / (most - least + 1e-6)) for j in good}
        scale = sum(base[j] for j in good) / sum(weight[j] * base[j] for j in good)
        result[i] = scale * weight[i] * base[i]
    return result


def softmax_weights(groups, lengths):
    """λ-GRPO's, λ 1 and r 0.1."""
    result = []
    for i, mates in enumerate(by_group(groups)):
        of_group = np.array([lengths[j] for j in mates], float)
        spread = of_group.std(ddof=1) or 1.0
        lifted = np.exp(1 + 0.1 * (of_group - of_group.mean()) / spread)
        own = np.exp(1 + 0.1 * (lengths[i] - of_group.mean()) / spread)
        result.append(len(mates) * own / lifted.sum())
    return result


# Token losses: Row -> vector over its tokens (a sequence loss stands at each of them).


def ppo(low, high):
    def token_losses(row):
        r = np.exp(row.live - row.old)
        clipped = np.clip(r, 1 - low, 1 + high)
        return -np.minimum(r * row.advantage, clipped * row.advantage)

    return token_losses


def unclipped(row):
    return -np.exp(row.live - row.old) * row.advantage


def sequence_ratio(row):
    return np.prod(np.exp(row.live - row.old)) ** (1 / row.length)


def sequence_ppo(low, high):
    def token_losses(row):
        s = sequence_ratio(row)
        value = -min(s * row.advantage, np.clip(s, 1 - low, 1 + high) * row.advantage)
        return np.full(row.length, value)

    return token_losses


def sequence_unclipped(row):
    return np.full(row.length, -sequence_ratio(row) * row.advantage)


def gspo_token(row):
    s = np.prod(np.exp(row.frozen - row.old)) ** (1 / row.length)
    s_t = s * np.exp(row.live) / np.exp(row.frozen)
    return -np.minimum(s_t * row.advantage, np.clip(s_t, 1 - 3e-4, 1 + 4e-4) * row.advantage)


def sapo(row):
    tau = 1.0 if row.advantage > 0 else 1.05
    r = np.exp(row.live - row.old)
    return -(4 / tau) / (1 + np.exp(-tau * (r - 1))) * row.advantage


def fspo(row):
    band = (1000 / row.length) ** 0.5
    return sequence_ppo(3e-4 * band, 4e-4 * band)(row)


def soft_sequence(row):
    tau = 1.0 if row.advantage > 0 else 1.05
    gate = (4 / tau) / (1 + np.exp(-tau * (np.exp(row.live - row.old) - 1)))
    return np.full(row.length, -row.advantage * np.prod(gate) ** (1 / row.length))


def dhpo(row):
    return 0.5 * ppo(0.2, 0.2)(row) + 0.5 * sequence_ppo(3e-4, 4e-4)(row)


def by_segment(row):
    """LUSPO's clip of the geometric mean of each segment."""
    starts = np.flatnonzero(row.starts)
    losses = []
    for part in np.split(row.live - row.old, starts[starts > 0]):
        s = np.prod(np.exp(part)) ** (1 / len(part))
        value = -min(s * row.advantage, np.clip(s, 0.998, 1.0025) * row.advantage)
        losses.append(np.full(len(part), value))
    return np.concatenate(losses)


def cispo(row):
    weight = np.minimum(np.exp(row.frozen - row.old), 5.0)
    return -weight * row.advantage * row.live


def gmpo(row):
    sign = np.sign(row.advantage)
    d = row.live - row.old
    held = sign * np.minimum(sign * d, sign * np.clip(d, -0.4, 0.4))
    return np.full(row.length, -row.advantage * np.prod(np.exp(held)) ** (1 / row.length))


def vespo(row):
    k, lam = (2, 3) if row.advantage >= 0 else (3, 2)
    w = np.prod(np.exp(row.frozen - row.old))
    phi = math.exp(lam) * w**k * math.exp(-lam * w)
    return -phi * row.advantage * row.live


def dppo_tv(row):
    p, q = np.exp(row.frozen), np.exp(row.old)
    keep = p - q <= 0.15 if row.advantage > 0 else p - q >= -0.15
    return -1.0 * keep * np.minimum(p / q, 20) * row.advantage * row.live


def dppo_kl(row):
    p, q = np.exp(row.frozen), np.exp(row.old)
    kl = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    away = p > q if row.advantage > 0 else p < q
    keep = ~((kl > 0.05) & away)
    return -1.0 * keep * np.minimum(p / q, 20) * row.advantage * row.live


def minirl(row):
    r = np.exp(row.frozen - row.old)
    keep = r <= 1.27 if row.advantage > 0 else r >= 0.8
    return -1.0 * keep * r * row.advantage * row.live


# Aggregations: list of token-loss vectors -> float.


def mean_of_means(losses):
    return np.mean([x.mean() for x in losses])


def token_mean(losses):
    return np.concatenate(losses).mean()


def mean_of_sums(losses):
    return np.mean([x.sum() for x in losses])


def mean_of_sums_over(constant):
    return lambda losses: mean_of_sums(losses) / constant


def token_sum(losses):
    return np.concatenate(losses).sum()


def vl_norm(losses):
    """Weights proportional to L^−α that add up to 1, applied to token sums."""
    inverse = np.array([len(x) ** -0.75 for x in losses])
    return sum(w * x.sum() for w, x in zip(inverse / inverse.sum(), losses, strict=True))


LUSPO = sequence_ppo(2e-3, 2.5e-3)

# Preset -> (advantage, token losses, aggregation).
METHODS = {
    "grpo": (group_std, ppo(0.2, 0.2), mean_of_means),
    "bnpo": (group_std, ppo(0.2, 0.2), token_mean),
    "dapo": (group_std, ppo(0.2, 0.28), token_mean),
    "dr_grpo": (group_mean, ppo(0.2, 0.2), mean_of_sums_over(3000)),
    "gspo": (group_std, sequence_ppo(3e-4, 4e-4), mean_of_means),
    "gspo_token": (group_std, gspo_token, mean_of_means),
    "luspo": (group_std, LUSPO, mean_of_sums),
    "sapo": (group_std, sapo, mean_of_means),
    "cispo": (group_std, cispo, token_mean),
    "gmpo": (group_std, gmpo, mean_of_means),
    "vespo": (group_std, vespo, token_mean),
    "dppo_tv": (group_mean, dppo_tv, mean_of_sums_over(3000)),
    "dppo_kl": (group_mean, dppo_kl, mean_of_sums_over(3000)),
    "rloo": (rloo, ppo(0.2, 0.2), token_mean),
    "maxrl": (maxrl, ppo(0.2, 0.2), token_mean),
    "opo": (opo, ppo(0.2, 0.2), token_mean),
    "reinforce_pp_baseline": (reinforce_pp_baseline, ppo(0.2, 0.2), token_mean),
    "minirl": (group_mean, minirl, token_sum),
    "vl_norm": (group_std, ppo(0.2, 0.3), vl_norm),
    "fspo": (group_std, fspo, mean_of_means),
    "soft_sequence": (group_std, soft_sequence, mean_of_means),
    "dhpo": (group_std, dhpo, mean_of_means),
    "hispo": (group_std, by_segment, mean_of_means),
    "sspo": (group_std, by_segment, mean_of_means),
    "lite_ppo": (batch_std, ppo(0.2, 0.2), token_mean),
    "otb": (otb, ppo(0.2, 0.2), token_mean),
    "gdpo": (gdpo, ppo(0.2, 0.2), mean_of_means),
    "qglas": (shaped_qglas, ppo(0.2, 0.2), mean_of_means),
    "intern_s2": (shaped_intern_s2, ppo(0.2, 0.2), mean_of_means),
    "lambda_grpo": (group_std, ppo(0.2, 0.2), mean_of_means),
    "gspo_token_mean": (group_std, LUSPO, token_mean),
    "gspo_dr_grpo_constant": (group_std, LUSPO, mean_of_sums_over(3000)),
    "luspo_normalized": (group_std, LUSPO, mean_of_sums_over(1000)),
    "luspo_opo": (opo, LUSPO, mean_of_sums),
    "grpo_unclipped": (group_std, unclipped, mean_of_means),
    "gspo_unclipped": (group_std, sequence_unclipped, mean_of_means),
    "luspo_unclipped": (group_std, sequence_unclipped, mean_of_sums),
}


def rows_of(arrays, live_BT) -> list[Row]:
    """The rows of a case that have a response."""
    rows = []
    for i, mask_T in enumerate(arrays["response_mask_BT"]):
        tokens = {
            name: arrays[f"{name}_BT"][i][mask_T]
            for name in (
                "old_logprobs",
                "ref_logprobs",
                "sampler_logprobs",
                "entropy",
                "collision",
                "segment_starts",
            )
        }
        frozen = arrays["logprobs_BT"][i][mask_T]
        rows.append(Row(live_BT[i][mask_T], frozen, *tokens.values()))
    return rows


def binary_kl(p, q):
    """KL of two coins, as the formula stands."""
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def within_binary_kl(old, sampler, most):
    """Whether each token is kept."""
    p, q = np.exp(old), np.exp(sampler)
    return (binary_kl(p, q) <= most) & (binary_kl(q, p) <= most)


def m2po_kept(log_rho, most):
    """The tokens that are left: the largest go, and those equal to it, until the rest are close."""
    size = np.abs(log_rho)
    kept = np.full(size.shape, True)
    while kept.any() and np.mean(size[kept] ** 2) > most:
        kept &= size < size[kept].max()
    return kept


def loss(name: str, arrays, live_BT, *, terms: bool = False) -> float:
    """The loss of a preset; `terms` adds what `objective_cases.LOADED` switches on."""
    advantage, token_losses, aggregate = METHODS[name]
    rows = rows_of(arrays, live_BT)
    known = list(arrays["rewards_B"]), list(arrays["group_ids_B"]), [row.length for row in rows]
    if advantage is otb:
        advantages = otb(*known, rows)
    elif advantage is gdpo:
        advantages = gdpo(*known, arrays["parts_BM"].T, (1.0, 0.5))
    else:
        advantages = [float(value) for value in advantage(*known)]
    for row, value in zip(rows, advantages, strict=True):
        row.advantage = value
    losses = [token_losses(row) for row in rows]
    if name == "lambda_grpo":
        weights = softmax_weights(*known[1:])
        losses = [w * x for w, x in zip(weights, losses, strict=True)]
    if not terms:
        return float(aggregate(losses))
    threshold = np.quantile(np.concatenate([row.entropy for row in rows]), 1 - 0.6)
    close = m2po_kept(np.concatenate([row.old - row.sampler for row in rows]), 0.1)
    close = np.split(close, np.cumsum([row.length for row in rows])[:-1])
    for i, row in enumerate(rows):
        weight = (row.entropy >= threshold).astype(float)
        if name != "vespo":
            weight = weight * np.minimum(np.exp(row.old - row.sampler), 2)
            weight = weight * within_binary_kl(row.old, row.sampler, 0.1) * close[i]
        if row.advantage < 0 and np.mean(row.old - row.frozen) > 0.05:
            weight = 0 * weight
        d = row.ref - row.live
        losses[i] = losses[i] * weight + 0.1 * (np.exp(d) - d - 1)
    entropy = np.concatenate([row.entropy for row in rows]).mean()
    return float(aggregate(losses)) - 0.01 * float(entropy)


def gradient(name: str, arrays, *, terms: bool = False, step: float = 2e-4) -> np.ndarray:
    """∂loss/∂logprobs_BT by five-point central differences: error O(step⁴)."""
    point_BT = arrays["logprobs_BT"]
    grad_BT = np.zeros_like(point_BT)
    for index in zip(*np.nonzero(arrays["response_mask_BT"]), strict=True):
        values = []
        for k in (-2, -1, 1, 2):
            moved_BT = point_BT.copy()
            moved_BT[index] += k * step
            values.append(loss(name, arrays, moved_BT, terms=terms))
        far_low, low, high, far_high = values
        grad_BT[index] = (8 * (high - low) - (far_high - far_low)) / (12 * step)
    return grad_BT
