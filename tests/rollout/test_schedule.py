"""Sizes and batches that the host chooses."""

import numpy as np

from luspo_jax.rollout import Request
from luspo_jax.rollout import schedule as s


def test_prefill_batches_hold_each_prompt_once_longest_first():
    requests = [Request(i, (0,) * n) for i, n in enumerate([5, 100, 7, 90, 6])]
    batches = s.prefill_batches(requests, group_size=4, num_slots=10, max_tokens=1000)
    assert batches == [[1, 3], [2, 4], [0]]
    batches = s.prefill_batches(requests, group_size=4, num_slots=64, max_tokens=150)
    assert batches == [[1], [3], [2, 4, 0]]
    assert s.prefill_batches(requests, group_size=99, num_slots=1, max_tokens=1)[-1] == [0]


def test_padded_prompts():
    requests = [Request(0, (5, 6)), Request(1, np.array([7])), Request(2, (8, 9, 1))]
    tokens_PT, lengths_P = s.padded_prompts(requests, length=4)
    assert tokens_PT.tolist() == [[5, 6, 0, 0], [7, 0, 0, 0], [8, 9, 1, 0], [0, 0, 0, 0]]
    assert lengths_P.tolist() == [2, 1, 3, 1]


def test_batches_hold_a_prompt_a_device_where_that_costs_no_row():
    requests = [Request(i, (0,) * (9 - i)) for i in range(9)]
    sizes = {"group_size": 4, "num_slots": 24, "max_tokens": 18, "multiple": 4}
    assert s.prefill_batches(requests, **sizes) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    tokens_PT, lengths_P = s.padded_prompts(requests[8:], length=4, multiple=4)
    assert tokens_PT.shape == (4, 4)
    assert lengths_P.tolist() == [1, 1, 1, 1]
