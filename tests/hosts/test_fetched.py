"""What is in a bucket as files of this host: once, again when it changes, and never by halves."""

import pathlib
import subprocess
import sys
import threading

import pytest

from luspo_jax.hosts import buckets, fetched, files
from luspo_jax.hosts.buckets import Bucket, BucketError
from tests.bucket_cases import bucket_of
from tests.bucket_servers import Gate

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(params=["gs", "s3"])
def bucket(request, bucket_ports, monkeypatch, tmp_path):
    """An empty folder of a bucket of either kind."""
    return bucket_of(request.param, bucket_ports[request.param], monkeypatch, tmp_path)


@pytest.fixture
def counted(monkeypatch):
    """Names of the objects that are downloaded."""
    names, plain = [], Bucket.download

    def download(self, name, path):
        names.append(name)
        plain(self, name, path)

    monkeypatch.setattr(Bucket, "download", download)
    return names


def test_a_file_is_downloaded_once_and_again_when_it_changes(bucket, counted):
    bucket.write("data/rows.jsonl", b"one\n")
    bucket.write("data/rows.jsonl.old", b"other\n")
    first = fetched.place(f"{bucket.url}/data/rows.jsonl")
    assert (first.name, first.read_bytes()) == ("rows.jsonl", b"one\n")
    assert first.is_relative_to(files.user_cache())
    assert fetched.place(f"{bucket.url}/data/rows.jsonl") == first
    assert counted == ["rows.jsonl"]
    bucket.write("data/rows.jsonl", b"two\n")
    second = fetched.place(f"{bucket.url}/data/rows.jsonl")
    assert (second.read_bytes(), len(counted)) == (b"two\n", 2)
    assert first.read_bytes() == b"one\n"  # whoever reads it still can


def test_of_a_folder_what_is_wanted_and_only_what_changed(bucket, counted):
    for name in ("config.json", "model.safetensors", "optimizer.bin", "sub/x.json"):
        bucket.write(f"m/{name}", name.encode())
    bucket.write("m/empty.json", b"")
    bucket.write("m2/config.json", b"of another")

    def wanted(name):
        return name.endswith((".json", ".safetensors"))

    folder = fetched.place(f"{bucket.url}/m/", wanted)
    assert folder.name == "m"
    there = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert there == ["config.json", "empty.json", "model.safetensors", "sub/x.json"]
    assert (folder / "config.json").read_bytes() == b"config.json"
    assert (folder / "empty.json").read_bytes() == b""
    assert len(counted) == 4
    bucket.write("m/config.json", b"changed")
    again = fetched.place(f"{bucket.url}/m", wanted)
    assert counted[4:] == ["config.json"]
    assert (again / "config.json").read_bytes() == b"changed"
    assert (again / "model.safetensors").read_bytes() == b"model.safetensors"
    assert (folder / "config.json").read_bytes() == b"config.json"
    bucket.write("m/optimizer.bin", b"changed too")  # not wanted, so nothing is new
    assert fetched.place(f"{bucket.url}/m", wanted) == again


def test_an_interrupted_download_leaves_nothing_that_looks_complete(bucket, counted, monkeypatch):
    for number in range(3):
        bucket.write(f"m/{number}", b"x" * (number + 1))
    whole = Bucket.download

    def interrupted(self, name, path):
        if name == "2":
            raise KeyboardInterrupt
        whole(self, name, path)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "download", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetched.place(f"{bucket.url}/m")
    cache = files.user_cache()
    assert not [p for p in cache.rglob("m") if not p.parent.name.startswith(".")]
    folder = fetched.place(f"{bucket.url}/m")
    assert sorted(p.name for p in folder.iterdir()) == ["0", "1", "2"]
    assert sorted(counted) == ["0", "1", "2"]  # what was there stayed


def test_what_changes_meanwhile_is_downloaded_again(bucket, monkeypatch):
    bucket.write("m/a", b"old a")
    bucket.write("m/b", b"old b")
    plain, changed = Bucket.download, []

    def download(self, name, path):
        plain(self, name, path)
        if name == "a" and not changed:
            changed.append(name)
            self.write("a", b"new a")

    monkeypatch.setattr(Bucket, "download", download)
    folder = fetched.place(f"{bucket.url}/m")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"a": b"new a", "b": b"old b"}

    def restless(self, name, path):
        plain(self, name, path)
        changed.append(name)
        self.write(name, f"{len(changed)}".encode())

    monkeypatch.setattr(Bucket, "download", restless)
    bucket.write("other", b"0")
    with pytest.raises(BucketError, match="changes while it is read"):
        fetched.place(f"{bucket.url}/other")


