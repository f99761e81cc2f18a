"""The configurations: each can run, says what it is, and has the paper's constants."""

import dataclasses
import importlib
import json
import math
import pathlib
import re
import shlex

import jax
import pytest
from jax.sharding import AbstractMesh

from luspo_jax import sharding
from luspo_jax.datasets import DataError
from luspo_jax.models import decoder, kernels
from luspo_jax.models.decoder_config import decoder_config
from luspo_jax.models.forward import Forward
from luspo_jax.models.locate import architecture
from luspo_jax.prompts.templates import LUSPO_VL_SYSTEM_PROMPT
from luspo_jax.rewards.registry import score
from luspo_jax.rollout.cache import page_bytes
from luspo_jax.run import checks, fields
from luspo_jax.run.arithmetic import batch_arithmetic
from luspo_jax.run.build import build, layouts, mesh_advice
from luspo_jax.run.memory import memory_estimate
from luspo_jax.sharding import MeshError
from tests import reasoning_cases

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")
SUPERVISED = [name for name in FILES if name.startswith("sft_")]
NAMES = [name for name in FILES if name not in SUPERVISED]
PAPER = ("qwen2_5_7b_dapo17k", "qwen3_30b_a3b_dapo17k")
VISUAL = "qwen2_5_vl_7b_virl39k"
SMALL = ("qwen3_0_6b_gsm8k", "qwen3_1_7b_dapo17k")
REASONING = ("deepseek_r1_distill_qwen_1_5b_dapo17k", "deepseek_r1_distill_qwen_7b_dapo17k")
LORA = ("qwen2_5_7b_lora_80gb", "qwen2_5_7b_qlora_24gb", "qwen2_5_7b_lora_v5e8")
VISUAL_LORA = "qwen2_5_vl_7b_lora"
ADAPTED = (*LORA, VISUAL_LORA)


def _module(name):
    return importlib.import_module(f"configs.{name}")


def _config(name, **leaves):
    config = _module(name).get_config()
    fields.assign(config, {name.replace("__", "."): x for name, x in leaves.items()})
    return config


@pytest.mark.parametrize("name", FILES)
def test_each_can_run_and_says_how(name):
    config = _config(name)
    check = checks.check_sft if name in SUPERVISED else checks.check
    assert check(config).num_steps == config.num_steps
    text = _module(name).__doc__
    assert "Command : " in text
    assert "Hardware: " in text
    assert f"configs/{name}.py" in text
    # A fresh one each time: flags of one run must not reach the next.
    assert _module(name).get_config() is not config


@pytest.mark.parametrize("name", [*PAPER, VISUAL, *SMALL, *REASONING, *ADAPTED])
def test_headers_are_honest_and_their_recipe_exists(name):
    text = _module(name).__doc__
    assert "not run" in text
    # Times come from a rehearsal that can be repeated, or there are none.
    assert "studies/rehearsal/" in text or "experiments.rehearse" in text or "not rehearsed" in text
    recipes = [word for word in text.split() if word.startswith("launch/")]
    assert recipes
    assert all((ROOT / recipe.rstrip(":,.")).is_file() for recipe in recipes)


@pytest.mark.parametrize(
    ("config", "tables"),
    [
        (PAPER[0], {"h100:1x8": "h100", "v5p:2x2x4": "v5p"}),
        (PAPER[1], {"h100:4x8": "h100_moe", "v5p:4x4x4": "v5p_moe"}),
        (VISUAL, {"h100:1x8": "h100_vl", "v5p:2x2x4": "v5p_vl"}),
        (REASONING[0], {"h100:1x8": "h100_r1_1_5b", "v5p:2x2x4": "v5p_r1_1_5b"}),
        (REASONING[1], {"h100:1x8": "h100_r1_7b", "v5p:2x2x4": "v5p_r1_7b"}),
        (LORA[0], {"h100:1x1": "h100_lora"}),
        (LORA[1], {"rtx4090:1x1": "rtx4090_qlora"}),
        (LORA[2], {"v5e:2x4": "v5e_lora"}),
        (VISUAL_LORA, {"h100:1x1": "h100_vl_lora"}),
    ],
)
def test_rehearsed_times_of_a_header_are_those_of_the_study(config, tables):
    text = " ".join(_module(config).__doc__.split())
    for machine, name in tables.items():
        table = (ROOT / f"experiments/studies/rehearsal/{name}.md").read_text()
        bound, expected = re.search(
            r"\*\*step\*\* \| \*\*([\d.]+ (?:min|s))\*\* \| \*\*([\d.]+) min", table
        ).groups()
        assert f"at least {bound} on {machine} (expected {expected}" in text


