"""Sampling protocols of a benchmark: named presets whose fields can be changed.

Numbers under different protocols are not comparable, so every number carries its protocol's label.
"""

import dataclasses

from luspo_jax.benchmarks.record import BenchmarkError
from luspo_jax.hosts.values import TEMPERATURE, nearest


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Sampling settings of an evaluation.

    Attributes:
      name: name of the preset.
      temperature: 0 takes the most likely token.
      top_p: probability mass of the most likely tokens kept; 1 keeps all.
      top_k: number of most likely tokens kept, before top_p; 0 keeps all.
      max_response_length: tokens after which a response is truncated.
      num_samples: responses per problem unless the user sets it.
      changed: fields that differ from the preset's.
    """

    name: str
    temperature: float
    top_p: float
    top_k: int
    max_response_length: int
    num_samples: int
    changed: tuple[str, ...] = ()

    @property
    def sampling(self) -> dict[str, float | int]:
        """Returns the settings that two results must share to be comparable."""
        fields = ("temperature", "top_p", "top_k", "max_response_length")
        return {name: getattr(self, name) for name in fields}

    @property
    def label(self) -> str:
        """Returns `dapo: T=1 top_p=0.7 top_k=off max=20480 tokens`; marks a changed preset."""
        name = self.name + (f" with other {', '.join(self.changed)}" if self.changed else "")
        return (
            f"{name}: T={self.temperature:g} top_p={self.top_p:g} top_k={self.top_k or 'off'} "
            f"max={self.max_response_length} tokens"
        )


# DAPO, arXiv:2503.14476, section 4.1; LUSPO (arXiv:2602.05261) states a length of 32,768 and is
# assumed to sample alike. DeepSeek-R1 and its distilled models: their README. Qwen3: its model card
# for thinking mode. open_r1: its README. Greedy draws one response, since every further one would
# be the same.
PROTOCOLS = {
    preset.name: preset
    for preset in (
        Protocol("dapo", 1.0, 0.7, 0, 20_480, 32),
        Protocol("deepseek_r1", 0.6, 0.95, 0, 32_768, 64),
        Protocol("greedy", 0.0, 1.0, 0, 32_768, 1),
        Protocol("luspo", 1.0, 0.7, 0, 32_768, 32),
        Protocol("open_r1", 0.6, 0.95, 0, 32_768, 64),
        Protocol("qwen3", 0.6, 0.95, 20, 32_768, 32),
    )
}


def protocol(name: str, **fields: float | int | None) -> Protocol:
    """Returns the preset with the given fields replaced; None leaves a field.

    Raises:
      BenchmarkError: no such preset, or an invalid value, named in the message.
    """
    if name not in PROTOCOLS:
        raise BenchmarkError(f"unknown protocol {name!r}: {nearest(name, PROTOCOLS)}")
    preset = PROTOCOLS[name]
    given = {field: value for field, value in fields.items() if value is not None}
    chosen = dataclasses.replace(preset, **given)
    _check(chosen)
    changed = [f for f in chosen.sampling if getattr(chosen, f) != getattr(preset, f)]
    return dataclasses.replace(chosen, changed=tuple(changed))


def _check(chosen: Protocol) -> None:
    greedy_samples = chosen.num_samples if chosen.temperature == 0 else 1
    rules = (
        (
            "temperature",
            chosen.temperature == 0 or TEMPERATURE.allows(chosen.temperature),
            f"0, or {TEMPERATURE}",
        ),
        ("top_p", 0 < chosen.top_p <= 1, "in (0, 1]"),
        ("top_k", chosen.top_k >= 0, "at least 0 (0 keeps all)"),
        ("max_response_length", chosen.max_response_length >= 1, "at least 1 token"),
        ("num_samples", 1 <= chosen.num_samples <= 1000, "from 1 to 1000 (flag n)"),
        ("num_samples", greedy_samples == 1, "1 at temperature 0: greedy responses are all alike"),
    )
    for field, holds, must in rules:
        if not holds:
            raise BenchmarkError(f"{field}={getattr(chosen, field)} must be {must}")
