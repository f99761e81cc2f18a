"""A run's folder: one run in it, one process at it, and what its figures depend on."""

import fcntl
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from luspo_jax import config as configuration
from luspo_jax import distributed
from luspo_jax.watchdog import write_atomically

_PACKAGES = ("luspo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


class WorkdirError(Exception):
    """A workdir that this run may not use; the message says why and what to do."""


class Workdir:
    """A run's folder: refused where it holds another run, locked while in use.

    Process 0 alone locks and writes; the others make sure that they see what it wrote. `run.json`
    holds the configuration and everything that figures made from the folder depend on.
    """

    def __init__(self, path: str | os.PathLike, config: ConfigDict, facts: Mapping[str, Any]):
        check_place(path)
        self.path, self._lock = pathlib.Path(path).absolute(), None
        if not distributed.is_writer():
            distributed.barrier("workdir")
            self._check_seen(config)
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise WorkdirError(f"--workdir={self.path} cannot be written: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirError(f"--workdir={self.path} is in use by another process") from None
        self._check_or_write(config, facts)
        distributed.barrier("workdir")

    def close(self) -> None:
        """Lets another process use the folder."""
        if self._lock is not None:
            self._lock.close()

    def _check_seen(self, config):
        try:
            seen = json.loads((self.path / "run.json").read_text())["config"]
        except (OSError, ValueError, KeyError):
            seen = None
        if seen != json.loads(json.dumps(configuration.flat(config))):
            raise WorkdirError(
                f"--workdir={self.path} must be on storage that all processes share: process "
                f"{jax.process_index()} does not see there the run.json that process 0 wrote"
            )

    def _check_or_write(self, config, facts):
        manifest = self.path / "run.json"
        facts = json.loads(json.dumps(facts))  # as they will be read: tuples are lists there
        if manifest.exists():
            try:
                stored = json.loads(manifest.read_text())
                old = stored["config"]
            except (ValueError, KeyError, TypeError) as error:
                raise WorkdirError(
                    f"{manifest} is damaged ({error}): delete it to go on with this configuration, "
                    "or choose another --workdir"
                ) from error
            differences = configuration.changes(old, config)
            differences += [
                f"{name}: {stored.get(name)!r} in the workdir, {value!r} now"
                for name, value in facts.items()
                if stored.get(name) != value
            ]
            if differences:
                raise WorkdirError(
                    f"--workdir={self.path} holds a run with another configuration:\n"
                    + "\n".join(f"  - {line}" for line in differences)
                    + "\nchoose another --workdir, or set these fields back to continue that run"
                )
        elif any(  # other than lock, broken write, and heartbeats
            not p.name.startswith(".") and p.name != "processes" for p in self.path.iterdir()
        ):
            raise WorkdirError(
                f"--workdir={self.path} is not empty and holds no run of luspo_jax: choose another"
            )
        record = {
            "config": configuration.flat(config),
            **facts,
            "packages": package_versions(),
        }
        write_atomically(manifest, json.dumps(record, indent=2, sort_keys=True) + "\n")


def check_place(path: str | os.PathLike) -> None:
    """Refuses a bucket's address, which would become a folder of that name on the local disk.

    Raises:
      WorkdirError: with what to do.
    """
    scheme, found, _ = str(path).partition("://")
    if found:
        raise WorkdirError(
            f"--workdir={path}: a run writes files, renames them and locks them, which {scheme}:// "
            "cannot do: name a folder on a disk or on storage that all hosts mount, and copy it to "
            "the bucket (docs/launch.md)"
        )


def stored_config(workdir: str | os.PathLike) -> ConfigDict:
    """The configuration of the run that a workdir holds.

    Raises:
      WorkdirError: it holds none, or one that this version cannot read.
    """
    manifest = pathlib.Path(workdir) / "run.json"
    if not manifest.is_file():
        raise WorkdirError(f"{workdir} holds no run: there is no {manifest.name} in it")
    stored = json.loads(manifest.read_text())["config"]
    config = configuration.default_config()
    try:
        configuration.assign(config, stored)
    except (KeyError, TypeError, ValueError) as error:
        raise WorkdirError(f"{manifest} does not fit this version: {error}") from error
    return config


def package_versions() -> dict[str, str]:
    """Versions of the packages that a run's numbers may depend on."""
    return {name: _version(name) for name in _PACKAGES}


def check_processes(config: ConfigDict) -> None:
    """Refuses a run whose processes have nothing to do.

    Raises:
      ConfigError: fewer prompts in a step than processes.
    """
    count, prompts_per_step = jax.process_count(), config.rollout.prompts_per_step
    if prompts_per_step < count:
        raise configuration.ConfigError(
            f"rollout.prompts_per_step={prompts_per_step} must be at least the number of "
            f"processes, {count}: each samples responses to its share of the prompts"
        )


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