# ALGORITHMS of the paper, §5.1: typed here from its table, not read from the configuration.
PAPER_TABLE = {
    "rollout.prompts_per_step": 128,
    "rollout.group_size": 8,
    "rollout.max_response_length": 32_768,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "train.learning_rate": 1e-6,
    "train.warmup_steps": 20,
    "train.num_epochs": 1,
    "train.max_grad_norm": 1.0,
    "train.weight_decay": 0.1,
    "eval.every": 10,
    "eval.num_problems": 30,
    "eval.num_samples": 32,
    "eval.temperature": 1.0,
    "eval.top_p": 0.7,
    "data.name": "dapo_math_17k",
    "data.eval_name": "aime24",
    "data.template": "dapo",
    "reward.parts.dapo_math": 1.0,
    "reward.parts.format": 0.5,
    "reward.parts.overlong": 1.0,
    "reward.options.overlong.buffer": 4096,
    "reward.options.overlong.factor": 0.3,
    "eval.metric": "dapo_math",
    "model.dtype": "bfloat16",
    "model.rollout_dtype": "bfloat16",
    "train.packing": True,
}


@pytest.mark.parametrize("name", PAPER)
def test_constants_are_those_of_the_paper(name):
    config = _config(name)
    found = fields.flat(config)
    assert {field: found[field] for field in PAPER_TABLE} == PAPER_TABLE
    assert config.num_steps == {"qwen2_5_7b_dapo17k": 140, "qwen3_30b_a3b_dapo17k": 50}[name]
    sizes = batch_arithmetic(config)
    assert sizes.responses_per_step == 1024
    assert sizes.responses_per_minibatch == 16 * 8  # 16 prompts
    assert sizes.updates_per_step == 8


# Where the run on images differs, by the same table; the file of the data has to be fetched first.
VISUAL_TABLE = {
    "rollout.max_response_length": 4096,
    "eval.num_problems": 601,
    "eval.num_samples": 1,
    "data.name": "virl39k",
    "data.eval_name": "geometry3k",
    "data.template": "chat",
    "reward.parts.boxed_math": 1.0,
    "reward.options.format.name": "luspo_vl",
    "reward.options.overlong.buffer": 512,
    "eval.metric": "boxed_math",
    "train.freeze_vision": False,
}


def test_constants_of_the_run_on_images_are_those_of_the_paper():
    config = _config(VISUAL)
    found, table = fields.flat(config), PAPER_TABLE | VISUAL_TABLE
    del table["reward.parts.dapo_math"]
    assert {field: found[field] for field in table} == table
    assert config.num_steps == 700
    assert config.data.system_prompt == LUSPO_VL_SYSTEM_PROMPT
    sizes = batch_arithmetic(config)
    assert (sizes.responses_per_minibatch, sizes.updates_per_step) == (128, 8)
    # The largest image and a question fit the prompt.
    assert config.data.max_pixels == 1280 * 28 * 28
    assert config.data.max_prompt_length >= 1280 + 512


# run_deepscaler_1.5b_8k.sh of DeepScaleR, and DeepSeek-R1's README: typed here from them.
REASONING_TABLE = {
    "rollout.prompts_per_step": 128,
    "rollout.group_size": 8,
    "data.max_prompt_length": 1024,
    "rollout.max_response_length": 8192,
    "rollout.temperature": 0.6,
    "rollout.top_p": 1.0,
    "train.learning_rate": 1e-6,
    "eval.temperature": 0.6,
    "eval.top_p": 0.95,
    "data.template": "r1",
    "data.system_prompt": "",
    "eval.metric": "boxed_math",
}


