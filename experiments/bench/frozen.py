"""A rollout that does not change, with ragged lengths, and the rule of its updates."""

import dataclasses


def rule(workload, length_scale="length", adapter=None):
    """Returns LUSPO's update, with another length scale or of an adapter."""
    from luspo_jax import objectives
    from luspo_jax.learner import optimizer
    from luspo_jax.learner.logprobs import LogprobRule
    from luspo_jax.learner.state import UpdateRule
    from luspo_jax.models.forward import Forward

    fields = {"reference_length": 64.0} if length_scale in ("power", "log") else {}
    fields |= {"length_cap": 64.0} if length_scale == "capped" else {}
    return UpdateRule(
        logprobs=LogprobRule(Forward(workload.model, adapter=adapter), head_chunk_tokens=2048),
        objective=objectives.preset("luspo", length_scale=length_scale, **fields),
        optimizer=optimizer.adamw(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0),
        max_grad_norm=1.0,
    )


def updates(rules, states, batch):
    """Compiles the update of each rule: returns what each costs, and functions that take a step.

    Args:
      rules, states: by name; the states are used up.
      batch: of `rollout`.
    """
    import jax

    from luspo_jax.learner.step import update_step

    rate = jax.numpy.float32(1e-6)
    costs, steps, held = {}, {}, dict(states)

    def stepper(name, program):
        def step():
            held[name], _ = jax.block_until_ready(program(held[name], batch, rate))

        return step

    for name, rule in rules.items():
        program = update_step.lower(held[name], batch, rate, rule=rule).compile()
        steps[name] = stepper(name, program)
        costs[name] = {
            "flops": program.cost_analysis()["flops"],
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        }
    return costs, steps


def rollout(workload, pack_length=0):
    """Returns the batch of one update, on the devices, in packed rows of a micro-batch each if they
    have a length; those hold a prompt once."""
    import jax
    import numpy as np

    from luspo_jax.learner.rows import Planner, token_rows
    from luspo_jax.types import ResponseRows, TrainBatch

    @dataclasses.dataclass
    class Prompt:
        tokens: np.ndarray
        images: tuple = ()

    rng = np.random.default_rng(0)
    rows = workload.responses
    lengths = rng.integers(workload.response_length // 8, workload.response_length + 1, rows)
    asked = rng.integers(1, workload.vocab, (workload.prompts, workload.prompt_length))
    prompts = [Prompt(x) for x in np.repeat(asked, workload.group, axis=0)]
    responses = [rng.integers(1, workload.vocab, n) for n in lengths]
    width = workload.prompt_length + workload.response_length
    at_once = 1 if pack_length else rows // workload.microbatches
    packing = {"pack_length": pack_length, "share_prompts": True, "gathers": True}
    planner = Planner(workload.model, width, 1, at_once, **packing if pack_length else {})
    plan = planner.plan(lengths + workload.prompt_length, width, prompts)
    masks = [np.ones(n, bool) for n in lengths]
    old_BT = plan.place([np.full(n, -np.log(workload.vocab), np.float32) for n in lengths])
    batch = TrainBatch(
        rows=token_rows(planner, plan, prompts, responses, masks),
        responses=ResponseRows(
            starts_B=plan.place_one(plan.firsts_B),
            response_mask_BT=plan.place(masks),
            advantages_B=plan.place_one(rng.normal(size=rows).astype(np.float32)),
            group_ids_B=plan.place_one(
                np.repeat(np.arange(workload.prompts, dtype=np.int32), workload.group)
            ),
            sampler_logprobs_BT=old_BT,
            old_logprobs_BT=old_BT,
        ),
    )
    return jax.tree.map(jax.numpy.asarray, batch)
