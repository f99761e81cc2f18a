"""Buckets through real servers on this machine, and through a gate that fails as networks do."""

import asyncio
import concurrent.futures
import subprocess
import sys
import time
import types

import aiohttp
import gcsfs
import pytest
from etils import epath

from luspo_jax.hosts import buckets
from luspo_jax.hosts.buckets import Bucket, BucketError, is_bucket
from tests.bucket_servers import BUCKET, Gate, connect


@pytest.fixture(params=["gs", "s3"])
def bucket(request, bucket_ports, monkeypatch, tmp_path):
    """An empty folder of a bucket of either kind."""
    connect(monkeypatch, request.param, bucket_ports[request.param])
    return Bucket(f"{request.param}://{BUCKET}/{tmp_path.name}")


@pytest.fixture
def gated(bucket_ports, monkeypatch, tmp_path):
    """A folder of gs:// behind a gate."""
    with Gate() as gate:
        gate.target = bucket_ports["gs"]
        connect(monkeypatch, "gs", gate.port)
        monkeypatch.setitem(buckets._patience, "seconds", 20.0)
        # gcsfs itself tries six times, with pauses of up to 32 s.
        quick = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / 50))
        monkeypatch.setattr(gcsfs.retry, "asyncio", quick)
        yield Bucket(f"gs://{BUCKET}/{tmp_path.name}"), gate


def test_what_is_an_address():
    assert all(map(is_bucket, ("gs://b/x", "s3://b")))
    assert not any(map(is_bucket, ("/gs/b", "b/gs:", "b")))
    for path, says in (("az://b/x", "az:// is not known"), ("gs://", "names no bucket")):
        with pytest.raises(BucketError, match=says):
            is_bucket(path)


def test_objects_are_written_listed_read_and_deleted(bucket, tmp_path):
    assert bucket.entries() == {}
    assert bucket.read("a") is None
    bucket.write("a", b"1")
    bucket.write("b/c.txt", b"22")
    bucket.write("bb", b"")
    found = bucket.entries()
    assert {name: entry.size for name, entry in found.items()} == {"a": 1, "b/c.txt": 2, "bb": 0}
    assert set(bucket.entries("b")) == {"b/c.txt"}
    assert all(abs(entry.written - time.time()) < 60 for entry in found.values())
    bucket.write("a", b"3")
    assert bucket.read("a") == b"3"
    assert bucket.entries()["a"].tag != found["a"].tag
    assert bucket.entries()["bb"].tag == found["bb"].tag
    bucket.download("b/c.txt", tmp_path / "deep" / "c")
    assert (tmp_path / "deep" / "c").read_bytes() == b"22"
    bucket.delete(["a", "never"])
    assert set(bucket.entries()) == {"b/c.txt", "bb"}


def test_of_many_that_create_an_object_one_succeeds(bucket):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        won = list(pool.map(lambda i: bucket.create("lock", b"%d" % i), range(6)))
    assert sum(won) == 1
    assert bucket.read("lock") == b"%d" % won.index(True)
    assert bucket.create("lock", b"%d" % won.index(True))  # a retry after a lost answer
    assert not bucket.create("lock", b"other")


def test_files_are_uploaded_and_only_whole_lines(bucket, tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b"')
    bucket.upload("m.jsonl", path)
    assert bucket.read("m.jsonl") == b'{"a": 1}\n'
    monkeypatch.setattr(buckets, "_WHOLE", 10)  # larger files go in pieces
    (tmp_path / "large").write_bytes(bytes(range(256)) * 4)
    bucket.upload("large", tmp_path / "large")
    assert bucket.read("large") == bytes(range(256)) * 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_throttles_or_fails_is_tried_again(gated, status):
    bucket, gate = gated
    failures = iter([status] * 3)
    gate.answer = lambda method, path: next(failures, None)
    bucket.write("a", b"1")
    assert next(failures, None) is None
    assert bucket.read("a") == b"1"


def test_open_files_wait_as_well(gated):
    """By which Orbax writes what is not an array."""
    bucket, gate = gated
    gate.open = False
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        written = pool.submit(epath.Path(f"{bucket.url}/a").write_text, "1")
        time.sleep(3.0)  # gcsfs alone has given up: here it sleeps a fiftieth
        assert not written.done()
        gate.open = True
        written.result(60)
    assert bucket.read("a") == b"1"


def test_a_server_that_is_gone_for_a_while_is_waited_for(gated, capsys, monkeypatch):
    bucket, gate = gated
    monkeypatch.setattr(buckets, "_SAY_AFTER_S", 0.1)
    gate.open = False
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        written = pool.submit(bucket.write, "a", b"1")
        time.sleep(2.0)
        assert not written.done()
        gate.open = True
        written.result(60)
    assert bucket.read("a") == b"1"


def test_a_server_that_stays_away_is_named(gated, monkeypatch):
    bucket, gate = gated
    monkeypatch.setitem(buckets._patience, "seconds", 0.1)
    gate.open = False
    with pytest.raises(BucketError, match=f"{bucket.url} does not answer .*: check the network"):
        bucket.read("a")


def test_a_refusal_is_one_line_at_once(gated):
    bucket, gate = gated
    gate.answer = lambda method, path: 403
    for verb, call in (
        ("write", lambda: bucket.write("a", b"1")),
        ("read", lambda: bucket.read("a")),
        ("list", lambda: bucket.entries()),
    ):
        began = time.monotonic()
        with pytest.raises(BucketError) as error:
            call()
        assert time.monotonic() - began < 5
        text = str(error.value)
        assert text.startswith(f"{bucket.url}: no permission to {verb} there")
        assert "\n" not in text
        assert "give this account the right" in text


def test_a_bucket_that_does_not_exist_is_named(bucket):
    other = Bucket(bucket.url.replace(BUCKET, "absent"))
    with pytest.raises(BucketError, match=r"absent.*: not found .*does the bucket .*absent exist"):
        other.write("a", b"1")


def test_what_passes_and_what_does_not():
    from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
    from gcsfs.retry import HttpError
    from google.auth.exceptions import RefreshError, TransportError

    def of_s3(status, code):
        found = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        return ClientError(found, "PutObject")

    wrapped = OSError("no")
    wrapped.__cause__ = of_s3(503, "SlowDown")
    passing = [
        ConnectionResetError(), TimeoutError(), aiohttp.ServerDisconnectedError(), wrapped,
        EndpointConnectionError(endpoint_url="x"), of_s3(500, "InternalError"),
        of_s3(400, "RequestTimeout"), HttpError({"code": 429}), HttpError({"code": "503"}),
        TransportError("metadata server"), ValueError("UNAVAILABLE: connection"),
    ]  # fmt: skip
    staying = [
        FileNotFoundError("a"), PermissionError("a"), HttpError({"code": 403}), ValueError("a"),
        of_s3(403, "AccessDenied"), of_s3(404, "NoSuchBucket"), NoCredentialsError(),
        RefreshError("expired"), FileExistsError("a"),
    ]  # fmt: skip
    assert [error for error in passing if not buckets.is_passing(error)] == []
    assert [error for error in staying if buckets.is_passing(error)] == []


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
def test_a_missing_package_is_one_line(scheme, package):
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "from luspo_jax.hosts.buckets import Bucket, BucketError\n"
        f"try: Bucket('{scheme}://b/x')\n"
        "except BucketError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"needs the package {package}, which is not installed: pip install" in out.stdout