@pytest.mark.parametrize("name", REASONING)
def test_constants_on_reasoning_models_are_those_of_their_sources(name):
    config = _config(name)
    found = fields.flat(config)
    assert {field: found[field] for field in REASONING_TABLE} == REASONING_TABLE
    assert config.reward.parts.to_dict() == {"boxed_math": 1.0}
    sizes = batch_arithmetic(config)
    assert (sizes.responses_per_minibatch, sizes.updates_per_step) == (64 * 8, 2)


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("<think>\n It is \\boxed{33}", 0.0),  # cut off while it reasons
        ("<think>\n So.\n</think>\n\nIt is \\boxed{33}.", 1.0),
        ("<think>\n So.\n</think>\n\nAnswer: 33", 0.0),  # not in the form that was asked for
    ],
)
def test_reward_on_reasoning_models_is_the_boxed_answer_after_the_reasoning(response, value):
    config = _config(REASONING[0]).reward
    scored = score(config.parts.to_dict(), response, "33", options=config.options.to_dict())
    assert scored.value == value


@pytest.mark.parametrize("name", [*PAPER, VISUAL, *SMALL, *REASONING, *ADAPTED])
@pytest.mark.parametrize(
    ("preset", "ratio", "scale", "low", "high"),
    [
        ("luspo", "sequence", "length", 2e-3, 2.5e-3),
        ("gspo", "sequence", "none", 3e-4, 4e-4),
        ("grpo", "token", "none", 0.2, 0.2),
    ],
)
def test_the_compared_objectives_are_one_flag_away(name, preset, ratio, scale, low, high):
    objective = checks.check(_config(name, objective__preset=preset)).objective
    assert (objective.ratio, objective.length_scale) == (ratio, scale)
    assert (objective.clip_low, objective.clip_high) == (low, high)
    assert (objective.aggregation, objective.kl_coef) == ("seq-mean-token-mean", 0.0)


def test_gspo_with_the_papers_clip_is_what_the_header_says():
    clip = {"objective__clip_low": 2e-3, "objective__clip_high": 2.5e-3}
    config = _config(PAPER[0], objective__preset="gspo", **clip)
    assert checks.check(config).objective.clip_high == 2.5e-3


@pytest.mark.parametrize(
    ("response", "length", "reward"),
    [
        ("Well.\nAnswer: 33", 1000, 1.5),  # right, in form
        ("Answer: 33\nor so", 1000, 0.0),  # not the last line: "33" is not what it says
        ("Well.\nAnswer: 34", 1000, 0.5),  # in form
        ("33", 1000, 0.0),
        ("Well.\nAnswer: 33", 32_768 - 4096, 1.5),  # where the buffer begins
        ("Well.\nAnswer: 33", 32_768 - 2048, 1.5 - 0.15),
        ("33", 32_768, -0.3),  # the floor
    ],
)
def test_reward_is_accuracy_format_and_length(response, length, reward):
    config = _config(PAPER[0]).reward
    scored = score(
        config.parts.to_dict(),
        response,
        "33",
        length=length,
        max_length=32_768,
        options=config.options.to_dict(),
    )
    if response == "Answer: 33\nor so":
        assert scored.parts["format"] == 0.0
    else:
        assert scored.value == pytest.approx(reward)


@pytest.mark.parametrize(
    ("response", "length", "reward"),
    [
        ("<think> a </think> <answer> The answer is $\\boxed{B}$ </answer>", 1000, 1.5),
        ("<think> a </think> <answer> The answer is $\\boxed{C}$ </answer>", 1000, 0.5),
        ("It is \\boxed{B}", 3584 + 256, 1.0 - 0.15),  # half of the buffer
        ("B", 4096, -0.3),
    ],
)
def test_reward_on_images_is_accuracy_format_and_length(response, length, reward):
    config = _config(VISUAL).reward
    options = config.options.to_dict()
    scored = score(
        config.parts.to_dict(), response, "B", length=length, max_length=4096, options=options
    )
    assert scored.value == pytest.approx(reward)


