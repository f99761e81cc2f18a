"""Splits of generated tasks: random access, disjoint under all seeds, weighted, picklable."""

import collections
import json
import pickle
import types

import pytest
from transformers import AutoTokenizer

from luspo_jax.datasets import DataError, load, overlap
from luspo_jax.datasets.reasoning_gym import reasoning_gym, split_of
from luspo_jax.prompts import PromptStream, Renderer

rg = pytest.importorskip("reasoning_gym", reason="needs the extra [tasks]")

SUMS = {"task": "chain_sum", "max_terms": 3}
GOLDEN = [  # the first of train, the first of test
    "State the final answer to the following arithmetic problem: 670 - 291 - 288 =",
    "State the final answer to the following arithmetic problem: 6965 + 2741 =",
]


def test_random_access():
    examples = reasoning_gym("train", **SUMS, size=1000)
    listed = examples[:20]
    assert len(examples) == 1000
    assert [examples[i] for i in (7, 0, 19)] == [listed[i] for i in (7, 0, 19)]
    assert examples[-1] == examples[999]
    assert [e.id for e in listed] == list(range(20))
    for index in (1000, -1001):
        with pytest.raises(IndexError):
            examples[index]


def test_meta_names_the_item_and_survives_json():
    example = reasoning_gym("test", **SUMS)[3]
    assert set(example.meta) == {"task", "number", "options", "source"}
    assert json.loads(json.dumps(example.meta)) == example.meta
    assert example.meta["options"] == {"max_terms": 3}


def test_a_split_goes_to_another_process():
    examples = reasoning_gym("train", **SUMS)
    assert len(pickle.dumps(examples)) < 1000
    assert pickle.loads(pickle.dumps(examples))[5] == examples[5]


def test_first_problems_do_not_change():
    """Golden: results are comparable only as long as a seed means the same problems."""
    found = [reasoning_gym(split, **SUMS)[0].problem for split in ("train", "test")]
    assert found == GOLDEN


def test_splits_share_no_question_even_where_there_are_few():
    """Few items: 90 one-digit sums and differences, drawn again and again under several seeds."""
    few = {"task": "chain_sum", "max_terms": 2, "max_digits": 1}
    asked = collections.defaultdict(set)
    for split in ("train", "test"):
        for seed in (0, 1, 2):
            asked[split] |= {e.problem for e in reasoning_gym(split, **few, size=400, seed=seed)}
    assert asked["train"].isdisjoint(asked["test"])
    assert len(asked["train"] | asked["test"]) == 200
    assert len(asked["test"]) == pytest.approx(50, abs=20)


def test_near_seeds_of_the_package_share_items_and_ours_do_not():
    """What the splits are for, in numbers: `docs/tasks.md` has them for more problems."""
    theirs = [rg.create_dataset("chain_sum", seed=seed, size=200) for seed in (42, 43)]
    trained, held_out = (
        [types.SimpleNamespace(id=n, problem=e["question"]) for n, e in enumerate(items)]
        for items in theirs
    )
    assert len(overlap(held_out, trained).at_least(1)) >= 199
    ours = [reasoning_gym(s, task="chain_sum", size=200, seed=42) for s in ("train", "test")]
    assert not overlap(ours[1], ours[0]).at_least(1)


def test_another_seed_draws_other_items():
    long = {"task": "chain_sum", "min_terms": 6}  # so long that none is drawn twice
    one, other = (reasoning_gym("train", **long, size=50, seed=s) for s in (0, 1))
    assert {e.problem for e in one}.isdisjoint(e.problem for e in other)
    # And a larger size the same ones first.
    larger = reasoning_gym("train", **long, size=51, seed=0)
    assert list(one) == larger[:50]


def test_a_split_is_a_matter_of_the_question():
    assert {split_of(e.problem) for e in reasoning_gym("test", **SUMS, size=50)} == {"test"}
    assert {split_of(e.problem) for e in reasoning_gym("train", **SUMS, size=50)} == {"train"}


