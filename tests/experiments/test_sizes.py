"""Sizes of micro-batches that are measured: which are tried, which is taken, what is remembered."""

import dataclasses
import functools
import json

import pytest

from configs import quickstart
from experiments.command import UsageError
from experiments.machine import sizes, training
from experiments.rehearsal import case as cases
from experiments.rehearsal import topologies

ALL = topologies.topology("local")
ONE = dataclasses.replace(ALL, devices=ALL.devices[:1])
resolved = functools.partial(sizes.resolved, topology=ONE)
OWN = {"train.packing": False, "train.pack_length": 0, "train.microbatch_tokens": 0}
NOW = {**OWN, "train.num_microbatches": 1, sizes.CHUNK: 2048}


def dense(length):
    return {
        "train.packing": True,
        "train.pack_length": length,
        "train.microbatch_tokens": length,
        "train.num_microbatches": 1,
        sizes.CHUNK: 2048,
    }


@pytest.fixture
def config():
    return quickstart.get_config()


@pytest.fixture
def made(config):
    return cases.build(config, ONE)


@pytest.fixture
def seconds(monkeypatch):
    """Seconds of an update by its rows, which a test may change; and what was timed."""
    table, timed = {}, []

    def measure(case):
        train = case.config.train
        key = train.pack_length or -train.num_microbatches
        if case.config.model.head_chunk_tokens != 2048:
            key = (key, case.config.model.head_chunk_tokens)
        timed.append(key)
        return table.get(key, 1.0), None

    monkeypatch.setattr(training, "timed", measure)
    return table, timed


def test_an_update_that_is_timed_is_the_runs_own(made):
    """Rows of one response and dense ones, really run."""
    for each in (NOW, dense(128)):
        other = sizes.changed(made, each)
        assert training.timed(other)[0] > 0
        batch = training.batch_of(other)
        lengths = made.response_lengths[: made.sizes.responses_per_minibatch]
        assert batch.responses.response_mask_BT.sum() == sum(lengths)
        assert len({len(x) for x in vars(batch.responses).values() if x is not None}) == 1


def test_the_fastest_sizes_are_taken_and_remembered(config, seconds, tmp_path):
    table, timed = seconds
    table |= {-1: 2.0, -2: 1.5, -4: 1.9, 1024: 0.4, 2048: 0.5}
    said = []
    first = resolved(config, None, say=said.append, cache=tmp_path)
    assert first.train.packing
    assert first.train.pack_length == first.train.microbatch_tokens == 1024
    assert not config.train.packing  # the caller's own is as it was
    # After a slower one no more parts are tried, and no longer rows; then chunks of the fastest.
    assert timed[:4] == [-1, -2, -4, 1024]
    assert timed[-2:] == [(1024, 4096), (1024, 1024)]
    again = resolved(config, None, say=said.append, cache=tmp_path)
    assert again.train == first.train
    assert len(timed) == len(set(timed))
    assert "measured before" in said[-1]
    config.rollout.max_response_length += 8  # other shapes
    resolved(config, None, say=said.append, cache=tmp_path)
    assert len(timed) > len(set(timed))
    assert len(json.loads((tmp_path / sizes.FILE).read_text())) == 2


def test_chunks_of_the_head_are_varied_with_the_fastest_rows(config, seconds, tmp_path):
    table, timed = seconds
    table |= {-1: 0.3, (-1, 4096): 0.5, (-1, 1024): 0.2, (-1, 512): 0.25}
    found = resolved(config, None, say=lambda _: None, cache=tmp_path)
    assert (found.train.packing, found.model.head_chunk_tokens) == (False, 1024)
    assert timed[-3:] == [(-1, 4096), (-1, 1024), (-1, 512)]


def test_a_gain_within_chance_moves_nothing(config, seconds, tmp_path):
    table, _ = seconds
    table |= {-1: 1.0, -2: 0.99, 1024: 0.98, 2048: 1.5}
    kept = resolved(config, None, say=lambda _: None, cache=tmp_path)
    assert kept.train == config.train


def test_a_run_that_continues_keeps_its_sizes(config, seconds, tmp_path):
    _, timed = seconds
    known = sizes.with_sizes(config, dense(2048))
    found = resolved(config, known, say=lambda _: None, cache=tmp_path)
    assert found.train == known.train
    assert timed == []


def test_what_does_not_fit_is_left_out(made, seconds, monkeypatch):
    table, timed = seconds
    table |= {-1: 0.1, -2: 0.2}
    room = made.topology.chip.usable
    monkeypatch.setattr(
        sizes,
        "estimated_bytes",
        lambda case: room + 1 if case.config.train.num_microbatches == 1 else room,
    )
    found = sizes.measured(made, lambda _: None)
    assert timed[0] == -2
    assert all(each["train.num_microbatches"] > 1 for each, _ in found)
    monkeypatch.setattr(sizes, "estimated_bytes", lambda case: room + 1)
    with pytest.raises(UsageError, match="no update fits"):
        sizes.measured(made, lambda _: None)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": {}}', '{"a": {"sizes": {"train.no": 1}}}'])
def test_a_damaged_memory_is_written_anew(config, seconds, tmp_path, content):
    (tmp_path / sizes.FILE).write_text(content)
    said = []
    resolved(config, None, say=said.append, cache=tmp_path)
    assert any("cannot be read" in line for line in said)
    assert len(json.loads((tmp_path / sizes.FILE).read_text())) == 1


def test_every_size_that_is_tried_is_a_valid_configuration(made):
    tried = [each for group in sizes.options(made) for each in group]
    assert len(tried) >= 4
    for each in tried:
        other = sizes.changed(made, each)
        assert other.sizes.responses_per_minibatch == made.sizes.responses_per_minibatch
