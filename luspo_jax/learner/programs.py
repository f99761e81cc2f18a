"""The compiled programs of a training step, listed once: training runs, a rehearsal lowers them."""

import dataclasses
from typing import Any

import jax
import numpy as np

from luspo_jax.learner.logprobs import LogprobRule, TokenLogprobs, of_reference, row_logprobs
from luspo_jax.learner.plan import Plan
from luspo_jax.learner.rows import Planner, abstract_token_rows
from luspo_jax.learner.state import UpdateRule, policy_params
from luspo_jax.learner.step import update_step
from luspo_jax.types import Images, ResponseRows, TokenRows, TrainBatch, TrainState


@dataclasses.dataclass(frozen=True)
class LogprobPass:
    """A pass without gradients over the responses of a step.

    Attributes:
      policy: the field of the train state that holds it.
      logprobs: how log-probs are computed.
      kept: whether later stages read the log-probs; else they are only compared with the sampler's.
      record_experts: whether the routers' expert ids are kept.
    """

    policy: str
    logprobs: LogprobRule
    kept: bool = True
    record_experts: bool = False

    def __call__(self, state: TrainState, rows: TokenRows) -> TokenLogprobs:
        """Computes the log-probs of rows on the devices."""
        return row_logprobs(self._params(state), rows, **self._static)

    def lower(self, state: TrainState, rows: TokenRows) -> Any:
        """Returns the lowered program; state and rows may be shapes."""
        return row_logprobs.lower(self._params(state), rows, **self._static)

    def _params(self, state):
        return policy_params(state, self.logprobs.how, self.policy)

    @property
    def _static(self):
        return {"rule": self.logprobs, "record_experts": self.record_experts}


@dataclasses.dataclass(frozen=True)
class StepPrograms:
    """The programs of a step between its rollout and the next.

    Attributes:
      rule: of the update.
      minibatches: optimizer steps of a pass over the responses.
      epochs: passes over the responses.
    """

    rule: UpdateRule
    minibatches: int = 1
    epochs: int = 1

    def passes(self, *, stale: bool = False, check: bool = False) -> dict[str, LogprobPass]:
        """Returns the passes of a step before its updates, by name, in order.

        A step of one update needs no pass for the old policy, because the update's own forward pass
        computes its log-probs, unless another policy sampled some tokens (`stale`) or tokens of the
        whole step compete. `check` compares sampler and trainer in any case. An update that reads
        its responses for the only time computes the reference policy's log-probs, too, unless the
        reward needs them before.
        """
        objective, logprobs = self.rule.objective, self.rule.logprobs
        several = self.minibatches * self.epochs > 1
        kept = several or objective.ranks_tokens or objective.kl_in_reward or stale
        found = {}
        if kept or check:
            record = kept and logprobs.how.model.num_experts > 0
            told = dataclasses.replace(logprobs, collision=objective.token_advantages)
            found["old"] = LogprobPass("params", told, kept, record)
        if objective.kl_coef > 0 and (objective.kl_in_reward or self.epochs > 1):
            found["ref"] = LogprobPass("ref_params", of_reference(logprobs))
        return found

    def spares_first(self, *, stale: bool = False) -> bool:
        """Whether the pass of the old policy leaves out what the first update reads.

        That update's own forward pass is the old policy's. Later epochs would need its log-probs
        again, and replayed experts their ids before it.
        """
        objective, model = self.rule.objective, self.rule.logprobs.how.model
        early = objective.ranks_tokens or objective.kl_in_reward or model.num_experts > 0
        return self.minibatches > 1 and self.epochs == 1 and not (early or stale)

    @property
    def keeps_entropy(self) -> bool:
        """Whether the objective ranks the old policy's entropies, and later stages read them."""
        return self.rule.objective.ranks_entropy

    def update(
        self, state: TrainState, batch: TrainBatch, rate: float, alpha_shift: float = 0.0
    ) -> tuple[TrainState, dict[str, tuple[jax.Array, jax.Array]]]:
        """Takes one optimizer step on a batch on the devices; see `step.update_step`."""
        scalars = np.float32(rate), np.float32(alpha_shift)
        return update_step(state, batch, *scalars, rule=self.rule)

    def lower_update(self, state: TrainState, batch: TrainBatch, number: Any) -> Any:
        """Returns the lowered update; all may be shapes, `number` that of a float32 scalar."""
        return update_step.lower(state, batch, number, number, rule=self.rule)

    def abstract_batch(
        self, planner: Planner, plan: Plan, images: Images | None, *, stale: bool = False
    ) -> TrainBatch:
        """Returns the shapes of an update's batch.

        Args:
          planner: of the run.
          plan: of the batch.
          images: shapes of the images in the rows.
          stale: whether another policy sampled some tokens of the step.
        """
        passes = self.passes(stale=stale)
        recorded = ("sampler", "old") if "old" in passes else ("sampler",)
        B, T = plan.num_responses, plan.width
        numbers_BT = jax.ShapeDtypeStruct((B, T), np.float32)
        known = {f"{name}_logprobs_BT": numbers_BT for name in passes}
        objective = self.rule.objective
        if self.spares_first(stale=stale):
            known["starts_step_B"] = jax.ShapeDtypeStruct((B,), bool)
        if self.keeps_entropy:
            known["old_entropy_BT"] = numbers_BT
        if objective.token_advantages:
            known["token_advantages_BT"] = numbers_BT
        if objective.ratio == "segment":
            known["segment_starts_BT"] = jax.ShapeDtypeStruct((B, T), bool)
        if stale:
            known["ages_BT"] = jax.ShapeDtypeStruct((B, T), np.int32)
        ints = jax.ShapeDtypeStruct((B,), np.int32)
        return TrainBatch(
            rows=abstract_token_rows(planner, plan, recorded, images),
            responses=ResponseRows(
                starts_B=ints,
                response_mask_BT=jax.ShapeDtypeStruct((B, T), bool),
                advantages_B=jax.ShapeDtypeStruct((B,), np.float32),
                group_ids_B=ints,
                sampler_logprobs_BT=numbers_BT,
                **known,
            ),
        )
