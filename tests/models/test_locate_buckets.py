"""Models in buckets: only a model's files come, and messages name the address."""

import json
import pathlib

import pytest

from configs.quickstart import get_config
from luspo_jax.hosts import files
from luspo_jax.models import gguf_folder
from luspo_jax.models.locate import EMBEDDED, architecture, model_folder
from luspo_jax.run.model import load_model
from tests.bucket_cases import bucket_of

MODEL = EMBEDDED / "label_sums"


@pytest.fixture(params=["gs", "s3"])
def bucket(request, bucket_ports, monkeypatch, tmp_path):
    """A model beside other files in a bucket of either kind."""
    bucket = bucket_of(request.param, bucket_ports[request.param], monkeypatch, tmp_path)
    for path in MODEL.iterdir():
        if path.is_file():
            bucket.upload(f"m/{path.name}", path)
    bucket.write("m/optimizer.pt", b"large")
    bucket.write("m/checkpoint-1/config.json", b"{}")
    return bucket


def test_a_model_s_files_and_no_others(bucket):
    folder = model_folder(f"{bucket.url}/m/")
    suffixes = (".json", ".safetensors", ".txt", ".jinja", ".model")
    wanted = {p.name: p.read_bytes() for p in MODEL.iterdir() if p.suffix in suffixes}
    assert "config.json" in wanted
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == wanted
    assert folder.name == "m"


def test_sizes_need_no_weights(bucket):
    assert architecture(f"{bucket.url}/m") == json.loads((MODEL / "config.json").read_text())
    assert not list(files.user_cache().rglob("*.safetensors"))


def test_a_run_reads_model_and_tokenizer_there(bucket):
    config = get_config()
    config.model.path = config.model.tokenizer = f"{bucket.url}/m"
    model = load_model(config)
    config.model.path, config.model.tokenizer = str(MODEL), ""
    assert model.config == load_model(config).config
    config.model.path = f"{bucket.url}/m"
    bucket.write("m/tokenizer.json", b"{")
    bucket.delete(["m/tokenizer_config.json"])
    with pytest.raises(FileNotFoundError, match=f"no tokenizer could be read from {bucket.url}/m "):
        load_model(config)


def test_what_is_no_model(bucket):
    with pytest.raises(FileNotFoundError, match=rf"^{bucket.url}: there is no file.*but m$"):
        model_folder(bucket.url)
    with pytest.raises(FileNotFoundError, match="is one object: name the folder"):
        model_folder(f"{bucket.url}/m/config.json")
    with pytest.raises(FileNotFoundError, match=f"^{bucket.url}/n: there is nothing$"):
        model_folder(f"{bucket.url}/n")


def test_a_gguf_file(bucket, monkeypatch):
    bucket.write("x.gguf", b"GGUF")
    seen = []

    def cached(name):
        seen.append(name)
        return MODEL

    monkeypatch.setattr(gguf_folder, "cached_folder", cached)
    assert model_folder(f"gguf:{bucket.url}/x.gguf") == MODEL
    assert seen[0].endswith("/x.gguf")
    assert pathlib.Path(seen[0]).read_bytes() == b"GGUF"
