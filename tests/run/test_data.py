"""Model folder and data of a run: what is refused, and what is counted."""

import json
import shutil
import types

import numpy as np
import PIL.Image
import pytest
from transformers import AutoTokenizer

from configs.quickstart import get_config as text_config
from luspo_jax import prompts
from luspo_jax.datasets import DataError
from luspo_jax.hosts import processes
from luspo_jax.hosts.values import ConfigError
from luspo_jax.images.settings import read_settings
from luspo_jax.run import checks
from luspo_jax.run.build import build
from luspo_jax.run.data import held_out_place, load_data
from luspo_jax.run.export import export_policy
from luspo_jax.run.model import load_model
from tests import vl_cases


@pytest.fixture
def config(tmp_path):
    vl_cases.write_model(tmp_path)
    config = vl_cases.config(tmp_path)
    config.eval.num_problems = 8
    return config


def _load(config):
    model = load_model(config)
    data = load_data(config, model)
    data.close()
    return data


def _numbered(path, count, **more):
    rows = [{"problem": f"p{n}?", "answer": str(n), "level": n % 3, **more} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_are_chosen_by_fields_and_each_set_has_its_own(tmp_path):
    config = text_config()
    config.data.name, config.data.eval_name, config.data.options = "file", "", {}
    config.data.path = _numbered(tmp_path / "train.jsonl", 12)
    config.data.eval_path = _numbered(tmp_path / "test.jsonl", 9)
    config.data.cache_dir = str(tmp_path / "built")
    config.data.filter, config.data.limit = "level == 1", 8
    config.data.eval_filter, config.data.eval_limit = "level != 1", 5
    data = _load(config)
    assert [e.answer for e in data.examples[0]] == ["1", "4", "7"]
    assert [p.example.answer for p in data.held_out] == ["0", "2", "3"]
    config.data.eval_filter, config.data.eval_limit = "", 0
    assert len(_load(config).held_out) == 9
    source = {"name": "file", "path": config.data.path, "filter": "level == 2", "limit": 9}
    config.data.filter, config.data.limit = "", 0
    config.data.mixture = {"a": source, "b": {"name": "label_sums"}}
    data = _load(config)
    assert [data.examples[0][n].answer for n in range(3)] == ["2", "5", "8"]
    assert data.reports[0].filtered == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filter": "level >"}, r"data\.filter='level >' cannot be read"),
        ({"eval_filter": "open('x')"}, r"data\.eval_filter=\"open\('x'\)\" is not for filters"),
        ({"streaming": True}, r"data\.streaming takes the first data\.limit rows"),
        ({"limit": -1}, r"data\.limit=-1 must be at least 0"),
    ],
)
def test_rows_that_cannot_be_chosen_are_refused_before_anything_is_read(fields, message):
    config = text_config()
    config.data.name = config.data.eval_name = "gsm8k"
    config.data.options = {}
    for name, value in fields.items():
        config.data[name] = value
    with pytest.raises(ConfigError, match=message):
        checks.check(config)


def test_rows_of_a_generated_dataset_are_not_chosen():
    config = text_config()
    config.data.filter, config.data.eval_limit = "answer == 1", 3
    with pytest.raises(ConfigError) as refused:
        checks.check(config)
    assert "data.filter='answer == 1' chooses rows of files, and label_sums is" in str(
        refused.value
    )
    config.data.filter = ""
    with pytest.raises(ConfigError, match=r"data\.eval_limit=3 chooses rows of files"):
        checks.check(config)


def test_a_mixture_chooses_rows_in_its_sources():
    config = text_config()
    config.data.mixture = {"a": {"name": "file", "path": "x", "filter": "1 +"}}
    with pytest.raises(ConfigError, match=r"data\.mixture\.a\.filter='1 \+' cannot be read"):
        checks.check(config)
    config.data.mixture = {"a": {"name": "file", "path": "x", "streaming": True}}
    with pytest.raises(ConfigError, match=r"set data\.mixture\.a\.limit"):
        checks.check(config)
    config.data.mixture, config.data.limit = {"a": {"name": "file", "path": "x"}}, 3
    with pytest.raises(ConfigError, match=r"data\.limit is of data\.name: with data\.mixture"):
        checks.check(config)


def test_a_model_of_text_is_not_asked_about_images(config):
    config.model.path = "embedded:label_sums"
    with pytest.raises(ConfigError, match=r"data\.name=shapes has problems with images.*Qwen2"):
        _load(config)
    config = text_config()
    config.data.eval_name = "shapes"
    with pytest.raises(ConfigError, match=r"data\.eval_name=shapes has problems with images"):
        _load(config)


def test_a_model_of_text_is_not_asked_about_images_of_a_late_source():
    config = text_config()
    config.data.mixture = {"words": {"name": "label_sums"}, "drawn": {"name": "shapes"}}
    config.data.eval_name, config.data.max_prompt_length = "label_sums", 40
    with pytest.raises(ConfigError, match=r"data\.mixture has problems with images"):
        _load(config)


def test_a_model_that_sees_may_be_asked_in_text(config):
    config.data.name, config.data.eval_name = "shapes", "label_sums"
    assert not any(prompt.images for prompt in _load(config).held_out)


