"""The engine's loop over devices that only count: no schedule hangs, leaks or shares a new page."""

import numpy as np

from luspo_jax.models.forward import Forward
from luspo_jax.rollout import Cache, Engine, Request, Sampling, programs
from luspo_jax.rollout.loop import Loop
from tests.rollout import rollout_cases as cases

SIZE = 4  # tokens of a page


class _Counting:
    """The functions of `programs`; responses end at random."""

    def __init__(self, rng):
        self.rng = rng

    def empty_pages(self, **sizes):
        return None

    def copy_pages(self, pages, sources, targets, layout=None):
        return None

    def prefill(self, params, pages, runs, tokens, images, how, record):
        return None, None

    def decode_chunk(self, params, pages, rows, *, chunk_length, **settings):
        live, at = np.array(rows.places.real_B), np.array(rows.places.positions_B)
        counts, tokens = np.zeros(len(live), np.int32), np.zeros((chunk_length, len(live)), int)
        written, steps = {}, 0
        while steps < rows.max_steps and (~live).sum() < rows.leave_at:
            for b in np.flatnonzero(live):
                position = at[b] + counts[b]
                page = rows.places.tables_BM[b, position // SIZE]
                assert page > 0
                assert written.setdefault(page, b) == b  # nobody else's
                tokens[steps, b] = 1 if self.rng.random() < 0.05 else 2
                counts[b] += 1
                live[b] = tokens[steps, b] != 1 and position + 2 < rows.limits_B[b]
            steps += 1
        zeros = np.zeros(tokens.shape, np.float32)
        return None, programs.Chunk(tokens, zeros, counts, counts, live, np.int32(steps))


def test_every_response_ends_and_every_page_comes_back():
    rng, preemptions = np.random.default_rng(0), 0
    how = Forward(cases.config(), paged_attention="reference")
    for _ in range(500):
        common = (3,) * rng.integers(0, 12)
        requests = [
            Request(
                i, (*common, *rng.integers(2, 90, rng.integers(1, 12))), limit=rng.integers(1, 30)
            )
            for i in range(rng.integers(1, 9))
        ]
        sizes = [int(rng.integers(1, most)) for most in (20, 40, 60)]
        names = ("num_slots", "chunk_length", "max_prefill_tokens")
        engine = Engine(
            how, Sampling(29, (1,)), max_prompt_length=24, cache=Cache(None, SIZE),
            **dict(zip(names, sizes, strict=True)),
        )  # fmt: skip
        engine.take_room(engine.least_bytes + rng.integers(0, 12) * engine.page_bytes)
        loop = Loop(engine, None, requests, int(rng.integers(1, 6)), (0, 0), _Counting(rng))
        loop.run(None)
        assert all(response is not None for response in loop.responses)
        (shard,) = loop.shards
        assert shard.pool.in_use == (len(shard.root.table) if shard.root else 0)
        preemptions += shard.preemptions
    assert preemptions > 1000