def test_a_template_of_ones_own_names_the_task_beside_the_problem():
    tokenizer = AutoTokenizer.from_pretrained("luspo_jax/models/embedded/label_sums")
    example = reasoning_gym("train", task="chain_sum")[0]
    renderer = Renderer(tokenizer, "{problem} One number, please ({task}, {source}): {")
    (prompt,) = PromptStream([example], renderer, max_length=1000, seed=0).next_prompts(1)
    assert prompt.text == f"{example.problem} One number, please (chain_sum, chain_sum): {{"
    assert (renderer.columns, example.id) == (("task", "source"), prompt.prompt_id)


def test_tasks_are_mixed_by_weight():
    tasks = {
        "easy": {"task": "chain_sum", "level": 0, "weight": 3.0},
        "hard": {"task": "chain_sum", "level": 4, "level_mode": "upper_bound"},
        "spell_backward": {"weight": 1.0},
    }
    examples = reasoning_gym("train", tasks=tasks, size=500)
    counts = collections.Counter(e.meta["source"] for e in examples)
    assert counts["easy"] == pytest.approx(300, abs=45)
    assert counts["hard"] == pytest.approx(100, abs=36)
    assert counts["spell_backward"] == pytest.approx(100, abs=36)
    assert {e.meta["task"] for e in examples} == {"chain_sum", "spell_backward"}
    hard = next(e for e in examples if e.meta["source"] == "hard")
    assert hard.meta["options"] == {"level": 4, "level_mode": "upper_bound"}


def test_a_task_may_have_an_option_named_tasks():
    examples = reasoning_gym("train", task="calendar_arithmetic", tasks=["is_leap_year"], size=3)
    assert all("leap" in e.problem for e in examples)


def test_a_stream_goes_on_where_it_stopped():
    tokenizer = AutoTokenizer.from_pretrained("luspo_jax/models/embedded/label_sums")

    def stream():
        examples, _ = load("reasoning_gym", split="train", **SUMS)
        return PromptStream(examples, Renderer(tokenizer), max_length=1000, seed=3)

    one, other = stream(), stream()
    one.next_prompts(5)
    other.set_state(json.loads(json.dumps(one.get_state())))
    assert [p.prompt_id for p in one.next_prompts(4)] == [
        p.prompt_id for p in other.next_prompts(4)
    ]


def test_the_report_names_the_package():
    examples, report = load("reasoning_gym", split="test", **SUMS, size=9)
    assert report.examples == len(examples) == 9
    assert report.source == f"reasoning-gym {examples.version} (test)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"options\.task is empty: name a task"),
        ({"level": 1}, r"options\.level: of which task\?"),
        ({"tasks": {}}, r"options\.task is empty"),
        ({"tasks": ["gcd"]}, r"options\.task is empty"),
        ({"tasks": {"gcd": 1.0}}, r"options\.tasks\.gcd=1\.0 must be a section"),
        ({"tasks": {"gdc": {}}}, r"options\.tasks\.gdc\.task='gdc' does not exist: did.*'gcd'"),
        ({"tasks": {"gcd": {"weight": 0}}}, r"options\.tasks\.gcd\.weight=0 must be a positive"),
        ({"tasks": {"gcd": {"weight": "x"}}}, r"options\.tasks\.gcd\.weight='x'"),
        ({"tasks": {"gcd": {"min": 1}}}, r"options\.tasks\.gcd\.min: task 'gcd' has no such"),
        ({"task": "gcd", "min": 1}, r"options\.min: task 'gcd' has no such option"),
        ({"task": "gcd", "min_value": 9, "max_value": 3}, r"options: task 'gcd' refuses"),
        ({"task": "gcd", "size": 0}, r"options\.size=0 must be"),
        ({"task": "gcd", "size": "many"}, r"options\.size='many' must be a whole number"),
        ({"task": "gcd", "seed": -1}, r"options\.seed=-1 must be"),
        ({"task": 3}, r"options\.task=3 must be text"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(DataError, match=message):
        load("reasoning_gym", split="train", **options)


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match=r"'dev' .*train.*test"):
        reasoning_gym("dev", **SUMS)


def test_a_task_with_too_few_questions_says_so():
    one = {"min_n": 7, "max_n": 7}
    (question,) = {e["question"] for e in rg.create_dataset("count_primes", **one, size=9)}
    other = {"train": "test", "test": "train"}[split_of(question)]
    with pytest.raises(DataError, match=r"'count_primes'.*64 draws.*too few different questions"):
        reasoning_gym(other, task="count_primes", **one)[0]
