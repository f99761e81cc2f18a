"""Host memory of recorded expert ids: `python -m experiments.bench.expert_memory`.

Computed for a step of a configuration, and measured on a step of fewer responses: the bytes of the
ragged records of responses, those of rows padded to the longest, and those that the largest update
lays out on the host besides the records.
"""

import importlib.util
import sys
import tracemalloc

import numpy as np
from absl import flags

from experiments import command

_CONFIG = flags.DEFINE_string("config", "configs/qwen3_30b_a3b_dapo17k.py", "File of the run.")
_MEAN = flags.DEFINE_float("mean_length", 4000.0, "Mean length of a response.", 1.0)
_PROMPT = flags.DEFINE_integer("prompt_length", 256, "Length of every prompt.", 1)
_SCALE = flags.DEFINE_integer("scale", 16, "How many times fewer prompts are measured.", 1)


def main() -> None:
    """Computes and measures the memory."""
    from experiments.rehearsal import case as cases
    from luspo_jax.run.arithmetic import batch_arithmetic
    from luspo_jax.run.settings import section

    spec = importlib.util.spec_from_file_location("config", _CONFIG.value)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    model, sizes = cases.architecture(config), batch_arithmetic(config)
    minibatches = section(config, "train").num_minibatches
    whole = counted(model, sizes, minibatches, sizes.prompts_per_step)
    some = counted(model, sizes, minibatches, sizes.prompts_per_step // _SCALE.value)
    found = measured(model, sizes, minibatches, sizes.prompts_per_step // _SCALE.value)
    print(f"{'GB':44} {'whole step':>12} {'1/' + str(_SCALE.value):>12} {'measured':>12}")
    for name in whole:
        print(f"{name:44} {whole[name]:12.3f} {some[name]:12.3f} {found[name]:12.3f}")


def lengths(sizes, prompts: int) -> np.ndarray:
    """Returns response lengths for `prompts` prompts, as the rehearsal assumes them."""
    from experiments.rehearsal import costs

    longest = sizes.tokens_per_row - _PROMPT.value
    found = costs.power_lengths(_MEAN.value, longest, prompts * sizes.group_size)
    return np.random.default_rng(0).permutation(found)


def counted(model, sizes, minibatches: int, prompts: int) -> dict[str, float]:
    """Computes gigabytes at L · K bytes per token."""
    own = lengths(sizes, prompts)
    a_token = model.num_expert_layers * model.experts_per_token / 1e9
    sequences = own.sum() + len(own) * _PROMPT.value
    return {
        "ragged: the sampler's": (own.sum() + prompts * _PROMPT.value) * a_token,
        "ragged: the old policy's": sequences * a_token,
        "padded to the longest row, each": len(own) * sizes.tokens_per_row * a_token,
        "laid for an update, both": 2 * _rows(model, sizes, own, minibatches) * a_token,
    }


def _planner(model, sizes):
    from luspo_jax.learner.rows import Planner

    return Planner(model, sizes.tokens_per_row, 1, sizes.rows_per_microbatch, sizes.pack_length)


def _rows(model, sizes, own, minibatches):
    """Returns the tokens of the rows of the first update, padding included."""
    part = own[: len(own) // minibatches] + _PROMPT.value
    plan = _planner(model, sizes).plan(part, sizes.tokens_per_row)
    return plan.num_rows * plan.row_length


def measured(model, sizes, minibatches: int, prompts: int) -> dict[str, float]:
    """Measures the same on real arrays, by Python's allocator."""
    from luspo_jax.learner import policies
    from luspo_jax.rollout import Response

    kind, shape = np.uint8, (model.num_expert_layers, model.experts_per_token)
    own, found = lengths(sizes, prompts), {}
    tracemalloc.start()

    def held(make):
        before = tracemalloc.get_traced_memory()[0]
        made = make()
        return made, (tracemalloc.get_traced_memory()[0] - before) / 1e9

    of_prompts, at_prompts = held(
        lambda: [np.ones((_PROMPT.value, *shape), kind) for _ in range(prompts)]
    )
    sampled, at_tokens = held(lambda: [np.ones((n, *shape), kind) for n in own])
    found["ragged: the sampler's"] = at_prompts + at_tokens
    old, found["ragged: the old policy's"] = held(
        lambda: [np.ones((_PROMPT.value + n, *shape), kind) for n in own]
    )
    padded, found["padded to the longest row, each"] = held(
        lambda: np.ones((len(own), sizes.tokens_per_row, *shape), kind)
    )
    del padded
    responses = [
        Response(
            0, i, np.ones(n, np.int32), np.zeros(n, np.float32), True,
            expert_ids=ids, prompt_expert_ids=of_prompts[i // sizes.group_size],
            trained=np.ones(n, bool), old_expert_ids=chosen,
        )
        for i, (n, ids, chosen) in enumerate(zip(own, sampled, old, strict=True))
    ]  # fmt: skip
    prompt = _Prompt(np.ones(_PROMPT.value, np.int32))
    part = responses[: len(responses) // minibatches]
    planner = _planner(model, sizes)
    (laid,) = policies.laid(planner, [prompt] * len(part), part)
    rows, _ = held(lambda: policies.laid_rows(planner, laid, old_ids=True))
    found["laid for an update, both"] = (
        sum(ids.nbytes for ids in (rows.expert_ids.sampler, rows.expert_ids.old)) / 1e9
    )
    tracemalloc.stop()
    return found


class _Prompt:
    """The fields of a prompt that rows read."""

    images = ()

    def __init__(self, tokens):
        self.tokens = tokens


if __name__ == "__main__":
    sys.exit(command.call(main))
