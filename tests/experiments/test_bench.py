"""The step bench: fair turns, honest counts of work, and both sides doing all of it."""

import json
import math

import pytest

from experiments.bench import compare, report, turns, work, workload
from experiments.bench.turns import Timed
from experiments.bench.workload import Workload

TINY = Workload(
    prompts=2, group=4, prompt_length=5, response_length=6, embed_dim=16, layers=2, heads=2,
    kv_heads=1, head_dim=8, mlp_dim=24, vocab=32, microbatches=2,
)  # fmt: skip


def test_ours_alone_does_whole_steps_and_is_recorded():
    said = []
    record = compare.measure(TINY, steps=2, warmup=1, pause=0, say=said.append)
    assert [(s["round"], s["side"]) for s in record["steps"]] == [
        (-1, "luspo_jax"), (0, "luspo_jax"), (1, "luspo_jax"),
    ]  # fmt: skip
    for step in record["steps"]:
        assert step["cores"] > 0
        assert all(seconds > 0 for seconds in step["phases"].values())
        assert sum(step["phases"].values()) < step["seconds"]
    assert record["ratios"] == {}
    assert record["matmul_flops_per_s"]["jax"] > 1e8
    assert record["environment"]["versions"]["jax"]
    json.dumps(record, allow_nan=False)
    text = "\n".join(said)
    assert "round 2" in text
    assert "of matmul rate" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's and TRL's own
def test_trl_takes_turns_with_ours():
    pytest.importorskip("torch")
    pytest.importorskip("trl")
    said = []
    record = compare.measure(TINY, peers=("trl",), steps=2, warmup=1, pause=0, say=said.append)
    assert [s["side"] for s in record["steps"]] == [
        "trl", "luspo_jax", "luspo_jax", "trl", "trl", "luspo_jax",
    ]  # fmt: skip
    for step in record["steps"]:
        assert set(step["phases"]) == {"generation", "update"}
        assert sum(step["phases"].values()) < step["seconds"]
    ratios = record["ratios"]["trl"]["step"]
    assert len(ratios["ratios"]) == 2
    assert ratios["ci95_low"] <= ratios["geometric_mean"] <= ratios["ci95_high"]


def test_files_hold_prompts_of_the_exact_length_that_both_sides_read(tmp_path):
    from transformers import AutoTokenizer

    workload.write(TINY, tmp_path, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / workload.MODEL)
    texts = workload.prompt_texts(tmp_path)
    ids = tokenizer(texts)["input_ids"]
    assert [len(tokens) for tokens in ids] == [TINY.prompt_length] * TINY.prompts
    assert [tokenizer.decode(tokens) for tokens in ids] == texts
    assert len(tokenizer) == TINY.vocab
    assert tokenizer.eos_token_id is None


def test_every_other_round_starts_with_the_other_side():
    order = turns.order(("a", "b"), warmup=1, steps=2)
    assert [(t.round, t.side) for t in order] == [
        (-1, "b"), (-1, "a"), (0, "a"), (0, "b"), (1, "b"), (1, "a"),
    ]  # fmt: skip


def test_turns_give_way_to_the_peer_and_time_it():
    order = turns.order((turns.OURS, "peer"), warmup=0, steps=2)
    taken = []
    match = turns.take(order, lambda: {"update": 1.0}, taken.append, pause=0)
    next(match)
    assert [t.side for t in taken] == [turns.OURS]
    match.send({"update": 2.0})
    with pytest.raises(StopIteration):
        match.send({"update": 3.0})
    assert [(t.side, t.phases["update"]) for t in taken] == [
        (turns.OURS, 1.0), ("peer", 2.0), ("peer", 3.0), (turns.OURS, 1.0),
    ]  # fmt: skip


def test_work_of_the_usual_shape():
    """Against products written out, and against the round figure without attention."""
    padded = work.step_work(Workload(), prompts_once=False)
    least = work.step_work(Workload(), prompts_once=True)
    layers, head, pair = 2 * 4 * 786_432, 2 * 256 * 4096, 4 * 4 * 256
    assert work.layer_parameters(Workload()) == 786_432
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
