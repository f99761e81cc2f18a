"""Shares, what is gathered, and what processes must agree on; with one process, nothing changes."""

import contextlib
import pickle

import numpy as np
import pytest
from absl import flags

from experiments import cluster, command
from luspo_jax.experience import held_out
from luspo_jax.hosts import processes
from luspo_jax.hosts.roles import Roles
from luspo_jax.rewards import Reward
from luspo_jax.rollout import Response
from luspo_jax.run import workdir as workdirs


@pytest.mark.parametrize("num", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("count", [0, 1, 5, 16, 100])
def test_shares_are_dealt_in_turn_complete_and_even(count, num):
    things = list(range(count))
    parts = [things[processes.share(count, index, num)] for index in range(num)]
    assert processes.merged(parts) == things
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:  # each has its part of every stretch
        assert abs(sum(thing < count / 2 for thing in part) - len(part) / 2) <= 1


def test_parts_that_no_deal_gives_are_not_merged():
    with pytest.raises(ValueError, match="slice"):
        processes.merged([[1], [2, 3, 4]])


def test_one_process_has_everything_and_gathers_nothing():
    assert processes.is_writer()
    value = object()
    assert processes.gather(value)[0] is value
    assert list(range(5))[processes.share(5)] == list(range(5))
    processes.barrier("nobody to wait for")


def test_gather_puts_pieces_of_unequal_values_together(monkeypatch):
    """Every process in turn, the others' rows made here: parts of 2 KiB, cut out anew."""
    rng = np.random.default_rng(0)
    values = [
        {"tokens": rng.integers(0, 99, 5000), "logprobs": rng.normal(size=3000).astype(np.float32)},
        [],
        "text" * 3000,
    ]
    data = [np.frombuffer(pickle.dumps(v, protocol=5), np.uint8) for v in values]
    lengths = np.array([[len(d)] for d in data], np.uint64).view(np.uint8)
    num_parts = -(-max(map(len, data)) // 2048)
    rows = np.stack([np.pad(d, (0, num_parts * 2048 - len(d))) for d in data])
    parts = list(rows.reshape(3, num_parts, 2048).transpose(1, 0, 2))
    monkeypatch.setattr(processes.jax, "process_count", lambda: 3)
    monkeypatch.setattr(processes, "_GATHERED_BYTES", 3 * 2048)
    for index, value in enumerate(values):
        answers, sent = iter([lengths, *parts]), []

        def collective(row, answers=answers, sent=sent):
            sent.append(row)
            return next(answers)

        monkeypatch.setattr(processes, "_all_rows", collective)
        got = processes.gather(value)
        np.testing.assert_array_equal(got[0]["tokens"], values[0]["tokens"])
        np.testing.assert_array_equal(got[0]["logprobs"], values[0]["logprobs"])
        assert got[0]["logprobs"].dtype == np.float32
        assert got[1:] == values[1:]
        np.testing.assert_array_equal(sent[0], lengths[index])
        np.testing.assert_array_equal(np.concatenate(sent[1:]), rows[index])
        assert len(sent) == 1 + num_parts > 10


def test_members_share_and_gather_among_themselves(monkeypatch):
    monkeypatch.setattr(processes.jax, "process_count", lambda: 5)
    monkeypatch.setattr(processes.jax, "process_index", lambda: 3)
    assert processes.members() == (0, 1, 2, 3, 4)
    with processes.among((1, 3)):
        assert processes.members() == (1, 3)
        assert processes.share(7) == slice(1, 7, 2)
        with processes.among((3,)):
            assert processes.gather("alone") == ["alone"]
            processes.barrier("nobody to wait for")
        assert processes.members() == (1, 3)
    with contextlib.suppress(KeyError), processes.among((1, 3)):
        raise KeyError
    assert processes.members() == processes.everyone()


def test_rows_are_stacked_over_processes_and_come_back_whole():
    """One process: its row, through the same program."""
    row = np.arange(7, dtype=np.uint8)
    np.testing.assert_array_equal(processes._all_rows(row), row[None])


def test_processes_at_different_places_are_told(monkeypatch):
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_gather", lambda value, num: [value, "there"])
    processes.barrier("there")
    with pytest.raises(processes.AgreementError, match=r"different places: \['here', 'there'\]"):
        processes.barrier("here")


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 10**6, 3 * 2**30])
@pytest.mark.parametrize("num", [2, 64, 2048])
def test_pieces_cover_and_are_bounded(size, num):
    pieces = processes._pieces(size, num)
    starts, widths = zip(*pieces, strict=True)
    assert len(set(widths)) == 1
    assert widths[0] * num <= max(2**27, 1024 * num)
    assert starts == tuple(range(0, size, widths[0]))
    assert widths[0].bit_count() == 1


