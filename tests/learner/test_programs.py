"""Which passes a step makes before its updates."""

import optax
import pytest

from luspo_jax.learner.logprobs import LogprobRule
from luspo_jax.learner.programs import StepPrograms
from luspo_jax.learner.state import UpdateRule
from luspo_jax.models.forward import Forward
from luspo_jax.objectives import preset
from tests.learner.test_policies import EXPERTS
from tests.learner.test_step import MODEL


def _programs(*, minibatches=1, epochs=1, model=MODEL, **changes):
    rule = UpdateRule(LogprobRule(Forward(model)), preset("grpo", **changes), optax.sgd(1.0), 0.0)
    return StepPrograms(rule, minibatches, epochs)


def _passes(*, stale=False, check=False, **changes):
    found = _programs(**changes).passes(stale=stale, check=check)
    return {name: one.kept for name, one in found.items()}


def test_one_update_of_what_its_policy_sampled_needs_no_pass():
    assert _passes() == {}
    assert _passes(check=True) == {"old": False}


@pytest.mark.parametrize(
    "needs",
    [
        {"minibatches": 2},
        {"epochs": 2},
        {"stale": True},
        {"top_entropy_quantile": 0.5},
        {"correction": "tis+m2po"},
        {"kl_coef": 0.1, "kl_placement": "reward"},
    ],
    ids=str,
)
def test_the_old_policys_logprobs_are_kept_where_they_are_read(needs):
    assert _passes(**needs)["old"]
    assert ("ref" in _passes(**needs)) == ("kl_coef" in needs)


@pytest.mark.parametrize("changes", [{"correction": "tis+binary-kl"}, {"old_policy": "decoupled"}])
def test_what_the_update_can_compute_itself_needs_no_pass(changes):
    """With nothing stale, the old policy is the one being updated under either name."""
    assert _passes(**changes) == {}


def test_the_update_computes_the_reference_of_a_loss_that_reads_responses_once():
    assert _passes(kl_coef=0.1) == {}
    assert _passes(kl_coef=0.1, minibatches=2) == {"old": True}
    assert _passes(kl_coef=0.1, epochs=2) == {"old": True, "ref": True}


@pytest.mark.parametrize(
    "needs",
    [
        {"minibatches": 1},
        {"epochs": 2},
        {"top_entropy_quantile": 0.5},
        {"correction": "tis+m2po"},
        {"kl_coef": 0.1, "kl_placement": "reward"},
        {"model": EXPERTS},
    ],
    ids=lambda needs: str(needs)[:60],
)
def test_the_first_minibatch_is_spared_where_nothing_reads_its_old_logprobs_early(needs):
    assert _programs(minibatches=2).spares_first()
    assert not _programs(minibatches=2).spares_first(stale=True)
    assert not _programs(**{"minibatches": 2} | needs).spares_first()
