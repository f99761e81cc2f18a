"""Our end of another library's turns: a process of its own, which sleeps until it is asked."""

import contextlib
import json
import os
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Peer:
    """A process that answers one line of JSON to each line."""

    def __init__(
        self, name: str, command: Sequence[str], spec: Mapping[str, Any], folder: pathlib.Path
    ):
        """Starts the process and waits until it has loaded its model.

        Args:
          name: of the side.
          command: a python and its arguments; the path of the spec is added.
          spec: what it reads.
          folder: for its files; what it says is in NAME.log.

        Raises:
          RuntimeError: it ended; the message has the last lines that it wrote.
        """
        self.name, self._log = name, folder / f"{name}.log"
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**spec, "scratch": str(folder / name)}), encoding="utf-8")
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment["PYTHONPATH"] = str(ROOT)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, str(path)],
                cwd=folder, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        try:
            self.ready = self._answer()
        except BaseException:
            self.close()
            raise

    @property
    def versions(self) -> dict[str, str]:
        """Returns the versions of its packages."""
        return self.ready["ready"]

    def ask(self, question: object) -> dict[str, Any]:
        """Sends a line and waits for the answer.

        Raises:
          RuntimeError: the process ended.
        """
        with contextlib.suppress(BrokenPipeError):  # the answer tells why
            self._process.stdin.write(f"{question}\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            said = self._log.read_text(errors="replace").splitlines()[-8:]
            raise RuntimeError(f"{self.name} ended: " + "\n".join(said))
        return json.loads(line)
