"""Settings to measure response length, steer the length scale, and detect degenerate lengths.

The section `length` of a configuration.
"""

import dataclasses
import math

from luspo_jax.hosts.values import nearest

STEERING = ("none", "band", "pressure")
_MOST = 1e9  # largest penalty: as a reward, its square must fit float32
MITIGATIONS = ("none", "penalty", "scale")


@dataclasses.dataclass(frozen=True)
class LengthSettings:
    """Instruments and controls of response length; measuring costs nothing while `every` is 0.

    Attributes:
      every: rollout steps between two measurements of length pressure; 0 = never. If nonzero, the
        state holds a second copy of the parameters (to measure the update actually taken).
      share: share of groups to measure.
      objectives: what to measure besides the run's own objective, joined with commas: presets, each
        perhaps with a shaping, another advantage or a reward of the group, as "luspo+kimi".
      bin_edges: ascending lengths in tokens, joined with commas, that bound the length bins;
        empty = 1/8, 1/4 and 1/2 of the longest response.
      steer: what steers α of length_scale = "adaptive": "band" keeps the mean length between
        `target_low` and `target_high`; "pressure" drives the run's own length pressure to zero.
      target_low: lowest target for the mean length, tokens (band).
      target_high: highest target for the mean length, tokens (band).
      alpha_low: least α.
      alpha_high: greatest α.
      alpha_rate: largest change of α in one step.
      lambda_rate: learning rate of λ of length_scale = "lambda-grpo"; 0 keeps it where it starts.
      smoothing: weight of the past in the running means used for steering.
      window: rollout steps in each of the two successive windows whose means are compared.
      growth: relative growth of length over a window above which accuracy must grow too.
      fall: relative fall of length over a window beyond which accuracy must grow too; 1 = any fall
        is fine, as in a run that shortens on purpose.
      gain: growth of accuracy that justifies either.
      mitigation: response to a run flagged as degenerate: "penalty" subtracts `penalty` · L /
        max_response_length from rewards, "scale" lowers α by `alpha_rate` a step; while length
        collapses, the same with the opposite sign.
      penalty: reward lost by the longest possible response.
      account_window: rollout steps over which lengths trained on and lengths sampled are compared.
      account_limit: relative difference of their means above which a run warns.

    Raises:
      ValueError: an invalid field, named in the message.
    """

    every: int = 0
    share: float = 0.25
    objectives: str = "grpo,gspo,luspo"
    bin_edges: str = ""
    steer: str = "none"
    target_low: float = 0.0
    target_high: float = 0.0
    alpha_low: float = 0.0
    alpha_high: float = 1.5
    alpha_rate: float = 0.05
    lambda_rate: float = 0.0
    smoothing: float = 0.7
    window: int = 10
    growth: float = 0.1
    fall: float = 0.1
    gain: float = 0.01
    mitigation: str = "none"
    penalty: float = 0.1
    account_window: int = 20
    account_limit: float = 0.1

    def __post_init__(self):
        for broken, message in self._problems():
            if broken:
                raise ValueError(message)

    def _problems(self):
        edges = self._edges()
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return [
            *(
                (
                    isinstance(value, float) and not math.isfinite(value),
                    f"{name}={value}: not finite",
                )
                for name, value in values.items()
            ),
            (self.every < 0, f"every={self.every} must not be negative"),
            (not 0 < self.share <= 1, f"share={self.share} must be in (0, 1]"),
            (
                edges is None or list(edges) != sorted({*edges}) or min(edges, default=1) < 1,
                f'bin_edges="{self.bin_edges}" must be ascending lengths such as "64,256,1024"',
            ),
            (
                self.steer not in STEERING,
                f'steer="{self.steer}" does not exist: {nearest(self.steer, STEERING)}',
            ),
            (
                self.steer == "band" and not 0 < self.target_low <= self.target_high,
                f"target_low={self.target_low:g} and length.target_high={self.target_high:g} must "
                "be a band of lengths in tokens, 0 < target_low ≤ target_high",
            ),
            (
                self.steer == "pressure" and not self.every,
                'steer="pressure" needs measurements: set length.every',
            ),
            (
                not -2 <= self.alpha_low < self.alpha_high <= 2,
                f"alpha_low={self.alpha_low:g} and length.alpha_high={self.alpha_high:g} must "
                "satisfy -2 ≤ alpha_low < alpha_high ≤ 2",
            ),
            (not self.alpha_rate > 0, f"alpha_rate={self.alpha_rate:g} must be > 0"),
            (self.lambda_rate < 0, f"lambda_rate={self.lambda_rate:g} must not be negative"),
            (not 0 <= self.smoothing < 1, f"smoothing={self.smoothing:g} must be in [0, 1)"),
            (self.window < 1, f"window={self.window} must be at least 1"),
            (self.growth < 0, f"growth={self.growth:g} must not be negative"),
            (not 0 <= self.fall <= 1, f"fall={self.fall:g} must be in [0, 1]"),
            (
                self.mitigation not in MITIGATIONS,
                f'mitigation="{self.mitigation}" does not exist: '
                f"{nearest(self.mitigation, MITIGATIONS)}",
            ),
            (
                not 0 <= self.penalty <= _MOST,
                f"penalty={self.penalty:g} must be at least 0 and at most {_MOST:g}",
            ),
            (
                self.mitigation == "penalty" and not self.penalty,
                'penalty=0 takes nothing: mitigation="penalty" needs a penalty > 0',
            ),
            (
                self.account_window < 2,
                f"account_window={self.account_window} must be at least 2: the error of a "
                "difference is estimated from that between steps",
            ),
            (not self.account_limit > 0, f"account_limit={self.account_limit:g} must be > 0"),
        ]

    def _edges(self):
        try:
            return tuple(int(edge) for edge in self.bin_edges.split(",") if edge.strip())
        except ValueError:
            return None

    def bins(self, max_response_length: int) -> tuple[int, ...]:
        """Returns the edges of the length bins, in tokens."""
        default = sorted({max(1, max_response_length // part) for part in (8, 4, 2)})
        return self._edges() or tuple(default)

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the presets to measure."""
        return tuple(name.strip() for name in self.objectives.split(",") if name.strip())