# devices → (name of a mesh axis → size) and rows of a micro-batch, by hand.
TOPOLOGIES = [
    ("qwen2_5_7b_dapo17k", 8, {}, {"fsdp": 8}, 8),
    ("qwen2_5_7b_dapo17k", 16, {"train__microbatch_tokens": 557_056}, {"fsdp": 16}, 16),
    ("qwen2_5_7b_dapo17k", 16, {"mesh__context": 2}, {"fsdp": 8, "context": 2}, 8),
    (
        "qwen2_5_7b_dapo17k",
        64,
        {
            "rollout__max_response_length": 129_024,
            "mesh__context": 4,
            "train__microbatch_tokens": 2_097_152,
        },
        {"fsdp": 16, "context": 4},
        16,
    ),
    ("qwen3_30b_a3b_dapo17k", 32, {}, {"fsdp": 4, "expert": 8}, 32),
    ("qwen3_30b_a3b_dapo17k", 32, {"mesh__expert": 1}, {"fsdp": 32}, 32),
    (
        "qwen3_30b_a3b_dapo17k",
        64,
        {"mesh__context": 2, "rollout_mesh__expert": 4},
        {"fsdp": 4, "expert": 8, "context": 2},
        32,
    ),
    (VISUAL, 8, {}, {"fsdp": 8}, 32),
    (VISUAL, 16, {}, {"fsdp": 16}, 32),
    *((name, n, {}, {"fsdp": n}, 8) for name in SMALL for n in (1, 2, 4, 8)),
    *((name, n, {}, {"fsdp": n}, 16) for name in REASONING for n in (4, 8, 16)),
    *((REASONING[0], n, {}, {"fsdp": n}, 16) for n in (1, 2)),
    *((name, 1, {}, {}, 1) for name in LORA[:2]),
    (LORA[2], 8, {}, {"fsdp": 8}, 8),
    (VISUAL_LORA, 1, {}, {}, 4),
]


@pytest.mark.parametrize(("name", "devices", "flags", "axes", "rows"), TOPOLOGIES)
def test_stated_topologies_fit(name, devices, flags, axes, rows):
    config = _config(name, **flags)
    checks.check(config)
    mesh = sharding.mesh_sizes(config.mesh, devices)
    assert {axis: size for axis, size in mesh.items() if size > 1} == {
        axis: size for axis, size in axes.items() if size > 1
    }
    assert math.prod(sharding.mesh_sizes(config.rollout_mesh, devices).values()) == devices
    sizes = batch_arithmetic(config)
    assert sizes.rows_per_microbatch == rows
    assert rows % math.prod(mesh[axis] for axis in ("data", "fsdp", "expert")) == 0
    assert not _misfits(config, devices, sizes)


def _misfits(config, devices, sizes):
    """What a mesh of that many devices cannot cut, of a machine that need not be there."""
    sizes_of_model = decoder.cut_sizes(decoder_config(architecture(config.model.path)))
    problems = []
    for table, section in (("train", config.mesh), ("rollout", config.rollout_mesh)):
        shape = tuple(sharding.mesh_sizes(section, devices).values())
        layout = sharding.Layout(AbstractMesh(shape, sharding.MESH_AXES), table)
        parts = dict(sizes_of_model)
        if table == "train":
            parts["packed rows"] = ("batch", sizes.rows_per_microbatch)
        problems += sharding.misfits(layout, parts)
    return problems


@pytest.mark.parametrize("name", [PAPER[0], *SMALL])
def test_a_mesh_of_eight_is_laid_out_and_wrong_ones_are_refused(name):
    config = _config(name)
    model = decoder_config(architecture(config.model.path))
    train, rollout = layouts(config, model, jax.devices()[:8])
    assert train.size("batch") == rollout.size("batch") == 8
    with pytest.raises(MeshError, match=r"packed rows of a micro-batch .* = 8 is cut into 6 parts"):
        layouts(config, model, jax.devices()[:6])
    with pytest.raises(MeshError, match="takes a multiple of 3 devices and there are 8"):
        layouts(_config(name, mesh__tensor=3), model, jax.devices()[:8])


def test_more_parts_than_key_heads_are_refused():
    config = _config(PAPER[0], rollout_mesh__tensor=8)
    model = decoder_config(architecture(config.model.path))
    with pytest.raises(MeshError, match="num_key_value_heads = 4 is cut into 8 parts by the roll"):
        layouts(config, model, jax.devices()[:8])


def _rehearsals(name):
    """(number of devices, configuration) of each rehearsal that a header prints."""
    text = " ".join(_module(name).__doc__.split())
    for line in re.findall(r"`(python -m experiments\.rehearse [^`]*)`", text):
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in shlex.split(line)[3:])
        assert flags.pop("config") == f"configs/{name}.py"
        machine = flags.pop("topology").partition(":")[2]
        leaves = {flag.removeprefix("config."): int(value) for flag, value in flags.items()}
        config = _config(name)
        fields.assign(config, leaves)
        yield math.prod(int(size) for size in machine.split("x")), config


@pytest.mark.parametrize("name", [*PAPER, VISUAL, *SMALL, *REASONING, *ADAPTED])
def test_a_rehearsal_that_a_header_prints_fits_its_machine_as_printed(name):
    rehearsals = list(_rehearsals(name))
    assert rehearsals
    for devices, config in rehearsals:
        checks.check(config)
        assert not _misfits(config, devices, batch_arithmetic(config))


