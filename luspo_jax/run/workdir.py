"""A run's folder: it holds one run, serves one process, and records what figures depend on."""

import importlib.metadata
import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from luspo_jax.hosts import files, processes
from luspo_jax.hosts.files import PlaceError
from luspo_jax.hosts.roles import Roles
from luspo_jax.hosts.values import ConfigError
from luspo_jax.metrics import read_metrics
from luspo_jax.run import fields
from luspo_jax.run.place import NOTE, Place
from luspo_jax.run.settings import Config, kind_of

_PACKAGES = ("luspo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


class WorkdirError(PlaceError):
    """A workdir that this run may not use; the message says why and what to do."""


class Workdir:
    """A run's place: refused if it holds another run, locked while in use; a context manager.

    Only process 0 locks and writes; the others check that they see what it wrote. `run.json`
    contains the configuration and everything that the folder's figures depend on.

    Args:
      path: a folder, or the address of a bucket.
      config: of the run.
      facts: what its numbers depend on besides the configuration.
      fork: the run and step that a new run starts from; an existing run keeps its own.

    Attributes:
      path: of the folder on this host; of a bucket, a scratch folder that is copied to it.
      name: absolute path or address.
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
        self._place = Place(path)
        self.path, self.name, self.forked_from = self._place.folder, self._place.name, fork
        if not processes.is_writer():
            processes.barrier("workdir")
            self._check_seen(config)
            self._place.hold()
            return
        self._check_own()
        self._place.hold()
        try:
            self._check_or_write(config, facts)
            self._check_kept()
            self._place.flush()
        except BaseException:
            self._place.release(complete=False)
            raise
        processes.barrier("workdir")

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """As `close`; after an error, what cannot be copied is no second error."""
        try:
            self.close()
        except PlaceError as trouble:
            if error is None:
                raise
            warnings.warn(f"{trouble}; what is not copied is in {self.path}", stacklevel=2)

    def close(self) -> None:
        """Releases the place to other processes, with everything where it is kept.

        Raises:
          PlaceError: the bucket cannot be written; what it lacks is in `path`.
        """
        self._place.release()

    @property
    def checkpoints(self) -> str:
        """Folder or address of the checkpoints."""
        return self._place.checkpoints

    def flush(self) -> None:
        """Waits until all files are where they are kept."""
        self._place.flush()

    def drop_after(self, step: int) -> None:
        """Deletes what is kept elsewhere than in `path` of the responses of later steps."""
        self._place.drop_after(step)

    def check_there(self) -> None:
        """Checks that the folder was not deleted, moved or replaced while in use, and has what was
        written copied in the background.

        Raises:
          PlaceError: it was; says what is lost. Or another run has taken it over.
        """
        try:
            self._place.check()
        except OSError as error:
            raise WorkdirError(
                f"--workdir={self.path} was deleted or moved while this run was using it: the run "
                "has stopped, and what it had written there is lost unless it was moved. Put the "
                "folder back to continue from its last checkpoint, or start over in a new one"
            ) from error

    def note_checkpoint(self, step: int) -> None:
        """Records that a checkpoint was written, to tell a run that lost its checkpoints from one
        that was stopped before its first."""
        if processes.is_writer():
            files.write_text(self.path / NOTE, f"{step}\n")

    def _check_kept(self):
        """Refuses to start over a run that has lost its checkpoints."""
        folder, note, metrics = self.checkpoints, self.path / NOTE, self.path / "metrics.jsonl"
        lost = note.exists() and not self._place.steps()
        if not metrics.exists() or not (lost or (self._place.shared and not os.path.isdir(folder))):
            return
        last = max((row["step"] for row in read_metrics(metrics)), default=0)
        if last > (self.forked_from or {"step": 0})["step"]:
            raise WorkdirError(
                f"--workdir={self.name} holds metrics of {last} steps, but its checkpoints are "
                f"gone, so it cannot go on: put {folder} back, or choose another --workdir; to "
                f"start over in this one, first move {metrics.name} and rollouts/ away"
            )

    def _check_seen(self, config):
        try:
            stored = read_manifest(self._place)
            seen, self.forked_from = stored["config"], stored.get("forked_from")
        except WorkdirError:
            seen = None
        if seen != json.loads(json.dumps(fields.flat(config))):
            raise WorkdirError(
                f"--workdir={self.name} must be on storage that all processes share: process "
                f"{jax.process_index()} does not see there the run.json that process 0 wrote"
            )

    def _check_own(self):
        """Refuses a folder with other contents before anything is written into it."""
        # Names besides the lock, broken writes and heartbeats.
        names = {name for name in self._place.top() if not name.startswith(".")}
        if "run.json" in names or self._place.steps():
            return
        if names - {"processes"}:
            raise WorkdirError(
                f"--workdir={self.name} is not empty and holds no run of luspo_jax: choose another"
            )

    def _check_or_write(self, config, facts):
        manifest = self.path / "run.json"
        facts = json.loads(json.dumps(facts))  # as they will be read: tuples become lists
        if manifest.exists():
            stored = read_manifest(self._place)
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
                    f"--workdir={self.name} holds a run with another configuration:\n"
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
    """Refuses, before anything slow, an address that cannot be a workdir.

    Raises:
      PlaceError: with the remedy.
    """
    Place(path)


def is_begun(workdir: str | os.PathLike) -> bool:
    """Returns whether a workdir holds a run, whole or damaged."""
    return Place(workdir).read("run.json") is not None


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
        raise WorkdirError(f"{workdir}/run.json does not fit this version: {error}") from error
    return config


def read_manifest(workdir: str | os.PathLike | Place) -> dict[str, Any]:
    """Reads run.json of a workdir.

    Raises:
      WorkdirError: it is missing or damaged; with the remedy.
    """
    place = workdir if isinstance(workdir, Place) else Place(workdir)
    content = place.read("run.json")
    if content is None:
        raise WorkdirError(f"{place.name} holds no run: there is no run.json in it")
    try:
        stored = json.loads(content)
        dict(stored["config"])
    except (ValueError, KeyError, TypeError) as error:
        last = max(place.steps(), default=None)
        raise WorkdirError(
            f"{place.name}/run.json is damaged ({error}): "
            + (
                "restore it from a copy, or choose another --workdir: there is no checkpoint yet"
                if last is None
                else "delete it and train with the run's own --config and --workdir, which goes on "
                f"from checkpoint {last} and writes it again"
            )
        ) from error
    return stored


def checkpoint_folder(workdir: str | os.PathLike) -> str:
    """Returns the folder or address of a run's checkpoints."""
    return Place(workdir).checkpoints


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
    parent, place = Place(parent).name, Place(workdir)
    if place.read("run.json") is not None:
        stored = read_manifest(place).get("forked_from")
        if stored is None or stored["run"] != parent or step not in (None, stored["step"]):
            began = f"from step {stored['step']} of {stored['run']}" if stored else "by itself"
            raise WorkdirError(f"--fork={parent}: the run in --workdir={workdir} began {began}")
        return stored
    stored = read_manifest(parent)
    if kind_of(stored["config"]) is not kind_of(config):
        raise WorkdirError(
            f"--fork={parent} holds a supervised run: begin from its export, "
            f"--config.model.path={parent}/export"
        )
    there = Place(parent).steps()
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
    return {"run": parent, "step": step, "changed": {n: list(v) for n, v in changed.items()}}


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