def test_differences_name_process_field_and_both_values():
    same = {"python": "3.12.1", "--config.seed": 0}
    assert processes.differences([same, dict(same), dict(same)]) == []
    other = same | {"--config.seed": 1, "source a.py": "12ab"}
    lines = processes.differences([same, same, other])
    assert lines == [
        "  - process 2: --config.seed is 1, and 0 on process 0",
        "  - process 2: source a.py is '12ab', and 'absent' on process 0",
    ]
    many = {f"f{i:02}": i for i in range(30)}
    assert processes.differences([{}, many])[-1] == "  - and 20 more"


def test_agree_raises_what_differs(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda facts: [facts, {"jax": "0.9"}])
    with pytest.raises(processes.AgreementError, match=r"process 1: jax is '0\.9', and '1\.0'"):
        processes.agree({"jax": "1.0"})


class _Started:
    """`processes.start` on process 1 of 2 without jax: what it checks, and whom it joins."""

    def __init__(self, monkeypatch):
        self.checked, self.joined = [], []
        monkeypatch.setattr(processes, "initialize", lambda arguments, dead_after_s: None)
        monkeypatch.setattr(processes.jax, "process_index", lambda: 1)
        monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
        monkeypatch.setattr(processes, "gather", lambda value: [("attempt 0", "secret 0"), value])
        monkeypatch.setattr(processes, "check_shared", lambda *place: self.checked.append(place))
        monkeypatch.setattr(processes.store, "coordinator", lambda: "127.0.0.1:1234")
        monkeypatch.setattr(processes.store, "Store", lambda folder: folder)
        monkeypatch.setattr(processes.guard, "join", lambda *known: self.joined.append(known))

    def __call__(self, workdir, **changes):
        processes.start({}, workdir, dead_after_s=9.0, phase_timeout_s=7.0, **changes)
        return self.joined.pop() if self.joined else None


def test_start_joins_the_watch_of_this_start_of_the_run(monkeypatch, tmp_path):
    start = _Started(monkeypatch)
    membership, store = start(tmp_path)
    assert store == "luspo_jax/attempt 0"
    assert start.checked == [(tmp_path, "attempt 0")]
    assert (membership.attempt, membership.secret) == ("attempt 0", "secret 0")
    assert (membership.index, membership.count, membership.host) == (1, 2, "127.0.0.1")
    assert (membership.dead_after_s, membership.phase_timeout_s) == (9.0, 7.0)
    assert membership.folder == str(tmp_path / "processes")
    assert membership.checkpoints == str(tmp_path / "checkpoints")


def test_start_without_a_common_folder_checks_none(monkeypatch, tmp_path):
    start = _Started(monkeypatch)
    membership, _ = start(tmp_path, shared=False, checkpoints="gs://bucket/run/checkpoints")
    assert start.checked == []
    assert membership.folder == str(tmp_path / "processes")
    assert membership.checkpoints == "gs://bucket/run/checkpoints"
    assert start(None) is None


def test_unequal_numbers_of_devices_are_refused():
    processes.check_devices({0: 4, 1: 4})
    with pytest.raises(processes.AgreementError, match="process 0 has 4, process 1 has 2"):
        processes.check_devices({0: 4, 1: 2})


def test_source_hashes_see_every_byte(tmp_path):
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "a.py").write_text("x = 1\n")
    (package / "inner" / "b.py").write_text("y = 1\n")
    (package / "notes.txt").write_text("not code")
    before = processes.source_hashes(package)
    assert set(before) == {"source package/a.py", "source package/inner/b.py"}
    (package / "inner" / "b.py").write_text("y = 2\n")
    after = processes.source_hashes(package)
    assert [name for name in before if before[name] != after[name]] == ["source package/inner/b.py"]


def test_shared_folder_is_seen_or_refused(monkeypatch, tmp_path):
    """Process 1 looks into a folder of its own, where process 0's mark does not appear."""
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "barrier", lambda label: None)
    monkeypatch.setattr(processes, "_VISIBLE_AFTER_S", 0.1)
    monkeypatch.setattr(processes, "gather", lambda value: [value, value])
    processes.check_shared(tmp_path / "run", "token")
    assert not list((tmp_path / "run").iterdir())  # the mark is taken away
    monkeypatch.setattr(
        processes, "gather", lambda value: [value, False if value is True else value]
    )
    with pytest.raises(processes.AgreementError, match=r"is not seen by process 1$"):
        processes.check_shared(tmp_path / "run", "token")


FLAGS = ("coordinator", "num_processes", "process_id", "distributed")


def _arguments(*given):
    for name in FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS(["train", *given])
    try:
        return cluster.arguments()
    finally:
        for name in FLAGS:
            flags.FLAGS[name].unparse()


