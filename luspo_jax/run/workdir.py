"""A run's folder: it holds one run, serves one process, and records what figures depend on."""

import importlib.metadata
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from luspo_jax.hosts import files, processes
from luspo_jax.hosts.files import PlaceError
from luspo_jax.hosts.roles import Roles
from luspo_jax.hosts.values import ConfigError
from luspo_jax.metrics import read_metrics
from luspo_jax.run import fields
from luspo_jax.run.settings import Config, kind_of

_PACKAGES = ("luspo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
_NOTE = ".checkpointed"  # step of the last checkpoint written


class WorkdirError(PlaceError):
    """A workdir that this run may not use; the message says why and what to do."""


class Workdir:
    """A run's folder: refused if it holds another run, locked while in use.

    Only process 0 locks and writes; the others check that they see what it wrote. `run.json`
    contains the configuration and everything that the folder's figures depend on.

    Args:
      path: of the folder.
      config: of the run.
      facts: what its numbers depend on besides the configuration.
      fork: the run and step that a new run starts from; an existing run keeps its own.

    Attributes:
      path: of the folder.
      forked_from: the fork recorded in run.json; None for a run that is not a fork.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config: ConfigDict,
        facts: Mapping[str, Any],
        *,
        fork: Mapping[str, Any] | None = None,
    ):
        check_place(path)
        self.path, self._lock, self.forked_from = pathlib.Path(path).absolute(), None, fork
        if not processes.is_writer():
            processes.barrier("workdir")
            self._check_seen(config)
            return
        self._check_own()
        self._lock = files.take_lock(self.path)
        try:
            self._check_or_write(config, facts)
            self._check_kept()
        except BaseException:
            self.close()
            raise
        processes.barrier("workdir")

    def close(self) -> None:
        """Releases the folder to other processes."""
        if self._lock is not None:
            self._lock.close()

    def check_there(self) -> None:
        """Checks that the folder was not deleted, moved or replaced while in use.

        Raises:
          WorkdirError: it was; says what is lost.
        """
        if self._lock is None:
            return
        try:
            same = os.path.samestat(os.fstat(self._lock.fileno()), (self.path / ".lock").stat())
        except OSError:
            same = False
        if not same:
            raise WorkdirError(
                f"--workdir={self.path} was deleted or moved while this run was using it: the run "
                "has stopped, and what it had written there is lost unless it was moved. Put the "
                "folder back to continue from its last checkpoint, or start over in a new one"
            )

    def note_checkpoint(self, step: int) -> None:
        """Records that a checkpoint was written, to tell a run that lost its checkpoints from one
        that was stopped before its first."""
        if self._lock is not None:
            files.write_text(self.path / _NOTE, f"{step}\n")

    def _check_kept(self):
        """Refuses to start over a run that has lost its checkpoints."""
        folder, note, metrics = (self.path / n for n in ("checkpoints", _NOTE, "metrics.jsonl"))
        lost = note.exists() and not list(checkpoints(self.path))
        if not metrics.exists() or not (lost or not folder.is_dir()):
            return
        last = max((row["step"] for row in read_metrics(metrics)), default=0)
        if last > (self.forked_from or {"step": 0})["step"]:
            raise WorkdirError(
                f"--workdir={self.path} holds metrics of {last} steps, but its checkpoints are "
                f"gone, so it cannot go on: put {folder} back, or choose another --workdir; to "
                f"start over in this one, first move {metrics.name} and rollouts/ away"
            )

    def _check_seen(self, config):
        try:
            stored = read_manifest(self.path)
            seen, self.forked_from = stored["config"], stored.get("forked_from")
        except WorkdirError:
            seen = None
        if seen != json.loads(json.dumps(fields.flat(config))):
            raise WorkdirError(
                f"--workdir={self.path} must be on storage that all processes share: process "
                f"{jax.process_index()} does not see there the run.json that process 0 wrote"
            )

    def _check_own(self):
        """Refuses a folder with other contents before anything is written into it."""
        if (self.path / "run.json").exists() or any(checkpoints(self.path)):
            return
        # Names besides the lock, broken writes and heartbeats.
        others = [p for p in self.path.glob("*") if not p.name.startswith(".")]
        if any(p.name != "processes" for p in others):
            raise WorkdirError(
                f"--workdir={self.path} is not empty and holds no run of luspo_jax: choose another"
            )

    def _check_or_write(self, config, facts):
        manifest = self.path / "run.json"
        facts = json.loads(json.dumps(facts))  # as they will be read: tuples become lists
        if manifest.exists():
            stored = read_manifest(self.path)
            self.forked_from = stored.get("forked_from")
            differences = [
                f"{name}: {old!r} in the workdir, {new!r} now"
                for name, (old, new) in fields.changes(stored["config"], config).items()
            ]
            differences += [
                f"{name}: {stored.get(name)!r} in the workdir, {value!r} now"
                for name, value in facts.items()
                if stored.get(name) != value
            ]
            if differences:
                raise WorkdirError(
                    f"--workdir={self.path} holds a run with another configuration:\n"
                    + "\n".join(f"  - {line}" for line in differences)
                    + "\nset these fields back to continue that run, or choose another --workdir "
                    "(with --fork, to begin where that run stands)"
                )
        record = {
            "config": fields.flat(config),
            **facts,
            "packages": package_versions(),
            **({"forked_from": self.forked_from} if self.forked_from else {}),
        }
        files.write_text(manifest, json.dumps(record, indent=2, sort_keys=True) + "\n")


def check_place(path: str | os.PathLike) -> None:
    """Refuses a bucket's address, which would become a local folder of that name.

    Raises:
      WorkdirError: with the remedy.
    """
    scheme, found, _ = str(path).partition("://")
    if found:
        raise WorkdirError(
            f"--workdir={path}: a run writes files, renames them and locks them, which {scheme}:// "
            "cannot do: name a folder on a disk or on storage that all hosts mount, and copy it to "
            "the bucket (docs/launch.md)"
        )


def stored_config(workdir: str | os.PathLike) -> ConfigDict:
    """Returns the configuration of the run in a workdir.

    Raises:
      WorkdirError: there is none, or this version cannot read it.
    """
    stored = read_manifest(workdir)
    config = fields.default_config(kind_of(stored["config"]))
    try:
        fields.assign(config, stored["config"])
    except (KeyError, TypeError, ValueError) as error:
        manifest = pathlib.Path(workdir) / "run.json"
        raise WorkdirError(f"{manifest} does not fit this version: {error}") from error
    return config


def read_manifest(workdir: str | os.PathLike) -> dict[str, Any]:
    """Reads run.json of a workdir.

    Raises:
      WorkdirError: it is missing or damaged; with the remedy.
    """
    manifest = pathlib.Path(workdir) / "run.json"
    if not manifest.is_file():
        raise WorkdirError(f"{workdir} holds no run: there is no {manifest.name} in it")
    try:
        stored = json.loads(manifest.read_text(encoding="utf-8"))
        dict(stored["config"])
    except (ValueError, KeyError, TypeError) as error:
        last = max(checkpoints(workdir), default=None)
        raise WorkdirError(
            f"{manifest} is damaged ({error}): "
            + (
                "restore it from a copy, or choose another --workdir: there is no checkpoint yet"
                if last is None
                else "delete it and train with the run's own --config and --workdir, which goes on "
                f"from checkpoint {last} and writes it again"
            )
        ) from error
    return stored


def checkpoints(workdir: str | os.PathLike) -> Iterator[int]:
    """Yields the steps of the finished checkpoints in a workdir."""
    for path in (pathlib.Path(workdir) / "checkpoints").glob("*"):
        if path.name.isdecimal() and (path / "host").is_dir() and (path / "state").is_dir():
            yield int(path.name)


def fork(
    workdir: str | os.PathLike,
    parent: str | os.PathLike,
    step: int | None,
    config: ConfigDict,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the run.json record of a run that starts from another run's checkpoint.

    Args:
      workdir: of the new run; a run that it already holds must have started the same way.
      parent: workdir of the other run.
      step: of the checkpoint; None for the latest, or the one that an existing run started from.
      config: of the new run.
      facts: of the new run.

    Raises:
      WorkdirError: the folder holds another run, or the parent has no such checkpoint.
    """
    parent = pathlib.Path(parent).absolute()
    if (pathlib.Path(workdir) / "run.json").is_file():
        stored = read_manifest(workdir).get("forked_from")
        if stored is None or stored["run"] != str(parent) or step not in (None, stored["step"]):
            began = f"from step {stored['step']} of {stored['run']}" if stored else "by itself"
            raise WorkdirError(f"--fork={parent}: the run in --workdir={workdir} began {began}")
        return stored
    stored = read_manifest(parent)
    if kind_of(stored["config"]) is not kind_of(config):
        raise WorkdirError(
            f"--fork={parent} holds a supervised run: begin from its export, "
            f"--config.model.path={parent / 'export'}"
        )
    there = sorted(checkpoints(parent))
    if not there:
        raise WorkdirError(f"--fork={parent} holds no checkpoint yet: wait for its first one")
    step = there[-1] if step is None else step
    if step not in there:
        raise WorkdirError(
            f"--fork_step={step}: {parent} holds no checkpoint of that step; there are: "
            f"{', '.join(map(str, there))}"
        )
    if step >= config.num_steps:
        raise WorkdirError(
            f"--fork={parent} begins at step {step} and config.num_steps is {config.num_steps}: "
            "raise it, or name an earlier checkpoint in --fork_step"
        )
    changed = fields.changes(stored["config"], config)
    for name, value in json.loads(json.dumps(facts)).items():
        if stored.get(name) != value:
            changed[name] = (stored.get(name), value)
    return {"run": str(parent), "step": step, "changed": {n: list(v) for n, v in changed.items()}}


def package_versions() -> dict[str, str]:
    """Returns the versions of packages on which a run's numbers may depend."""
    return {name: _version(name) for name in _PACKAGES}


def check_processes(config: Config, roles: Roles) -> None:
    """Refuses a run with idle processes.

    Raises:
      ConfigError: a step has fewer prompts than there are processes that sample.
    """
    count, prompts_per_step = len(roles.rollout), config.rollout.prompts_per_step
    if prompts_per_step < count:
        raise ConfigError(
            f"rollout.prompts_per_step={prompts_per_step} must be at least the number of sampling "
            f"processes, {count}: each samples responses to its share of the prompts"
        )


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
