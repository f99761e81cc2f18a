"""A model whose chat template opens the reasoning, from the prompt to verdicts, files and accuracy.

The response begins inside the `<think>` that its prompt ends on. Everything that judges sees it
opened; what is stored is what the model wrote.
"""

import json

import numpy as np
import pytest

from experiments.evaluation import scoring
from luspo_jax import train
from luspo_jax.benchmarks import BENCHMARKS
from luspo_jax.datasets import Example
from luspo_jax.experience import held_out
from luspo_jax.experience.groups import judged
from luspo_jax.metrics import read_metrics
from luspo_jax.prompts import Renderer, encode
from luspo_jax.rewards import Scorer
from luspo_jax.rollout import Response
from luspo_jax.run import fields
from luspo_jax.run import workdir as workdirs
from luspo_jax.run.build import build, facts
from luspo_jax.run.model import load_model
from tests import reasoning_cases as r1

# What the model writes after `<think>`: (text, whether it ends by itself, accuracy, form, status).
WRITTEN = [
    (" 2 + 2 is 4.\n</think>\n\nIt is \\boxed{4}.", True, 1, 1, "ok"),
    (" Say \\boxed{5}? No.\n</think>\n\n\\boxed{4}", True, 1, 1, "ok"),
    ("\n</think>\n\n\\boxed{4}", True, 1, 1, "ok"),  # it does not think
    (" Hm.\n</think>\n\n\\boxed{5}", True, 0, 1, "ok"),
    (" It is \\boxed{4}, I think, but", False, 0, 0, "unparsed"),  # cut off inside
    (" It is \\boxed{4}.", True, 0, 0, "unparsed"),  # it ends inside
    (" So.\n</think>\n\nIt is", False, 0, 0, "unparsed"),  # cut off outside
    (" So.\n</think>\n\n\\boxed{4} <think> or \\boxed{4}", False, 0, 0, "unparsed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    r1.write_model(folder)
    return folder


@pytest.fixture
def config(folder, tmp_path):
    rows = [{"problem": f"{n}+1?", "answer": str(n + 1)} for n in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = fields.default_config()
    config.num_steps = 1
    config.model.path, config.model.random_weights = str(folder), True
    config.data.name, config.data.path = "file", str(tmp_path / "sums.jsonl")
    config.data.eval_path = config.data.path
    config.data.cache_dir = str(tmp_path / "cache")
    config.data.template = "r1"
    config.data.max_prompt_length = 128
    config.reward.parts = {"opened": 1.0, "boxed_math": 1.0}
    config.reward.options = {"opened": {"function": f"{__file__}:opened"}}
    config.rollout.prompts_per_step = 4
    config.rollout.group_size = 4
    config.rollout.max_response_length = 64
    config.rollout.num_slots = 16
    config.objective.preset = "luspo"
    config.train.num_minibatches = 1
    config.train.num_length_buckets = 1
    config.eval.every = 0
    config.eval.num_problems = 4
    config.eval.num_samples = 2
    config.eval.num_slots = 16
    config.eval.metric = "opened"
    config.output.checkpoint_every = 1
    config.output.tensorboard = False
    return config


def opened(response, answer):
    """Whether a reward of one's own is given the opening, once."""
    return float(response.startswith("<think>\n") and not response.startswith("<think>\n<think>"))


def _groups(folder, written, form="boxed"):
    """Responses to one problem, of (text, whether it ends, …), with their verdicts."""
    config = fields.default_config()
    config.model.path, config.model.random_weights = str(folder), True
    model = load_model(config)
    asked = encode([Example(0, "2+2?", "4")], Renderer(model.tokenizer, "r1"), max_length=256)[0]
    responses = []
    for index, (text, ended, *_) in enumerate(written):
        tokens = model.tokenizer.encode(text + r1.END * ended, add_special_tokens=False)
        assert (tokens[-1] in model.stop_token_ids) == ended
        logprobs = np.zeros(len(tokens), np.float32)
        responses.append(Response(0, index, np.array(tokens, np.int32), logprobs, stopped=ended))
    parts, options = {"boxed_math": 1.0, "format": 0.5}, {"format": {"name": form}}
    with Scorer(parts, options=options, workers=1) as scorer:
        return judged(asked, responses, scorer=scorer, decode=model.decode, max_length=64)


def test_an_answer_is_what_follows_the_closing_tag(folder):
    (group,) = _groups(folder, WRITTEN)
    for response, (text, ended, right, form, status) in zip(group.responses, WRITTEN, strict=True):
        assert response.text == text  # without the opening, and without the stop token
        assert response.stopped == ended
        assert response.reward.parts == {"boxed_math": right, "format": form}, text
        assert response.reward.status == status, text


def test_a_form_that_describes_the_reasoning_sees_it_opened_once(folder):
    """The LUSPO paper's form asks for one `<think>` at the beginning: the prompt's."""
    answer = "</think> <answer> The answer is $\\boxed{4}$ </answer>"
    written = [(f" So.\n{answer}", True), (f"<think> So.\n{answer}", True), (f"\n{answer}", True)]
    (group,) = _groups(folder, written, "luspo_vl")
    assert [response.reward.parts["format"] for response in group.responses] == [1, 0, 0]


def test_what_is_stored_is_judged_alike_again(folder):
    groups = _groups(folder, WRITTEN)
    records = held_out.kept(groups, "aime24_boxed", ())
    assert records[0].prompt.endswith(r1.OPEN)
    with BENCHMARKS["aime24_boxed"].judge(workers=1, time_limit=5.0) as judge:
        again = scoring.judged(records, judge)
    assert [record.verdict.value for record in again] == [right for _, _, right, *_ in WRITTEN]


@pytest.mark.slow
def test_a_run_reads_the_opening_and_stores_what_was_written(config, tmp_path):
    run = build(config)
    workdir = workdirs.Workdir(tmp_path / "run", config, facts(run))
    try:
        train.train(run, workdir)
    finally:
        workdir.close()
    (stop,) = run.model.stop_token_ids
    lines = (tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 16
    for record in records:
        assert record["prompt"].endswith(r1.OPEN)
        assert record["prompt"].count(r1.BEGIN) == 1
        assert not record["response"].startswith("<think>\n")
        assert r1.END not in record["response"]
        assert record["parts"] == {"opened": 1.0, "boxed_math": 0.0}
        assert stop not in record["tokens"][:-1]
        assert record["truncated"] == (record["tokens"][-1] != stop)
    assert {record["truncated"] for record in records} == {True, False}
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = [row[n] for row in rows for n in row if n.startswith("val-core/") and "acc/mean" in n]
    assert found
    assert set(found) == {1.0}