def test_flags_of_a_cluster():
    assert _arguments() is None
    assert _arguments("--distributed=auto") == {}
    assert _arguments("--coordinator=a:1", "--num_processes=2", "--process_id=0") == {
        "coordinator_address": "a:1",
        "num_processes": 2,
        "process_id": 0,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--process_id=0",), "--coordinator and --num_processes missing"),
        (("--coordinator=a:1", "--num_processes=2"), "--process_id missing"),
        (("--distributed=auto", "--num_processes=2"), "leave out --num_processes"),
        (("--coordinator=a", "--num_processes=2", "--process_id=0"), "must be HOST:PORT"),
        (("--coordinator=a:1", "--num_processes=2", "--process_id=2"), "less than --num_proc"),
        (("--coordinator=a:1", "--num_processes=0", "--process_id=0"), "must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(command.UsageError, match=message):
        _arguments(*given)


def test_cluster_that_is_not_there_is_named(monkeypatch):
    def refuse(**arguments):
        raise ValueError("coordinator_address should be defined.\nmore")

    monkeypatch.setattr(processes.jax.distributed, "initialize", refuse)
    with pytest.raises(processes.ClusterError, match="--distributed=auto could not start"):
        processes.initialize({}, dead_after_s=30)
    named = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}
    with pytest.raises(processes.ClusterError, match=r"process 1 of 2 could not meet .* a:1"):
        processes.initialize(named, dead_after_s=30)


def test_jax_is_slower_than_the_watchdog(monkeypatch):
    seen = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **a: seen.append(a))
    for dead_after_s in (6, 30, 600):
        processes.initialize({}, dead_after_s=dead_after_s)
        assert seen[-1]["heartbeat_timeout_seconds"] >= max(100, 2 * dead_after_s)


def test_workdir_of_another_process_is_read_only_and_must_be_the_same(monkeypatch, tmp_path):
    from luspo_jax.run import fields

    config = fields.default_config()
    (tmp_path / "run" / "processes").mkdir(parents=True)  # heartbeats come before the run
    workdirs.Workdir(tmp_path / "run", config, {}).close()
    monkeypatch.setattr(processes.jax, "process_index", lambda: 1)
    seen = workdirs.Workdir(tmp_path / "run", config, {})
    seen.close()
    with pytest.raises(workdirs.WorkdirError, match=r"does not see there the run\.json"):
        workdirs.Workdir(tmp_path / "elsewhere", config, {})
    assert not (tmp_path / "elsewhere").exists()
    config.seed = 5
    with pytest.raises(workdirs.WorkdirError, match="on storage that all processes share"):
        workdirs.Workdir(tmp_path / "run", config, {})


def test_more_processes_than_prompts_are_refused():
    from luspo_jax.hosts.values import ConfigError
    from luspo_jax.run import fields

    config = fields.default_config()
    workdirs.check_processes(config, Roles())
    workdirs.check_processes(config, Roles(tuple(range(17)), (17,)))
    with pytest.raises(ConfigError, match=r"prompts_per_step=16 .* processes, 17"):
        workdirs.check_processes(config, Roles((0,), tuple(range(17))))


def test_evaluation_of_shares_is_the_evaluation(monkeypatch):
    """Two processes ask their shares; put together they are what one process asks."""

    class Engine:
        class sampling:
            max_response_length = 9

        def generate(self, params, requests, *, group_size, **noise):
            ids = [(r.prompt_id, i) for r in requests for i in range(group_size)]
            return [_response(*pair) for pair in ids], None

    class Scorer:
        def score_batch(self, samples):
            return [Reward(1.0, "ok", {}, detail=f"{s.answer}: {s.response}") for s in samples]

    prompts = [_Prompt(i) for i in range(5)]

    def ask():
        return held_out.ask(Engine(), None, prompts, Scorer(), decode=str, num_samples=2, seed=0)

    def told(name, groups):
        return [value for group in groups for value in group.column(name)]

    whole = ask()
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    parts = []
    monkeypatch.setattr(processes, "gather", lambda value: parts.append(value) or [value])
    for index in range(2):
        monkeypatch.setattr(processes.jax, "process_index", lambda index=index: index)
        with pytest.raises(ValueError, match="zip"):  # one share is no answer to all prompts
            ask()
    assert [sum(map(len, part)) for part in parts] == [6, 4]
    monkeypatch.setattr(processes, "gather", lambda value: parts)
    together = ask()
    assert [group.prompt for group in together] == prompts
    for name in ("prompt_id", "sample_id", "text", "reward"):
        assert told(name, together) == told(name, whole)


def _response(prompt_id, sample_id):
    return Response(
        prompt_id, sample_id, np.array([prompt_id], np.int32), np.zeros(1, np.float32), True
    )


class _Prompt:
    def __init__(self, prompt_id):
        self.prompt_id, self.tokens, self.images, self.text = prompt_id, np.array([1]), (), ""
        self.example = type("Example", (), {"problem": "", "answer": str(prompt_id), "meta": {}})
