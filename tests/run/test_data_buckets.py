"""A run's model, data, images and built datasets, all in a bucket."""

import json

import numpy as np
import PIL.Image
import pytest

from configs.quickstart import get_config
from luspo_jax import datasets
from luspo_jax.hosts import files
from luspo_jax.models.locate import EMBEDDED
from luspo_jax.run.data import load_data
from luspo_jax.run.model import load_model
from tests import vl_cases
from tests.bucket_cases import bucket_of


@pytest.fixture
def bucket(bucket_ports, monkeypatch, tmp_path):
    """An empty folder of a bucket."""
    return bucket_of("gs", bucket_ports["gs"], monkeypatch, tmp_path)


def rows(examples, **more):
    made = ({"problem": e.problem, "answer": e.answer} | more for e in examples)
    return "".join(json.dumps(row) + "\n" for row in made).encode()


def test_all_of_a_run_of_text(bucket):
    found, _ = datasets.load("label_sums")
    sums = [found[number] for number in range(70)]
    bucket.write("easy/train.jsonl", rows(sums[:30]))
    bucket.write("hard.jsonl", rows(sums[30:50]))
    bucket.write("held_out.jsonl", rows(sums[60:70]))
    for path in (EMBEDDED / "label_sums").iterdir():
        bucket.upload(f"model/{path.name}", path)
    config = get_config()
    config.model.path = f"{bucket.url}/model"
    config.data.mixture = {
        "easy": {"name": "file", "path": f"{bucket.url}/easy"},
        "hard": {"name": "file", "path": f"{bucket.url}/hard.jsonl", "weight": 2.0},
    }
    config.data.eval_name, config.data.eval_path = "file", f"{bucket.url}/held_out.jsonl"
    config.data.cache_dir = f"{bucket.url}/built"
    data = load_data(config, load_model(config))
    assert [(r.source, r.examples) for r in data.reports] == [
        ("train.jsonl", 30), ("hard.jsonl", 20),
    ]  # fmt: skip
    assert all(len(r.sha256) == 64 for r in (*data.reports, data.held_out_report))
    assert len(data.held_out) == 10
    kept = [name for name in bucket.entries("built") if name.endswith("/report.json")]
    assert len(kept) == 3
    assert not list(files.user_cache().parent.rglob("gs:*"))


def test_images_in_a_folder_of_their_own(bucket, tmp_path):
    vl_cases.write_model(tmp_path)
    shown = np.full((56, 84, 3), 7, np.uint8)
    PIL.Image.fromarray(shown).save(tmp_path / "a.png")
    bucket.upload("pictures/a.png", tmp_path / "a.png")
    example = datasets.load("shapes")[0][0]
    bucket.write("d/train.jsonl", rows([example] * 3, image="a.png"))
    config = vl_cases.config(tmp_path)
    config.data.name, config.data.path, config.data.eval_split = "file", f"{bucket.url}/d", "train"
    config.data.image_dir = f"{bucket.url}/pictures"
    data = load_data(config, load_model(config))
    data.close()
    grids = [image.grid_thw for prompt in data.held_out for image in prompt.images]
    assert [tuple(grid) for grid in grids] == [(1, 4, 6)] * 3