def test_held_out_problems_that_are_not_asked_are_counted(config):
    lengths = [len(prompt.tokens) for prompt in _load(config).held_out]
    config.data.max_prompt_length = sorted(lengths)[3]
    data = _load(config)
    too_long = sum(n > config.data.max_prompt_length for n in lengths)
    assert 0 < too_long < 8
    assert data.refused == {"too_long": too_long}
    assert len(data.held_out) == 8 - too_long
    config.data.max_prompt_length = 3
    with pytest.raises(DataError, match=r"data\.max_prompt_length=3 tokens; the first: .*tokens"):
        _load(config)


def test_held_out_problems_that_one_process_refuses_are_asked_by_none(config, monkeypatch):
    whole = _load(config).held_out
    theirs = prompts.Refusal(whole[2].prompt_id, "timeout", "stopped at its limit")

    def gather(own):
        return [own, [theirs if n == 2 else None for n in range(len(own))]]

    monkeypatch.setattr(processes, "gather", gather)
    data = _load(config)
    assert data.refused == {"timeout": 1}
    asked = [prompt.prompt_id for prompt in data.held_out]
    assert asked == [prompt.prompt_id for n, prompt in enumerate(whole) if n != 2]


def test_an_image_processor_of_another_model_is_refused(config, tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"patch_size": 16}))
    with pytest.raises(ConfigError, match=r"patches of 16 pixels.*takes 14.*belong together"):
        _load(config)


def test_blank_images_are_white_and_of_the_same_size(config):
    seen = _load(config).held_out
    config.data.blank_images = True
    for prompt, blank in zip(seen, _load(config).held_out, strict=True):
        assert [x.grid_thw for x in prompt.images] == [x.grid_thw for x in blank.images]
        assert all((image.pixels == 255).all() for image in blank.images)
        assert (prompt.tokens == blank.tokens).all()


def test_an_export_of_another_architecture_can_be_asked_about_images(config, tmp_path):
    config.model.overrides = {"num_hidden_layers": 1}
    config.data.max_pixels = 6 * 28 * 28  # smaller than most drawings
    run = build(config)
    run.data.close()
    run.scorer.close()
    state = types.SimpleNamespace(params=run.initial_params())
    export_policy(run.config, run.model, state.params, tmp_path / "export")
    # It reads images as the run did, without being told.
    config.model.overrides, config.data.max_pixels = {}, 0
    config.model.path, config.model.random_weights = str(tmp_path / "export"), False
    assert load_model(config).config.num_layers == 1
    assert [x.images[0].sha for x in _load(config).held_out] == [
        x.images[0].sha for x in run.data.held_out
    ]


def test_an_export_has_the_tokenizer_of_the_run(config, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(config.model.path, other, ignore=shutil.ignore_patterns("other"))
    path = other / "tokenizer_config.json"
    stored = json.loads(path.read_text())
    stored["chat_template"] = "other: " + stored["chat_template"]
    path.write_text(json.dumps(stored))
    config.model.tokenizer = str(other)
    run = build(config)
    run.data.close()
    run.scorer.close()
    state = types.SimpleNamespace(params=run.initial_params())
    export_policy(run.config, run.model, state.params, tmp_path / "export")
    exported = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert exported.chat_template == stored["chat_template"]
    assert read_settings(tmp_path / "export") == read_settings(config.model.path)


def test_held_out_images_have_a_folder_of_their_own(config):
    data = config.data
    data.image_dir, data.eval_image_dir = "trained", "held_out"
    assert held_out_place(data)[2] == "trained"
    data.eval_path = "other.parquet"
    assert held_out_place(data) == ("shapes", "other.parquet", "held_out")


def test_another_held_out_dataset_takes_no_place_of_the_training_set(config, tmp_path):
    rows = [{"q": "abcde?", "answer": str(n % 5), "images": []} for n in range(4)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    config.data.name, config.data.path = "file", str(tmp_path / "own.jsonl")
    config.data.problem_column = "q"
    config.data.cache_dir = str(tmp_path / "built")
    config.data.eval_name = "shapes"
    data = _load(config)
    assert (len(data.stream), len(data.held_out)) == (1, 8)
    assert all(prompt.images for prompt in data.held_out)


def _own_file(folder, column):
    rows = [{"problem": "S?", "answer": "R", column: [f"{n}.png"]} for n in range(3)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n in range(3):
        pixels = np.full((28, 56, 3), 80 * n, np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{n}.png")
    return str(folder / "own.jsonl")


@pytest.mark.parametrize("column", ["image", "images", "drawing"])
def test_a_file_of_ones_own_brings_its_images(config, tmp_path, column):
    """Rows with the same question are not merged: they show other images."""
    config.data.name, config.data.path = "file", _own_file(tmp_path, column)
    config.data.cache_dir = str(tmp_path / "built")
    config.data.image_column = "drawing" if column == "drawing" else ""
    data = _load(config)
    assert len(data.stream) == 3
    assert len({prompt.images[0].sha for prompt in data.held_out}) == 3
    config.model.path = "embedded:label_sums"
    with pytest.raises(ConfigError, match=r"data\.name=file has problems with images"):
        _load(config)
