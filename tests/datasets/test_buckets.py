"""Data in buckets is data on this host; built datasets are kept there for other hosts."""

import json
import threading

import pytest

from luspo_jax import datasets
from luspo_jax.datasets import DataError, store
from luspo_jax.datasets.demonstrations import Columns, read_demonstrations
from luspo_jax.datasets.images import ImageFiles
from luspo_jax.hosts import files
from luspo_jax.hosts.buckets import Bucket, BucketError
from luspo_jax.images.record import ImageError
from tests.bucket_cases import bucket_of

ROWS = [{"problem": f"{n} + 1?", "answer": str(n + 1)} for n in range(70)]


@pytest.fixture(params=["gs", "s3"])
def bucket(request, bucket_ports, monkeypatch, tmp_path):
    """An empty folder of a bucket of either kind."""
    return bucket_of(request.param, bucket_ports[request.param], monkeypatch, tmp_path)


@pytest.fixture
def gs(bucket_ports, monkeypatch, tmp_path):
    """An empty folder of one kind, where both do the same."""
    return bucket_of("gs", bucket_ports["gs"], monkeypatch, tmp_path)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def elsewhere(monkeypatch, tmp_path, name):
    """Moves to a host with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))


def test_a_file_and_a_folder_are_read_as_local_ones(bucket, tmp_path):
    bucket.write("d/train.jsonl", lines(ROWS))
    bucket.write("d/other.jsonl", b"no rows")
    (tmp_path / "train.jsonl").write_bytes(lines(ROWS))
    local, report = datasets.load("file", tmp_path / "train.jsonl", data_dir=tmp_path / "built")
    for path in (f"{bucket.url}/d/train.jsonl", f"{bucket.url}/d"):
        examples, known = datasets.load("file", path)
        assert list(examples) == list(local)
        assert known == report  # what run.json records, the sum of the file included
    assert not list((files.user_cache() / "buckets").rglob("other.jsonl"))
    assert datasets.image_source("file", f"{bucket.url}/d").name == "train.jsonl"


def test_a_file_that_changed_is_another_dataset(bucket):
    bucket.write("x.jsonl", lines(ROWS[:1]))
    assert len(datasets.load("file", f"{bucket.url}/x.jsonl")[0]) == 1
    bucket.write("x.jsonl", lines(ROWS[:2]))
    assert len(datasets.load("file", f"{bucket.url}/x.jsonl")[0]) == 2


def test_errors_name_the_address(gs):
    gs.write("x.jsonl", lines([*ROWS[:2], {"problem": "?"}]))
    with pytest.raises(DataError, match=rf"^{gs.url}/x.jsonl, row 3: "):
        datasets.load("file", f"{gs.url}/x.jsonl")
    gs.write("d/test.jsonl", lines(ROWS))
    for path, says in (("d", r"but test\.jsonl; need one file train\.\*"), ("e", "is nothing")):
        with pytest.raises(DataError, match=f"^{gs.url}/{path}: .*{says}"):
            datasets.load("file", f"{gs.url}/{path}")
    with pytest.raises(DataError, match=rf"^{gs.url}/x.jsonl: 3 rows .*prompt"):
        read_demonstrations(f"{gs.url}/x.jsonl", Columns())
    with pytest.raises(DataError, match=f"^{gs.url}/d: .*need one file train"):
        read_demonstrations(f"{gs.url}/d", Columns())


def test_demonstrations(bucket):
    bucket.write("x.jsonl", lines({"prompt": r["problem"], "response": r["answer"]} for r in ROWS))
    examples, report = read_demonstrations(f"{bucket.url}/x.jsonl", Columns())
    assert [(e.problem, e.answer) for e in examples] == [tuple(row.values()) for row in ROWS]
    assert (report.source, len(report.sha256)) == ("x.jsonl", 64)


def test_folders_of_problems_come_whole(gs):
    gs.write("d/train.jsonl", b"")
    gs.write("d/images/1.png", b"png")
    wanted = next(n for n, entry in datasets.DATASETS.items() if getattr(entry, "folder", ""))
    with pytest.raises(DataError):  # it is none, but all of it was looked at
        datasets.load(wanted, f"{gs.url}/d")
    assert list((files.user_cache() / "buckets").rglob("1.png"))


def test_images_beside_a_file_in_a_bucket_need_their_folder(gs):
    gs.write("d/train.jsonl", lines([{**ROWS[0], "image": "a.png"}]))
    gs.write("d/a.png", b"png")
    examples, _ = datasets.load("file", f"{gs.url}/d")
    source = datasets.image_source("file", f"{gs.url}/d")
    with pytest.raises(ImageError, match="name the folder of the images"):
        ImageFiles(source).images(examples[0])[0].read()


def test_what_one_host_builds_another_downloads(bucket, tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes(lines(ROWS))
    kept = f"{bucket.url}/built/"
    built, report = datasets.load("file", tmp_path / "x.jsonl", data_dir=kept)
    names = list(Bucket(f"{bucket.url}/built").entries())
    assert sum(name.endswith("/report.json") for name in names) == 1
    assert any(".array_record" in name for name in names)
    elsewhere(monkeypatch, tmp_path, "other")
    monkeypatch.setattr(store, "_build", lambda *_: pytest.fail("built twice"))
    again, same = datasets.load("file", tmp_path / "x.jsonl", data_dir=kept)
    assert list(again) == list(built)
    assert same == report


def test_what_this_host_has_is_kept_too(gs, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines(ROWS))
    datasets.load("file", tmp_path / "x.jsonl")
    datasets.load("file", tmp_path / "x.jsonl", data_dir=f"{gs.url}/built")
    assert any(name.endswith("/report.json") for name in gs.entries("built"))


def test_the_report_comes_last_and_half_an_upload_is_none(gs, tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes(lines(ROWS))
    sent, plain = [], Bucket.upload

    def upload(self, name, path):
        if len(sent) == 2:
            raise BucketError("the server is gone")
        sent.append(name)
        plain(self, name, path)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "upload", upload)
        with pytest.raises(BucketError, match="gone"):
            datasets.load("file", tmp_path / "x.jsonl", data_dir=gs.url)
    assert "report.json" not in sent
    elsewhere(monkeypatch, tmp_path, "other")
    examples, _ = datasets.load("file", tmp_path / "x.jsonl", data_dir=gs.url)
    assert len(examples) == len(ROWS)
    assert sum(name.endswith("/report.json") for name in gs.entries()) == 1


def test_a_damaged_copy_is_built_and_kept_anew(gs, tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes(lines(ROWS))
    datasets.load("file", tmp_path / "x.jsonl", data_dir=gs.url)
    record = next(name for name in gs.entries() if ".array_record" in name)
    whole = gs.read(record)
    gs.write(record, b"half")
    elsewhere(monkeypatch, tmp_path, "other")
    examples, _ = datasets.load("file", tmp_path / "x.jsonl", data_dir=gs.url)
    assert len(examples) == len(ROWS)
    assert gs.entries()[record].size == len(whole)


def test_two_hosts_at_once_do_no_harm(bucket, tmp_path):
    both = threading.Barrier(2, timeout=60)
    errors = []

    def read(_scratch):
        both.wait()  # neither finds what the other built
        encoded = (json.dumps([r["problem"], r["answer"], {}]).encode() for r in ROWS)
        return encoded, datasets.Report("file", "x", "0", len(ROWS), len(ROWS))

    def host(name):
        try:
            store.build_once(tmp_path / name / "key", read, kept=bucket)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=host, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    examples, _ = store.build_once(
        tmp_path / "c" / "key", lambda _: pytest.fail("built again"), kept=bucket
    )
    assert [e.problem for e in examples] == [row["problem"] for row in ROWS]
