"""Rotary frequencies: plain, and stretched for longer contexts as Llama 3 and YaRN do."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from luspo_jax.hosts.values import ConfigError
from luspo_jax.models.expert_config import is_int

KINDS = ("llama3", "yarn")
_WHERE = ("rope_scaling", "rope_parameters")  # transformers 4 and 5


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context that the weights began with.

    Attributes:
      kind: "llama3" (Llama 3.1, arXiv:2407.21783) or "yarn" (arXiv:2309.00071).
      factor: by which the lowest frequencies are divided.
      original_max_position: the context before stretching, in tokens.
      low_freq_factor, high_freq_factor: of llama3; frequencies with fewer than the first many turns
        in the original context are divided, with more than the second many kept.
      beta_fast, beta_slow: of yarn; turns in the original context above which a frequency is kept,
        and below which it is divided.
      attention_factor: of yarn, multiplies cosines and sines; None takes 0.1 · ln(factor) + 1, or
        the ratio of two such terms with `mscale` and `mscale_all_dim`.
      mscale, mscale_all_dim: of yarn; 0 where absent.
      truncate: of yarn, whether the ramp's ends are rounded outwards to whole dimensions.
    """

    kind: str
    factor: float
    original_max_position: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(f"rope_type {self.kind!r} is not implemented; use one of {KINDS}")
        if not (is_int(self.original_max_position) and self.original_max_position > 0):
            raise ConfigError(
                "original_max_position_embeddings must be a positive integer, not "
                f"{self.original_max_position!r}"
            )
        for name in ("factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            if not (_is_number(value) and value > 0):
                raise ConfigError(f"rope_scaling.{name} must be a positive number, not {value!r}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"rope_scaling.high_freq_factor {self.high_freq_factor} must exceed "
                f"low_freq_factor {self.low_freq_factor}"
            )

    @property
    def rotation_factor(self) -> float:
        """Multiplies cosines and sines."""
        if self.kind == "llama3":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _magnitude(self.factor, self.mscale) / _magnitude(
                self.factor, self.mscale_all_dim
            )
        return _magnitude(self.factor)


# Our field → its name in rope_scaling, by kind.
_FIELDS = {
    "llama3": {
        "factor": "factor",
        "original_max_position": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    },
}
_REQUIRED = {"llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ()}


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Returns θ^(−2i/H), stretched where asked, float32 [H/2], on the host."""
    # In float32 steps, like the checkpoints' own code: a different rounding of a frequency, by 1e-7
    # of it, changes the angle by 0.003 at position 32,768.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # NumPy's float32 power rounds differently from machine to machine.
    powers = np.power(float(theta), exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / powers
    if scaling is None:
        return plain
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    return _yarn(plain, powers, theta, scaling)


def _llama3(plain, scaling):
    """Divides slow frequencies, keeps fast ones, and mixes those between."""
    one, factor = np.float32(1), np.float32(scaling.factor)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    context = np.float32(scaling.original_max_position)
    wavelength = np.float32(2 * math.pi) / plain
    slow, fast = wavelength > context / low, wavelength < context / high
    divided = np.where(slow, plain / factor, plain)
    smooth = (context / wavelength - low) / (high - low)
    mixed = (one - smooth) * divided / factor + smooth * divided
    return np.where(~slow & ~fast, mixed, divided).astype(np.float32)


def _yarn(plain, powers, theta, scaling):
    """Keeps fast frequencies, divides slow ones, with a ramp over the dimensions between."""
    half, dim = len(plain), 2 * len(plain)
    low, high = (
        dim
        * math.log(scaling.original_max_position / (turns * 2 * math.pi))
        / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    one = np.float32(1)
    ramp = (np.arange(half, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = one - np.clip(ramp, 0, 1).astype(np.float32)
    divided = one / (np.float32(scaling.factor) * powers)
    return (divided * (one - kept) + plain * kept).astype(np.float32)


def read(hf: Mapping[str, Any], kinds: Sequence[str] = KINDS) -> tuple[float, RopeScaling | None]:
    """Returns (the rotary base, scaling or None) of a `config.json`, transformers 4 or 5 style.

    Args:
      hf: its fields.
      kinds: of scaling that the decoder computes.

    Raises:
      ConfigError: naming the field that is missing, unknown, or of a kind that is not computed.
    """
    bases, scalings = {}, {}
    if hf.get("rope_theta") is not None:
        bases["rope_theta"] = hf["rope_theta"]
    for name in _WHERE:
        values = {key: value for key, value in (hf.get(name) or {}).items() if value is not None}
        kind = values.pop("rope_type", None) or values.get("type") or "default"
        values.pop("type", None)
        if values.get("partial_rotary_factor") == 1:
            del values["partial_rotary_factor"]
        if "rope_theta" in values:
            bases[f"{name}.rope_theta"] = values.pop("rope_theta")
        if kind != "default":
            scalings[name] = _scaling(name, kind, values, hf, kinds)
        elif values:
            raise ConfigError(f"{name} holds {values}, which is not implemented; remove it")
    if not bases:
        raise ConfigError(
            "rope_theta is missing (neither rope_theta nor rope_parameters.rope_theta); "
            "add it to config.json"
        )
    for found in (bases, scalings):
        if len(set(found.values())) > 1:
            raise ConfigError(f"{found} contradict each other; keep the right one")
    theta = next(iter(bases.values()))
    scaling = next(iter(scalings.values()), None)
    return float(theta) if is_int(theta) else theta, scaling


def _scaling(name, kind, values, hf, kinds):
    if kind not in kinds:
        raise ConfigError(
            f"{name} of type {kind!r} is not implemented, only "
            f"{', '.join(map(repr, ('default', *kinds)))}; set it to null and use sequences "
            "within the original context length"
        )
    fields = _FIELDS[kind]
    missing = [key for key in ("factor", *_REQUIRED[kind]) if key not in values]
    if missing:
        raise ConfigError(f"{name} of type {kind!r} lacks {', '.join(dict.fromkeys(missing))}")
    outside = hf.get("original_max_position_embeddings")
    values.setdefault("original_max_position_embeddings", hf.get("max_position_embeddings"))
    if outside is not None:
        values["original_max_position_embeddings"] = outside
    unknown = sorted(set(values) - set(fields.values()))
    if unknown:
        raise ConfigError(
            f"{name} holds {', '.join(unknown)}, which is not implemented for {kind!r}; remove it"
        )
    return RopeScaling(kind, **{ours: values[key] for ours, key in fields.items() if key in values})


def hf_fields(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Returns the fields of `config.json` that `read` reads."""
    if scaling is None:
        return {"rope_theta": theta, "rope_scaling": None}
    values = {key: getattr(scaling, ours) for ours, key in _FIELDS[scaling.kind].items()}
    values = {key: value for key, value in values.items() if value is not None}
    if scaling.kind == "yarn" and not scaling.mscale:
        values = {key: x for key, x in values.items() if not key.startswith("mscale")}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": scaling.kind, **values}}


def _magnitude(factor, scale=1.0):
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _is_number(value):
    return is_int(value) or isinstance(value, float)
