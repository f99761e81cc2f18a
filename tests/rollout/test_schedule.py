"""What the host decides: who has pages, who waits, what all share."""

import numpy as np
import pytest

from luspo_jax.rollout import Request, Response
from luspo_jax.rollout import schedule as s
from luspo_jax.rollout.pool import PagePool
from luspo_jax.rollout.sampling import Sampling


def test_a_page_is_free_when_its_last_user_gives_it_back():
    pool = PagePool(5)
    mine = pool.take(3)
    assert len({0, *mine}) == 4
    pool.share(mine[:1])
    pool.give_back(mine)
    assert (pool.in_use, pool.free) == (1, 3)
    pool.give_back(mine[:1])
    assert (pool.in_use, pool.free) == (0, 4)
    for wrong in (lambda: pool.take(5), lambda: pool.share([1]), lambda: pool.give_back([1])):
        with pytest.raises(RuntimeError):
            wrong()


def _shard(lengths, *, pages, rows=8, group_size=2, longest=8):
    requests = [Request(i, np.arange(n)) for i, n in enumerate(lengths)]
    samples = s.samples_of(requests, group_size, Sampling(longest, ()), 0)
    root = np.zeros(0, np.int32)
    return s.Shard(samples, PagePool(pages + 1), page_tokens=4, rows=rows, root=root)


def _read_all(shard):
    for job in shard.jobs:
        job.at = len(job.tokens)
    return shard.start()


def test_responses_share_their_prompts_full_pages_and_the_last_takes_the_rest():
    shard = _shard([10], pages=20)
    shard.admit()
    first, second = shard.admitted
    assert [job.tokens.tolist() for job in shard.jobs] == [list(range(9))]
    assert not shard.decoding
    copies = _read_all(shard)
    prompt = shard.prompts[None, 0]
    assert first.table[:2] == second.table[:2] == prompt.pages
    assert copies == [(second.table[2], first.table[2])]
    assert prompt.rest is None
    assert shard.pool.in_use == 4
    shard.finish(first)
    assert shard.pool.in_use == 3
    shard.finish(second)
    assert shard.pool.in_use == 0
    assert not shard.prompts


def test_a_prompt_waits_for_rows_with_its_pages_and_its_rest():
    shard = _shard([6], pages=20, rows=2, group_size=3)
    shard.admit()
    assert len(_read_all(shard)) == 2
    assert shard.prompts[None, 0].rest is not None
    shard.finish(shard.admitted[0])
    shard.admit()
    assert _read_all(shard) == []  # the last one has the page itself
    assert shard.pool.in_use == 3


def test_the_youngest_gives_its_pages_back_and_is_read_again_with_its_tokens():
    shard = _shard([5, 5], pages=5, group_size=1)
    shard.admit()
    _read_all(shard)
    for sample in shard.decoding:
        sample.extend(np.array([7, 8, 9]), np.zeros(3))
    first, second = shard.admitted
    assert shard.pool.in_use == 2
    assert shard.most_steps(8, False) == 1  # one page more each; two would be four
    shard.grow(1, False)
    assert shard.pool.in_use == 4
    shard.make_room()
    assert shard.pool.in_use == 3  # its prompt's page is still there
    assert shard.admitted == [first]
    assert list(shard.waiting) == [second]
    assert second.table == []
    shard.admit()
    assert shard.admitted == [first]  # nobody before somebody has ended
    shard.finish(first)
    shard.admit()
    assert shard.jobs[-1].tokens.tolist() == [*range(5), 7, 8]
    assert shard.jobs[-1].at == 4
    assert shard.jobs[-1].kind == "again"
    _read_all(shard)
    assert shard.decoding == [second]
    assert (second.position, second.last_token) == (7, 9)


def test_prompts_without_responses_go_before_responses_do():
    shard = _shard([9, 9], pages=7, rows=1, group_size=2)
    shard.admit()
    _read_all(shard)
    assert shard.pool.in_use == 2  # nine tokens but the last fill two pages
    shard.finish(shard.admitted[0])
    assert shard.pool.in_use == 2  # the other response wants them
    shard.make_room()
    assert shard.pool.in_use == 0
    shard.admit()
    assert len(shard.jobs) == 1


def test_one_response_alone_is_not_preempted():
    shard = _shard([5], pages=4, group_size=1)
    shard.admit()
    with pytest.raises(RuntimeError, match="one response alone"):
        shard.make_room()


def test_groups_stay_together_and_devices_get_as_many_each():
    requests = [Request(i, (0,) * n) for i, n in enumerate([5, 100, 7, 90])]
    samples = s.samples_of(requests, 3, Sampling(8, ()), 0)
    parts = s.dealt(samples, 2)
    dealt = [[x.request.prompt_id for x in part] for part in parts]
    assert dealt == [[1, 1, 1, 2, 2, 2], [3, 3, 3, 0, 0, 0]]
    parts = s.dealt(samples[:9], 2)
    assert [len(part) for part in parts] == [5, 4]
    assert sorted(x.index for part in parts for x in part) == list(range(9))


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_what_an_earlier_step_began_is_dealt_to_all_devices(parts):
    """Whatever the number of groups: long contexts on one device would fill its pages."""
    rng, requests = np.random.default_rng(parts), []
    for number in range(13):
        old = number < 7
        begun = [
            Response(number, i, np.zeros(50 * old, int), np.zeros(50 * old), False, ended=False,
                     step=int(not old), versions=np.zeros(50 * old, int))
            for i in range(4)
        ]  # fmt: skip
        requests.append(Request(number, (0,) * 9, step=int(not old), begun=tuple(begun)))
    samples = s.samples_of(requests, 4, Sampling(99, ()), 1)
    left = [x for x in samples if x.step == 1 or rng.random() < 0.4]
    dealt = s.dealt(left, parts)
    most = -(-len(left) // parts)
    assert max(map(len, dealt)) == most
    assert sorted(x.index for part in dealt for x in part) == [x.index for x in left]
    old = [sum(x.step == 0 for x in part) for part in dealt]
    assert max(old) - min(old) <= 4
    for part in dealt:  # what began earlier is admitted first
        assert [x.step for x in part] == sorted(x.step for x in part)
    whole = sum(
        len({part for part, own in enumerate(dealt) if any(x.request is r for x in own)}) == 1
        for r in requests
    )
    assert whole >= 13 - parts


def test_what_all_prompts_begin_with():
    def of(*prompts, image=None):
        requests = [Request(i, tokens) for i, tokens in enumerate(prompts)]
        return s.common_prefix(requests, image, 2).tolist()

    assert of((1, 2, 3, 4, 5), (1, 2, 3, 4, 6)) == [1, 2, 3, 4]
    assert of((1, 2, 3, 4, 5), (1, 2, 3, 9, 5)) == [1, 2]
    assert of((1, 2, 3), (1, 2, 3)) == [1, 2]
    assert of((1, 2), (1, 2)) == []  # each response reads its prompt's last token
    assert of((1, 2, 3, 4, 5), (1, 2, 3, 4, 6), image=3) == [1, 2]
    assert of((1, 2, 3)) == []


def test_a_starving_device_takes_what_waits_elsewhere():
    busy, idle = _shard([5, 5], pages=9, rows=1), _shard([], pages=9)
    busy.admit()
    idle.steal(busy)
    assert [x.request.prompt_id for x in idle.waiting] == [1]
    idle.admit()
    assert len(idle.jobs) == 1
    assert len(busy.waiting) == 2