def test_advice_on_rows_is_the_flag_that_fits_and_that_the_header_prints():
    config = _config(PAPER[0])
    shape = tuple(sharding.mesh_sizes(config.mesh, 16).values())
    layout = sharding.Layout(AbstractMesh(shape, sharding.MESH_AXES), "train")
    assert mesh_advice(config, layout).startswith("set --config.train.microbatch_tokens=")
    flag = re.search(r"--config\.train\.microbatch_tokens=\d+", mesh_advice(config, layout))
    assert flag[0] in _module(PAPER[0]).__doc__
    model = decoder_config(architecture(config.model.path))
    three = _config(PAPER[0], train__microbatch_tokens=3 * 34_816)
    with pytest.raises(MeshError, match=r"set --config\.train\.microbatch_tokens=278528,"):
        layouts(three, model, jax.devices()[:8])
    layouts(_config(PAPER[0], train__microbatch_tokens=8 * 34_816), model, jax.devices()[:8])


def test_sixteen_devices_need_what_the_header_says():
    config = _config(PAPER[0])
    problems = _misfits(config, 16, batch_arithmetic(config))
    assert problems == [
        "packed rows = 8 is cut into 16 parts by the train mesh (fsdp 16), which does not divide it"
    ]


@pytest.mark.parametrize("name", [*PAPER, VISUAL, *SMALL, *REASONING, *ADAPTED])
def test_sequences_fit_the_model(name):
    config = _config(name)
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    assert longest <= architecture(config.model.path)["max_position_embeddings"]
    assert config.train.microbatch_tokens % longest == 0
    assert longest % 128 == 0  # blocks of the attention kernels
    if "overlong" in config.reward.parts:
        assert config.reward.options.overlong.buffer * 8 == config.rollout.max_response_length
    assert config.eval.every % config.output.checkpoint_every == 0  # else the best are not kept


def test_headers_state_the_memory_that_the_sizes_give():
    for name in (*PAPER, VISUAL, *SMALL, *REASONING):
        config, text = _config(name), " ".join(_module(name).__doc__.split())
        model = decoder_config(architecture(config.model.path))
        memory = memory_estimate(config, model, (None, None), 0)
        state = memory["master weights (float32)"] + memory["Adam moments (float32)"]
        if model.num_experts:
            recorded = model.num_expert_layers * model.experts_per_token
            responses, rows = (1024 * n * recorded / 1e9 for n in (4000, 2048 + 32_768))
            assert f"{recorded} bytes, {responses:.1f} GB of a step's responses at mean" in text
            assert f"padded rows took {rows:.1f} GB each" in text
        written = f"{state / 1e9:.0f}" if state > 5e10 else f"{state / 1e9:.1f}"
        assert f"weights and Adam's moments are {written} GB" in text
        token = page_bytes(model, config.model.rollout_dtype, 1) / 1e3
        assert f"keys and values take {token:.0f} kB a token" in text


@pytest.mark.parametrize(
    ("name", "table"),
    [
        (LORA[0], "h100_lora"),
        (LORA[1], "rtx4090_qlora"),
        (LORA[2], "v5e_lora"),
        (VISUAL_LORA, "h100_vl_lora"),
    ],
)
def test_headers_of_adapters_state_their_memory(name, table):
    """The state by the sizes, and the rehearsed peaks by the study, which fit the machine."""
    config, text = _config(name), " ".join(_module(name).__doc__.split())
    model = decoder_config(architecture(config.model.path))
    memory = memory_estimate(config, model, (None, None), 0)
    frozen, adapter = (
        memory[key] for key in (f"frozen weights ({config.lora.base})", "adapter (float32)")
    )
    assert f"frozen weights are {frozen / 1e9:.1f} GB" in text
    assert f"its moments {3 * adapter / 1e9:.2f} GB" in text
    token = page_bytes(model, config.model.rollout_dtype, 1) / 1e3
    assert f"keys and values take {token:.0f} kB a token" in text
    folder = ROOT / "experiments/studies/rehearsal"
    found = json.loads((folder / f"{table}.json").read_text())
    assert found["fits"]
    assert found["checkpoint_bytes"] == 3 * adapter
    update = found["programs"]["update"]["bytes"]
    taken = (update["arguments"] + update["temporaries"]) / 1e9
    most = max(one["peak_bytes"] for one in found["programs"].values()) / 1e9
    usable = found["programs"]["update"]["usable_bytes"] / 1e9
    assert f"an update takes {taken:.1f} GB a device" in text
    assert f"{most:.1f} of {usable:.1f} GB in use at most" in text


