"""Several sources as one, and how a stream deals them out."""

import collections

import pytest

from luspo_jax.datasets import DataError, Example, Mixture
from luspo_jax.prompts import PromptStream, Renderer


def _source(name, size):
    return [Example(k, f"{name}{k}", str(k), {"level": 1}) for k in range(size)]


def _mixture():
    return Mixture({"a": _source("a", 5), "b": _source("b", 20)}, {"a": 3, "b": 1})


def test_places_ids_and_sources():
    mixture = _mixture()
    assert (len(mixture), mixture.sizes, mixture.weights) == (25, (5, 20), (0.75, 0.25))
    assert [mixture[i].id for i in range(25)] == list(range(25))
    assert (mixture[4].problem, mixture[5].problem, mixture[-1].problem) == ("a4", "b0", "b19")
    assert mixture[7].meta == {"level": 1, "source": "b"}
    with pytest.raises(IndexError):
        mixture[25]


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), "x"])
def test_weights_must_be_positive(weight):
    with pytest.raises(DataError, match=r"data\.mixture\.b: weight"):
        Mixture({"a": _source("a", 1), "b": _source("b", 1)}, {"a": 1, "b": weight})


def test_an_empty_source_is_named():
    with pytest.raises(DataError, match=r"data\.mixture\.b: the source is empty"):
        Mixture({"a": _source("a", 1), "b": []}, {"a": 1, "b": 1})


class _Letters:
    """A tokenizer of one token a character."""

    chat_template = None

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def _stream(**changes):
    settings = {"max_length": 10, "seed": 3} | changes
    return PromptStream(_mixture(), Renderer(_Letters()), **settings)


def test_weights_hold_and_every_source_has_whole_epochs():
    """In 80 prompts: 60 of the 5 of a, each 12 times, and 20 of the 20 of b, each once."""
    seen = collections.Counter(prompt.text for prompt in _stream().next_prompts(80))
    assert {seen[f"a{k}"] for k in range(5)} == {12}
    assert {seen[f"b{k}"] for k in range(20)} == {1}


def test_a_restored_stream_goes_on_where_it_was():
    whole = [p.text for p in _stream().next_prompts(30)]
    first = _stream()
    start = [p.text for p in first.next_prompts(11)]
    second = _stream()
    second.set_state(first.get_state())
    assert start + [p.text for p in second.next_prompts(19)] == whole


def test_another_mixture_is_another_stream():
    other = Mixture({"a": _source("a", 5), "b": _source("b", 20)}, {"a": 1, "b": 1})
    stream = PromptStream(other, Renderer(_Letters()), max_length=10, seed=3)
    with pytest.raises(ValueError, match="mixture was"):
        stream.set_state(_stream().get_state())
