"""Converts groups that wait for a later step to checkpoint arrays and JSON values, and back."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from luspo_jax.datasets import Example
from luspo_jax.experience.groups import Group
from luspo_jax.prompts import PromptRecord
from luspo_jax.rewards import Reward
from luspo_jax.rollout import Response

# Fields with one entry per token.
_ARRAYS = (
    *("tokens", "logprobs", "expert_ids", "versions", "trained"),
    *("old_logprobs", "old_entropy", "old_expert_ids", "ref_logprobs"),
)
_PLAIN = (*("prompt_id", "sample_id", "step", "stopped", "ended", "text", "counted", "advantage"),)
# Types of what a response without tokens has.
_EMPTY = {"tokens": np.int32, "logprobs": np.float32, "versions": np.uint32}


def to_stored(groups: Sequence[Group]) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Returns groups as named, concatenated arrays, and JSON values that assign their entries.

    Images of prompts are left out: they are read again.
    """
    columns: dict[str, list[np.ndarray]] = {}

    def kept(name, array):
        """Adds an array to its column; returns its length, None if there is none."""
        if array is None:
            return None
        if len(array):  # a response that waits for a row has no tokens, and perhaps no other has
            columns.setdefault(name, []).append(array)
        return len(array)

    described = []
    for group in groups:
        prompt = group.prompt
        # One array for all responses that one policy began.
        ids = {id(x): x for x in group.column("prompt_expert_ids") if x is not None}
        places = {name: place for place, name in enumerate(ids)}
        described.append(
            {
                "prompt": {
                    "prompt_id": prompt.prompt_id,
                    "text": prompt.text,
                    "example": dataclasses.asdict(prompt.example),
                    "tokens": kept("prompt_tokens", prompt.tokens),
                    "expert_ids": [kept("prompt_expert_ids", x) for x in ids.values()],
                },
                "responses": [
                    {
                        **{name: getattr(response, name) for name in _PLAIN},
                        "reward": response.reward and dataclasses.asdict(response.reward),
                        "prompt_ids": places.get(id(response.prompt_expert_ids)),
                        "lengths": {name: kept(name, getattr(response, name)) for name in _ARRAYS},
                    }
                    for response in group.responses
                ],
            }
        )
    return {name: np.concatenate(parts) for name, parts in columns.items()}, described


def from_stored(
    arrays: Mapping[str, np.ndarray], described: Sequence[Mapping[str, Any]]
) -> list[Group]:
    """Restores the groups that `to_stored` converted."""
    used = dict.fromkeys(arrays, 0)

    def taken(name, length):
        if length is None:
            return None
        if not length:
            alike = arrays.get(name, arrays.get(f"prompt_{name}"))  # expert_ids may lack their own
            return np.zeros(0, _EMPTY[name]) if alike is None else np.array(alike[:0])
        start = used[name]
        used[name] = start + length
        return np.array(arrays[name][start : start + length])

    return [_group(values, taken) for values in described]


def _at(arrays, place):
    return None if place is None or not arrays else arrays[place]


def _group(values: Mapping[str, Any], taken: Callable[[str, int | None], np.ndarray | None]):
    prompt = values["prompt"]
    record = PromptRecord(
        prompt["prompt_id"],
        taken("prompt_tokens", prompt["tokens"]),
        prompt["text"],
        Example(**prompt["example"]),
    )
    stored = prompt["expert_ids"]
    if not isinstance(stored, list):  # in an earlier checkpoint
        stored = [] if stored is None else [stored]
    prompt_ids = [taken("prompt_expert_ids", length) for length in stored]
    responses = [
        Response(
            # Earlier checkpoints lack some.
            **{name: response[name] for name in _PLAIN if name in response},
            **{name: taken(name, length) for name, length in response["lengths"].items()},
            reward=response["reward"] and Reward(**response["reward"]),
            prompt_expert_ids=_at(prompt_ids, response.get("prompt_ids", 0)),
        )
        for response in values["responses"]
    ]
    return Group(record, responses)