def test_several_at_once_download_once(bucket, counted):
    bucket.write("m/a", b"a")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetched.place(f"{bucket.url}/m")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(found)), counted) == (4, 1, ["a"])


def test_what_is_not_there(bucket):
    with pytest.raises(FileNotFoundError, match="there is nothing"):
        fetched.place(f"{bucket.url}/m")
    bucket.write("m/a/b", b"")
    bucket.write("m/c", b"")
    with pytest.raises(FileNotFoundError, match="no file that is needed, but a, c"):
        fetched.place(f"{bucket.url}/m", lambda name: False)
    with pytest.raises(BucketError, match=r"does the bucket \w+://not-there exist\?"):
        fetched.place(f"{bucket.url.split(':')[0]}://not-there/m")


def test_an_object_named_out_of_its_folder_is_refused(monkeypatch):
    entry = buckets.Entry(1, 0.0, "x")
    monkeypatch.setattr(Bucket, "__init__", lambda self, url: setattr(self, "url", url))
    for name in ("../../evil", "a//b", "./a"):
        monkeypatch.setattr(Bucket, "entries", lambda *_, name=name: {f"m/{name}": entry})
        with pytest.raises(BucketError, match="cannot be the name of a file"):
            fetched.place("gs://b/m")


def test_a_forbidden_bucket_is_one_line(bucket_ports, monkeypatch, tmp_path):
    with Gate() as gate:
        gate.target = bucket_ports["gs"]
        bucket = bucket_of("gs", gate.port, monkeypatch, tmp_path)
        gate.answer = lambda method, path: 403
        with pytest.raises(BucketError, match="no permission to list") as raised:
            fetched.place(f"{bucket.url}/m")
        assert "\n" not in str(raised.value)


def test_a_copy_of_a_run_follows_it(bucket, counted):
    bucket.write("run.json", b"{}")
    bucket.write("metrics.jsonl", b"1\n")
    copy = fetched.RunCopy(bucket.url)
    copy.fetch("run.json", "metrics.jsonl", "absent.json")
    assert copy.folder.name == bucket.url.rpartition("/")[2]
    assert (copy.folder / "metrics.jsonl").read_bytes() == b"1\n"
    bucket.write("metrics.jsonl", b"1\n2\n")
    bucket.delete(["run.json"])
    copy = fetched.RunCopy(bucket.url)
    copy.fetch("run.json", "metrics.jsonl")
    assert [p.name for p in copy.folder.iterdir()] == ["metrics.jsonl"]
    assert (copy.folder / "metrics.jsonl").read_bytes() == b"1\n2\n"
    copy.fetch("metrics.jsonl")
    assert counted == ["run.json", "metrics.jsonl", "metrics.jsonl"]
    bucket.delete(["metrics.jsonl"])
    with pytest.raises(FileNotFoundError, match="there is nothing"):
        fetched.RunCopy(bucket.url)


def test_messages_name_addresses(bucket):
    bucket.write("rows.jsonl", b"")
    path = fetched.place(f"{bucket.url}/rows.jsonl")
    assert fetched.is_fetched(path)
    assert not fetched.is_fetched(path.parent)
    assert fetched.shown(f"{path}, row 3: bad") == f"{bucket.url}/rows.jsonl, row 3: bad"
    with pytest.raises(ValueError, match=f"^{bucket.url}/rows.jsonl: bad$"), fetched.addressed():
        raise ValueError(f"{path}: bad")


def test_a_local_path_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetched.local("~/x") == tmp_path / "x"
    assert not (tmp_path / "x").exists()


def test_of_local_paths_nothing_is_imported_that_reads_buckets(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    code = (
        "import pathlib, sys\n"
        "from experiments import cluster, command, status\n"
        "from experiments.progress import watching\n"
        "from luspo_jax import datasets\n"
        "from luspo_jax.models import locate\n"
        "from luspo_jax.run import data, place, workdir\n"
        f"folder = {str(tmp_path)!r}\n"
        "datasets.load('file', folder + '/rows.jsonl', data_dir=folder + '/built')\n"
        "locate.model_folder(folder), locate.model_folder('embedded:label_sums')\n"
        "watching.show([folder])\n"
        "place.Place(folder).top()\n"
        "print(sorted({'fsspec', 'gcsfs', 's3fs', 'aiohttp', 'boto3'} & set(sys.modules)))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.stdout.splitlines()[-1:] == ["[]"], ran.stderr
