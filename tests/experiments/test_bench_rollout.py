"""The sampler's bench: what is sampled, who samples it, what the cache holds; drafts by lookup."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from experiments.bench import cache_traffic, ngram, sampling_peer, sampling_report, sampling_work
from experiments.bench.sampling_sides import Engine, Peer, Sampled, check_lengths
from experiments.bench.workload import Workload
from luspo_jax.hosts.values import ConfigError

TINY = Workload(
    prompts=3, group=2, prompt_length=5, response_length=6, embed_dim=16, layers=2, heads=2,
    kv_heads=1, head_dim=8, mlp_dim=24, vocab=32,
)  # fmt: skip


@pytest.fixture
def work(tmp_path):
    return sampling_work.shaped(TINY, tmp_path, limits=[6, 6, 6], name="tiny", seed=0)


def test_ours_samples_every_forced_length(work):
    side = Engine(work)
    sampled = side.sample(0)
    check_lengths(work, sampled, "luspo_jax")
    assert sampled.tokens == 3 * 2 * 6
    assert sampled.rate == sampled.tokens / sampled.seconds > 0
    lines, record = sampling_report.cache(work, side, sampled)
    assert "decode steps" in lines
    json.dumps(record, allow_nan=False)


def test_ours_samples_lengths_by_prompt(work):
    work = dataclasses.replace(work, limits=(1, 6, 3))
    check_lengths(work, Engine(work).sample(0), "luspo_jax")


def test_a_side_that_does_other_work_is_refused(work):
    check_lengths(work, Sampled(1.0, 1.0, [6] * 6), "x")
    with pytest.raises(RuntimeError, match="x made 5 of 6"):
        check_lengths(work, Sampled(1.0, 1.0, [6] * 5), "x")
    with pytest.raises(RuntimeError, match="other lengths"):
        check_lengths(work, Sampled(1.0, 1.0, [6] * 5 + [5]), "x")
    stopping = dataclasses.replace(work, stops=(2,))
    check_lengths(stopping, Sampled(1.0, 1.0, [6] * 5 + [5]), "x")
    with pytest.raises(RuntimeError, match="a response of 7 tokens"):
        check_lengths(stopping, Sampled(1.0, 1.0, [6] * 5 + [7]), "x")


def test_a_peer_that_fails_says_why(work, tmp_path):
    with pytest.raises(RuntimeError, match=r"nobody ended: (?s:.*)KeyError: 'nobody'"):
        Peer("nobody", sys.executable, work.spec(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_peers_sample_the_same_work(work, tmp_path, kind):
    pytest.importorskip("torch")
    pytest.importorskip(kind)
    limits = (1, 6, 3) if kind == "transformers" else work.limits
    work = dataclasses.replace(work, limits=limits)
    peer = Peer(kind, sys.executable, work.spec() | {"dtype": "float32"}, tmp_path)
    try:
        for seed in range(2):
            check_lengths(work, peer.sample(seed), kind)
        assert set(peer.versions) >= {"torch", kind}
    finally:
        peer.close()


def test_a_peers_response_ends_with_its_first_stop_token():
    assert sampling_peer.ended([4, 2, 7, 2, 0], [2, 9]) == 2
    assert sampling_peer.ended([4, 2, 7], []) == 3


def test_drawn_lengths():
    lengths = sampling_work.lognormal(2000, 512, sigma=0.8, seed=0)
    assert min(lengths) >= 1
    assert max(lengths) == 512  # cut
    assert np.median(lengths) == pytest.approx(128, rel=0.1)
    assert np.std(np.log(lengths)) == pytest.approx(0.8, rel=0.1)
    skewed = sampling_work.skewed(64, 4096, low=128, high=512, seed=0)
    assert sorted(skewed)[-1] == 4096
    assert all(128 <= n <= 512 for n in sorted(skewed)[:-1])
    level = sampling_work.levelled(skewed)
    assert (len(level), sum(level)) == (64, sum(skewed))
    assert max(level) - min(level) <= 1


def test_problems_that_are_too_few_are_named(tmp_path):
    path = tmp_path / sampling_work.GSM8K
    path.parent.mkdir(parents=True)
    path.write_text('{"question": "1 + 1?"}\n')
    assert sampling_work.real_problems(tmp_path, 1) == (["1 + 1?"], "GSM8K")
    with pytest.raises(ConfigError, match="has 1 problems"):
        sampling_work.real_problems(tmp_path, 2)


def test_bytes_read_are_counted_token_by_token():
    prompts, lengths, page, entry = [5, 9], [3, 1, 4, 6], 4, 10
    live = once = paged = paged_once = 0
    for p, prompt in enumerate(prompts):
        own = lengths[2 * p : 2 * p + 2]
        for step in range(1, max(own) + 1):
            alive = [n for n in own if n >= step]
            sizes = [prompt + step for _ in alive]
            pages = [page * len(range(0, size, page)) for size in sizes]
            full = page * (prompt // page)
            live += sum(sizes)
            paged += sum(pages)
            once += sum(size - prompt for size in sizes) + prompt
            paged_once += sum(size - full for size in pages) + full
    found = cache_traffic.traffic(prompts, lengths, page=page, steps=6, entry=entry)
    expected = [n * entry / 6 for n in (live, once, paged, paged_once)]
    assert dataclasses.astuple(found) == pytest.approx(expected)
    at_once = [
        sum(
            (prompt + step * len(alive)) if alive else 0
            for p, prompt in enumerate(prompts)
            for alive in [[n for n in lengths[2 * p : 2 * p + 2] if n >= step]]
        )
        for step in range(1, 7)
    ]
    assert cache_traffic.live_peak(prompts, lengths) == max(at_once)
    pages_at_once = [
        len(
            {
                (p, None if entry < prompt // page * page else sample, entry // page)
                for p, prompt in enumerate(prompts)
                for sample, n in enumerate(lengths[2 * p : 2 * p + 2])
                if n >= step
                for entry in range(prompt + step)
            }
        )
        for step in range(1, 7)
    ]
    assert cache_traffic.live_pages_peak(prompts, lengths, page) == max(pages_at_once)


def test_entries_of_the_cache_have_the_size_of_keys_and_values():
    assert cache_traffic.entry_bytes(TINY.model, 4) == 2 * 2 * 1 * 8 * 4


def test_a_timeline_begins_and_ends_with_the_ends():
    assert cache_traffic.timeline([3, 1, 2]) == "3 1 2"
    shown = cache_traffic.timeline(range(100), 4).split()
    assert (len(shown), shown[0], shown[-1]) == (4, "0", "99")


def test_a_draft_is_what_followed_before():
    assert ngram.drafted([1, 2, 3, 9, 1, 2, 3], 3, 2) == [9, 1]
    assert ngram.drafted([7, 2, 3, 8, 2, 3, 9, 2, 3], 2, 1) == [9]  # the last place
    assert ngram.drafted([2, 3, 8, 5, 2, 3, 2, 3], 2, 3) == [8, 5, 2]  # one that enough follow
    assert ngram.drafted([5, 5, 5], 2, 4) == [5]
    assert ngram.drafted([5, 6], 3, 2) == ngram.drafted([1, 2, 3], 2, 2) == []


def test_replayed_responses_gain_what_is_accepted():
    # After 9: no draft for 1, 2; then 3, 4 are right and 9 is not.
    gains = ngram.simulated([1, 2, 3, 4, 9], [1, 2, 3, 4, 8], ngram=2, width=4)
    assert gains == ngram.Gains(tokens=5, verifications=3, drafts=1, positions=6)
    plain = ngram.simulated([1, 2, 3, 4, 9], [1, 2, 3, 4, 8], ngram=2, width=1)
    assert (plain.gain, plain.width) == (1, 1)
    # A response that repeats one token gains the whole width, but for the last step.
    loop = ngram.simulated([7] * 6, [7] * 12, ngram=2, width=4)
    assert (loop.tokens, loop.verifications) == (12, 3)


def test_speed_ups_are_gains_over_costs():
    gains = ngram.Gains(tokens=30, verifications=20, drafts=10, positions=40)
    cost = {1: 1.0, 2: 1.5, 4: 2.5}
    ups = ngram.speed_ups(gains, 1, 4, cost)
    assert ups["packed"] == pytest.approx(1.5 / 1.5)
    assert ups["padded"] == pytest.approx(1.5 / (0.5 * 1.0 + 0.5 * 2.5))
