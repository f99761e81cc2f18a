"""A lock in a bucket: one run holds a folder, and a run that was killed loses it.

The lock is an object whose number grows with every holder: `.lock/000007.json`. To take it is to
create the next number, which the server lets only one do. The holder writes its object again every
few seconds. Who finds an object that does not change for the length of the lease takes the next
number; the former holder, if it still lives, sees that at its next beat and stops. Times are taken
on one host only, by its monotonic clock, so clocks of hosts may differ.
"""

import dataclasses
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid

from luspo_jax.hosts.buckets import Bucket, BucketError
from luspo_jax.hosts.files import PlaceError

FOLDER = ".lock"
BEAT_S, LEASE_S = 10.0, 40.0
_LOOK_S = 2.0  # between two looks at another's lock


@dataclasses.dataclass(frozen=True)
class Held:
    """A lock as it stands in the bucket.

    Attributes:
      number: of its object.
      token: of its holder, which no other has.
      host, pid, place: of its holder; `place` tells machines and containers apart.
      since: when it was taken, by the holder's clock, for people.
      beat: how often it was renewed.
      released: whether its holder has left.
    """

    number: int
    token: str
    host: str
    pid: int
    place: str
    since: str
    beat: int = 0
    released: bool = False


def held(bucket: Bucket) -> Held | None:
    """Returns the newest lock of a folder, released or not; None if there never was one."""
    names = [n for n in bucket.entries(FOLDER) if n.removesuffix(".json")[-6:].isdecimal()]
    content = bucket.read(max(names)) if names else None
    if content is None:
        return None
    try:
        return Held(**json.loads(content))
    except (ValueError, TypeError) as error:
        raise BucketError(
            f"{bucket.url}/{max(names)} is no lock of luspo_jax ({error}): if no run uses this "
            "folder, delete that object"
        ) from error


class Lease:
    """Holds a folder of a bucket until it is closed.

    Args:
      bucket: the folder.
      flag: that named it.
      beat_s, lease_s: seconds between renewals, and without one until another may take over.

    Raises:
      PlaceError: another run holds it.
    """

    def __init__(
        self,
        bucket: Bucket,
        *,
        flag: str = "--workdir",
        beat_s: float = BEAT_S,
        lease_s: float = LEASE_S,
    ):
        self._bucket, self._flag, self._beat_s = bucket, flag, beat_s
        self._closed, self._problem, self._one = threading.Event(), "", threading.Lock()
        self._own, self._renewed = self._taken(lease_s), time.monotonic()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Checks that nobody is known to have taken the folder; does not wait.

        Raises:
          PlaceError: another run took it; says which.
        """
        if self._problem:
            raise PlaceError(self._problem)

    def confirm(self) -> None:
        """As `check`, for sure: asks the bucket if this process was suspended or the server away.

        Raises:
          PlaceError: another run took it, or the bucket does not answer.
        """
        if not self._problem and time.monotonic() - self._renewed > 2 * self._beat_s:
            self._look()
        self.check()

    def close(self) -> None:
        """Releases the folder, at once for all."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        if not self._problem:
            self._write(dataclasses.replace(self._own, released=True))

    def _taken(self, lease_s):
        token = uuid.uuid4().hex
        while True:
            other = held(self._bucket)
            if other is not None:
                self._wait_for(other, lease_s)
            own = Held(
                number=1 if other is None else other.number + 1,
                token=token,
                host=socket.gethostname(),
                pid=os.getpid(),
                place=_place(),
                since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            )
            if self._bucket.create(_name(own), _json(own)):
                older = [n for n in self._bucket.entries(FOLDER) if n < _name(own)]
                self._bucket.delete(older)
                return own

    def _wait_for(self, other: Held, lease_s: float) -> None:
        """Returns when the holder has left or shows no life; raises if it lives."""
        if other.released or _is_gone(other):
            return
        sys.stderr.write(
            f"{self._flag}={self._bucket.url} is held by {_who(other)}: waiting up to "
            f"{lease_s:.0f} s to see whether it lives\n"
        )
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < lease_s:
            time.sleep(min(_LOOK_S, lease_s / 4))
            before = time.monotonic()
            now = held(self._bucket)
            if now is None or now.released:
                return
            if now != other:
                raise PlaceError(
                    f"{self._flag}={self._bucket.url} is in use by another run, on {_who(now)}: "
                    "wait for its end"
                )
            if time.monotonic() - before > lease_s / 2:  # the server was away, for the holder too
                quiet_since = time.monotonic()

    def _renew(self):
        while not self._closed.wait(self._beat_s):
            try:
                if self._look():
                    return
            except Exception as error:  # the next beat tries again: writes of the run say more
                sys.stderr.write(f"{self._bucket.url}: the lock is not renewed ({error})\n")

    def _look(self):
        """Renews the lock; returns whether another has it."""
        with self._one:
            self._own = dataclasses.replace(self._own, beat=self._own.beat + 1)
            self._write(self._own)
            other = held(self._bucket)
            if other is None or other.token == self._own.token:
                self._renewed = time.monotonic()
                return False
        self._problem = (
            f"{self._flag}={self._bucket.url} was taken over by {_who(other)}, because this run "
            "gave no sign of life for a while: this one has stopped"
        )
        return True

    def _write(self, own: Held) -> None:
        self._bucket.write(_name(own), _json(own))


def _name(own):
    return f"{FOLDER}/{own.number:06d}.json"


def _json(own: Held) -> bytes:
    return json.dumps(dataclasses.asdict(own)).encode()


def _who(lock: Held) -> str:
    return f"host {lock.host}, pid {lock.pid}, since {lock.since}"


def _place() -> str:
    """Names this machine since its start, and the container, inside which a pid means something."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex  # equals no other


def _is_gone(lock: Held) -> bool:
    """Returns whether the holder was a process of this host that has ended."""
    if (lock.host, lock.place) != (socket.gethostname(), _place()):
        return False
    try:
        os.kill(lock.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return _is_zombie(lock.pid)


def _is_zombie(pid: int) -> bool:
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] == "Z"
