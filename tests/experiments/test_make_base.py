"""The script that makes base models, cut down to a few steps."""

import os
import pathlib
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from luspo_jax.images.settings import read_settings
from luspo_jax.models import decoder_weights
from luspo_jax.models.decoder_config import read_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = (
    *("--num_terms=3", "--num_layers=1", "--embed_dim=16", "--mlp_dim=16", "--rows_per_step=8"),
    *("--chain_steps=2", "--mixture_steps=2", "--eval_problems=8", "--eval_samples=3"),
)
SHAPES = (
    *("--num_layers=1", "--embed_dim=32", "--mlp_dim=16", "--rows_per_step=8", "--chain_steps=2"),
    *("--vision_embed_dim=16", "--vision_mlp_dim=16", "--num_images=8", "--mixture_steps=2"),
    *("--eval_problems=8", "--eval_samples=3"),
)
EXPERTS = ("--num_experts=4", "--experts_per_token=2", "--expert_dim=8", "--nonorm_topk")


def make_base(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.make_base", *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", ["label_sums", "label_lookup"])
@pytest.mark.parametrize("experts", [(), EXPERTS], ids=["dense", "experts"])
def test_makes_the_same_folder_again(task, experts, tmp_path):
    folders = [tmp_path / name for name in ("first", "again")]
    for folder in folders:
        ran = make_base(f"--task={task}", "--seed=3", f"--out={folder}", *SMALL, *experts)
        assert ran.returncode == 0, ran.stderr[-2000:]
    files = {path.name: path.read_bytes() for path in folders[0].iterdir()}
    assert files == {path.name: path.read_bytes() for path in folders[1].iterdir()}
    config = read_config(folders[0])
    decoder_weights.load_params(folders[0], config)
    assert len(AutoTokenizer.from_pretrained(folders[0])) == config.vocab_size
    card = files["README.md"].decode()
    assert f"--task={task} --seed=3" in card
    assert "8 × 3" in card
    assert all((option in card) == bool(experts) for option in EXPERTS)
    assert ("load of the fullest expert" in card) == bool(experts)
    assert config.num_experts == (4 if experts else 0)


@pytest.mark.slow
def test_makes_a_model_that_sees(tmp_path):
    ran = make_base("--task=shapes", f"--out={tmp_path / 'base'}", *SHAPES)
    assert ran.returncode == 0, ran.stderr[-2000:]
    config = read_config(tmp_path / "base")
    assert config.vision.full_layers == (1,)
    decoder_weights.load_params(tmp_path / "base", config)
    patching = read_settings(tmp_path / "base").patching
    assert (patching.patch_size, patching.merge_size) == (14, 2)
    card = (tmp_path / "base" / "README.md").read_text()
    for told in ("--task=shapes", "right, by kind | all", "right with blank images | all", "dots"):
        assert told in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--out is required"),
        (("--out={tmp}",), "exists: choose another folder, or pass --overwrite"),
        (("--out={tmp}/new", "--num_terms=12"), "--num_terms"),
        (("--out={tmp}/new", "--embed_dim=12"), "head_dim 3 must be even"),
        (("--out={tmp}/new", "--num_experts=1"), "2 must be <= num_experts 1"),
        (("--out={tmp}/new", "--task=shapes", "--kinds=bars,lines"), "kinds must be some of"),
        (("--out={tmp}/new", "--task=shapes", "--num_experts=4"), "--num_experts"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, message, tmp_path):
    ran = make_base(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert ran.returncode in (1, 2)
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not any(tmp_path.iterdir())
