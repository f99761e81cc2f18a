"""Presets, their labels, and what they refuse."""

import dataclasses

import pytest

from luspo_jax.benchmarks import PROTOCOLS, BenchmarkError, protocol


def test_presets_are_those_of_their_papers():
    expected = {
        "dapo": (1.0, 0.7, 0, 20_480),
        "deepseek_r1": (0.6, 0.95, 0, 32_768),
        "luspo": (1.0, 0.7, 0, 32_768),
        "qwen3": (0.6, 0.95, 20, 32_768),
        "open_r1": (0.6, 0.95, 0, 32_768),
        "greedy": (0.0, 1.0, 0, 32_768),
    }
    assert {name: tuple(p.sampling.values()) for name, p in PROTOCOLS.items()} == expected


def test_label_says_everything_and_names_what_was_changed():
    assert protocol("dapo").label == "dapo: T=1 top_p=0.7 top_k=off max=20480 tokens"
    changed = protocol("qwen3", max_response_length=64, num_samples=2, top_k=None)
    assert changed.label == (
        "qwen3 with other max_response_length: T=0.6 top_p=0.95 top_k=20 max=64 tokens"
    )
    assert changed.num_samples == 2


def test_a_field_set_to_its_own_value_changes_nothing():
    assert protocol("dapo", top_p=0.7) == protocol("dapo")


def test_labels_differ_whenever_sampling_does():
    for field, value in (("temperature", 0.5), ("top_p", 0.5), ("top_k", 7)):
        other = protocol("luspo", **{field: value})
        assert other.label != protocol("luspo").label
        assert dataclasses.replace(other, changed=()).sampling != protocol("luspo").sampling


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("dappo", {}, "did you mean 'dapo'"),
        ("dapo", {"temperature": -1.0}, "temperature=-1.0 must be"),
        ("dapo", {"top_p": 0.0}, "top_p=0.0 must be"),
        ("dapo", {"top_k": -1}, "top_k=-1 must be"),
        ("dapo", {"max_response_length": 0}, "max_response_length=0 must be"),
        ("dapo", {"num_samples": 0}, "num_samples=0 must be"),
        ("greedy", {"num_samples": 2}, "greedy responses are all alike"),
    ],
)
def test_mistakes_are_named(name, fields, message):
    with pytest.raises(BenchmarkError, match=message):
        protocol(name, **fields)