def test_experts_of_the_paper_run_are_read():
    model = decoder_config(architecture(_config(PAPER[1]).model.path))
    assert (model.num_experts, model.experts_per_token, model.expert_dim) == (128, 8, 768)
    assert (model.norm_topk, model.num_expert_layers, model.num_layers) == (True, 48, 48)


@pytest.mark.parametrize(
    ("platform", "prompts", "images"),
    [
        ("tpu", "splash", "splash"),
        ("cuda", "cudnn", "flash_gpu"),
        ("cpu", "reference", "reference"),
    ],
)
def test_the_tower_has_an_attention_of_its_own(platform, prompts, images, monkeypatch):
    """Patches are not one run in their slots, and the tower's heads have a size of their own."""
    model = decoder_config(architecture(_config(VISUAL).model.path))
    text = decoder_config(architecture(_config(PAPER[0]).model.path))
    monkeypatch.setattr(kernels, "_platform", lambda layout: platform)

    def names(model, name="auto"):
        how = Forward(model, "bfloat16", attention=name, vision_attention=name)
        how = kernels.resolved(how)
        return how.attention, how.vision_attention

    assert names(model) == (prompts, images)
    assert names(model, prompts) == (prompts, images)
    assert names(model, "reference") == ("reference", "reference")
    assert names(text) == (prompts, "reference")
    small = dataclasses.replace(
        model, vision=dataclasses.replace(model.vision, embed_dim=64, num_heads=8)
    )
    fits = {"cuda": "reference"}.get(platform, images)  # 8 is less than the kernel takes
    assert names(small)[1] == fits


def test_data_that_is_not_there_is_told_with_where_it_comes_from(shared_data, tmp_path):
    config = _config(VISUAL)
    config.model.path = str(shared_data / "qwen" / "Qwen2.5-VL-7B-Instruct")
    config.data.path = str(tmp_path / "39Krelease.parquet")
    with pytest.raises(
        DataError, match=r"no file .*39Krelease.parquet; download it from .*TIGER-Lab/ViRL39K"
    ):
        build(config, jax.devices()[:8])


@pytest.mark.slow
@pytest.mark.parametrize("name", [PAPER[0], *SMALL, REASONING[0]])
def test_runs_are_built_from_real_tokenizers_and_data(name, shared_data, tmp_path):
    """All but the weights: prompts fit, rewards are read, meshes are laid out."""
    qwen, math_eval = shared_data / "qwen", shared_data / "math_eval"
    config = _config(name)
    tokenizer, user = qwen / "Qwen3-1.7B", "<|im_start|>user"
    if "qwen2_5" in name:
        tokenizer = qwen / "Qwen2.5-VL-7B-Instruct"
    if name in REASONING:
        (tokenizer := tmp_path / "tokenizer").mkdir()
        reasoning_cases.write_qwens(tokenizer, qwen / "Qwen3-1.7B")
        user = reasoning_cases.USER
    (tmp_path / "config.json").write_text(json.dumps(architecture(config.model.path)))
    config.model.path, config.model.tokenizer = str(tmp_path), str(tokenizer)
    config.data.cache_dir = str(tmp_path / "data")
    if config.data.name == "gsm8k":
        config.data.path = str(math_eval / "gsm8k" / "train.jsonl")
        config.data.eval_path = str(math_eval / "gsm8k" / "test.jsonl")
    else:
        train = shared_data / "math_train" / "dapo17k" / "dapo_math_17k.parquet"
        config.data.path = str(train)
        config.data.eval_path = str(math_eval / "aime24" / "dapo_aime-2024.parquet")
    run = build(config, jax.devices()[:8])
    assert len(run.data.held_out) == min(config.eval.num_problems, 500)
    assert len(run.data.stream) == {"gsm8k": 7473}.get(config.data.name, 17_279)
    assert run.rule.logprobs.how.layout.size("batch") == 8
    prompts = run.data.stream.next_prompts(256)
    assert run.data.stream.dropped == 0
    assert all(user in prompt.text for prompt in prompts)
