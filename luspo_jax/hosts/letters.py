"""Messages from guard to guard: a worker that is killed writes nothing, but its guard lives.

One connection carries one message, a line of JSON behind its HMAC-SHA256 under the secret of the
run. A guard believes nothing else, whoever connects to its port.
"""

import contextlib
import hashlib
import hmac
import json
import queue
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any

Address = tuple[str, int]
_LARGEST = 1 << 16  # bytes of a message
_PATIENCE_S = 2.0  # with one who connects and says nothing
_AT_ONCE = 64  # connections that are read
_MOST = 4096  # letters, and connections, that wait


class Box:
    """Where messages to this guard arrive: a port of the system's choice, on all interfaces."""

    def __init__(self):
        self._arrived: queue.Queue[bytes] = queue.Queue(_MOST)
        self._places = threading.BoundedSemaphore(_AT_ONCE)
        self._server = _server()
        self.port: int = self._server.getsockname()[1]
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="letters", daemon=True)
        self._thread.start()

    def read(self, secret: str) -> list[dict[str, Any]]:
        """Returns the messages that have arrived since, without those of strangers."""
        messages = []
        with contextlib.suppress(queue.Empty):
            while True:
                messages.append(opened(self._arrived.get_nowait(), secret))
        return [message for message in messages if message is not None]

    def close(self) -> None:
        """Frees the port."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._server.close()

    def _accept(self):
        while not self._closed:
            try:
                connection, _ = self._server.accept()
            except OSError:
                time.sleep(0.1)  # no descriptor is free, say
                continue
            self._places.acquire()  # others wait in the queue of the port
            threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _receive(self, connection):
        until, received = time.monotonic() + _PATIENCE_S, b""
        try:
            while len(received) <= _LARGEST and (left := until - time.monotonic()) > 0:
                connection.settimeout(left)
                if not (part := connection.recv(_LARGEST)):
                    self._arrived.put_nowait(received)
                    return
                received += part
        except (OSError, queue.Full):
            pass  # it went away, or strangers have filled the box
        finally:
            connection.close()
            self._places.release()


def sealed(message: dict[str, Any], secret: str) -> bytes:
    """Returns a message as it travels."""
    text = json.dumps(message).encode()
    return _seal(text, secret) + b" " + text


def opened(received: bytes, secret: str) -> dict[str, Any] | None:
    """Returns the message; None if it does not come from a process of this run."""
    seal, _, text = received.partition(b" ")
    return json.loads(text) if hmac.compare_digest(seal, _seal(text, secret)) else None


def send(addresses: Iterable[Address], letter: bytes, within_s: float) -> None:
    """Sends a letter to all at once, and waits so long at most; who cannot be reached is left out.

    Args:
      addresses: of the guards.
      letter: from `sealed`.
      within_s: 0 waits for nobody, and the letters travel on.
    """
    until = time.monotonic() + within_s
    senders = [
        threading.Thread(target=_send, args=(address, letter), daemon=True) for address in addresses
    ]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(max(0.0, until - time.monotonic()))


def host_towards(place: str) -> str:
    """Returns where others reach this host: the address from which it reaches HOST:PORT.

    Nothing is sent. If it is this very host, the others reach it by the name they know.
    """
    host, _, port = place.rpartition(":")
    host = host.strip("[]")
    try:
        family, kind, _, _, there = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(there)
            found = probe.getsockname()[0]
    except (OSError, ValueError):
        return socket.gethostname()
    return host if found.startswith("127.") or found == "::1" else found


def _send(address, letter):
    with (
        contextlib.suppress(OSError),
        socket.create_connection(tuple(address), timeout=_PATIENCE_S) as connection,
    ):
        connection.sendall(letter)


def _seal(text, secret):
    return hmac.new(secret.encode(), text, hashlib.sha256).hexdigest().encode()


def _server():
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # a host without IPv6
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_MOST
            )
    return socket.create_server(("", 0), backlog=_MOST)
