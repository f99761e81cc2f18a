"""Orbax checkpoints that hold everything a bit-exact resume needs."""

import concurrent.futures
import contextlib
import errno
import json
import logging
import math
import pathlib
import shutil
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from luspo_jax.hosts import buckets, files, processes
from luspo_jax.hosts.buckets import is_bucket
from luspo_jax.hosts.files import PlaceError
from luspo_jax.run import bucket_checkpoints
from luspo_jax.types import TrainState

# Free space required before a save, as a multiple of the state's bytes: Orbax writes next to the
# finished checkpoint and renames, so a save that fits leaves nothing half-written.
_HEADROOM = 1.1
_SHOWN = 8  # names listed per kind in an error
_SUMS = bucket_checkpoints.OF_DISK  # in a checkpoint: file → CRC-32 of its bytes
_LONGEST_S = 7200  # that a checkpoint may take to reach a bucket
_PIECE = 1 << 24  # bytes of a file read at a time


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message names it and says what to do."""


class Checkpointer:
    """Keeps the latest and the best few checkpoints, by a metric, in one folder.

    A checkpoint is named by the number of rollout steps taken when it was written. It contains the
    train state, a JSON record of the host's state (prompt stream, counters), and arrays of the
    responses that wait for a later step. A sharded state can be restored onto another mesh or one
    device.

    Args:
      folder: of the checkpoints, or an address in a bucket; an interrupted save is deleted there.
      keep_latest, keep_best: numbers of checkpoints to keep.
      read_only: do not change the folder; it may belong to an active run.
      members: the processes that save and restore, if not all do; only they may make one.
      before_commit: called in the background, by the process that completes a checkpoint in a
        bucket, when all but its last mark is written.

    Raises:
      CheckpointError: the folder cannot be written, or is to be read and does not exist.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        *,
        keep_latest: int = 1,
        keep_best: int = 0,
        read_only: bool = False,
        members: tuple[int, ...] | None = None,
        before_commit: Callable[[], None] = lambda: None,
    ):
        self._bucket = bucket_checkpoints.opened(str(folder)) if is_bucket(folder) else None
        self.folder = epath.Path(folder) if self._bucket else pathlib.Path(folder).absolute()
        self._before_commit, self._saving, self._failed = before_commit, 0, False
        if read_only and not (self._bucket.entries() if self._bucket else self.folder.is_dir()):
            raise CheckpointError(f"{self.folder} is not there: it comes with the first checkpoint")
        # Orbax logs each save at the root logger's INFO level; the run prints its own console line.
        logging.getLogger("absl").addFilter(_not_orbax)
        keep = [policies.LatestN(keep_latest)]
        if keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=_best,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._members = members
        with _named_os_errors(self.folder), self._together():
            some = {}  # what Orbax needs to know if not all processes take part
            if members is not None:
                some["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
                    primary_host=members[0],
                    active_processes=set(members),
                    barrier_sync_key_prefix="train",
                )
                if processes.is_writer() and not (read_only or self._bucket):
                    self.folder.mkdir(parents=True, exist_ok=True)
            if self._bucket and processes.is_writer() and not read_only:
                bucket_checkpoints.drop_unfinished(self._bucket)
            processes.barrier("checkpoints")
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(**some),
                    "host": ocp.JsonCheckpointHandler(**some),
                    "waiting": ocp.PyTreeCheckpointHandler(**some),
                },
                options=ocp.CheckpointManagerOptions(
                    best_fn=_best,
                    preservation_policy=policies.AnyPreservationPolicy(keep),
                    # In a bucket it would go on while the run writes; `drop_unfinished` did it.
                    cleanup_tmp_directories=not (read_only or self._bucket),
                    read_only=read_only,
                    # A disk takes a checkpoint as fast as a copy of it could be made for later.
                    enable_async_checkpointing=self._bucket is not None,
                    async_options=ocp.AsyncOptions(
                        timeout_secs=_LONGEST_S, post_finalization_callback=self._complete
                    )
                    if self._bucket
                    else None,
                    create=members is None,
                    **some,
                ),
            )

    def _together(self):
        return contextlib.nullcontext() if self._members is None else processes.among(self._members)

    def latest_step(self) -> int | None:
        """Returns the steps taken by the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Returns the step of the best checkpoint kept; None before any measurement."""
        return self._manager.best_step()

    def save(
        self,
        step: int,
        state: TrainState,
        host: Mapping[str, Any],
        waiting: Mapping[str, np.ndarray] | None = None,
        *,
        metric: float | None = None,
    ) -> None:
        """Writes a checkpoint; on a disk it is complete when this returns, and absent if it raises.

        To a bucket it is written in the background, as soon as the one before is complete; `wait`
        waits for it. Each of several processes writes its own parts, and checks the space for them.
        """
        waiting = dict(waiting or {})
        if self._bucket is None:
            self._check_space((state, waiting))
        else:
            self.wait()
            state = bucket_checkpoints.kept_apart(state)
        if jax.process_count() > 1:
            # Orbax refuses arrays that are local to each process; process 0 writes NumPy ones.
            state = jax.tree.map(
                lambda x: (
                    x if isinstance(x, jax.Array) and not x.is_fully_addressable else np.asarray(x)
                ),
                state,
            )
        with _named_os_errors(self.folder), self._together():
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    host=ocp.args.JsonSave(dict(host)),
                    **({"waiting": ocp.args.PyTreeSave(waiting)} if waiting else {}),
                ),
                metrics=None if metric is None else {"best": float(metric)},
                force=True,
            )
            if self._bucket is None:
                self._manager.wait_until_finished()
                self._write_sums(step)

    def written(self) -> int | None:
        """Returns the newest checkpoint that is complete; None if there is none.

        Raises:
          CheckpointError: one could not be written in the background.
        """
        with self._watched():
            self._manager.check_for_errors()
        if self._manager.is_saving_in_progress():
            before = [step for step in self._manager.all_steps() if step != self._saving]
            return max(before, default=None)
        return self._manager.latest_step()

    def wait(self) -> None:
        """Waits until what was saved is complete.

        Raises:
          CheckpointError: it could not be written.
        """
        with self._watched(), self._together():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _watched(self):
        """Remembers a failure in the background, of which Orbax tells every time it is asked."""
        try:
            with _named_os_errors(self.folder):
                yield
        except BaseException:
            self._failed = True
            raise

    def _complete(self):
        """Does what comes before a checkpoint's last mark, in the background."""
        self._before_commit()
        self._bucket.write(
            f"{self._saving}/{bucket_checkpoints.SUMS}",
            bucket_checkpoints.record(self._bucket, self._saving),
        )

    def _check_space(self, written):
        """Refuses to begin what this process could not end."""
        own = jax.local_devices()
        needed = int(_HEADROOM * sum(bytes_written(x, own) for x in jax.tree.leaves(written)))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"{self.folder} has {free / 1e6:.0f} MB free and a checkpoint needs "
                f"{needed / 1e6:.0f} MB: free some space or lower output.keep_latest, then run "
                "the same command again to continue from the last checkpoint"
            )

    def restore(
        self, step: int, like: TrainState
    ) -> tuple[TrainState, dict[str, Any], dict[str, np.ndarray]]:
        """Reads checkpoint `step`: the state with the shapes, types and shardings of `like`, the
        JSON record of the host, and the arrays of waiting responses.

        Args:
          step: names the checkpoint.
          like: a state, or its jax.ShapeDtypeStructs. An array goes to its sharding; without one,
            or on the default device, the array is uncommitted, as if jnp had made it there, so that
            programs compiled for a new state accept it.

        Raises:
          CheckpointError: there is no such step, it is damaged, or its arrays differ from `like`
            (they are named from the metadata, before any is read). Or it contains waiting
            responses that an earlier version wrote.
        """
        steps = self._manager.all_steps()
        if step not in steps:
            raise CheckpointError(
                f"{self.folder} holds no checkpoint of step {step}; there are: "
                f"{', '.join(map(str, sorted(steps))) or 'none'}"
            )
        with self._together():
            restored = self._read(step, jax.tree.map(_abstract, like))
        leaves, tree = jax.tree.flatten(restored["state"])
        host, waiting = restored["host"], restored.get("waiting") or {}
        del restored  # so that each array is freed when it is replaced
        for i, x in enumerate(jax.tree.leaves(like)):
            leaves[i] = _freed(leaves[i], x)
        return jax.tree.unflatten(tree, leaves), self._renewed(step, host), waiting

    def _renewed(self, step, host):
        """Converts an older host record to today's format."""
        surplus = host.pop("surplus", None)
        if surplus:
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} was written by an earlier version of "
                f"luspo_jax, and {len(surplus)} groups of responses wait in it that this one does "
                "not read: go on with that version, or delete the folder to continue from a "
                "checkpoint in which none wait"
            )
        return {"waiting": [], **host}

    def _read(self, step, abstract):
        try:
            self._check_sums(step)
            stored = self._manager.item_metadata(step)["state"].tree
            problems = _misfits(stored, abstract)
            if not problems:
                args = {
                    "state": ocp.args.StandardRestore(abstract),
                    "host": ocp.args.JsonRestore(),
                }
                if (self.folder / str(step) / "waiting").is_dir():
                    args["waiting"] = ocp.args.PyTreeRestore(restore_args=self._as_numpy(step))
                return self._manager.restore(step, args=ocp.args.Composite(**args))
        except CheckpointError:
            raise
        except Exception as error:  # Orbax raises many types, with one meaning for the user.
            if not (self.folder / str(step)).is_dir():
                raise CheckpointError(
                    f"checkpoint {self.folder / str(step)} was deleted while it was read, by its "
                    "run or by hand: run the same command again"
                ) from error
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} cannot be read "
                f"({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}): if it is "
                f"damaged: {self._way_out(step)}"
            ) from error
        raise CheckpointError(
            f"checkpoint {self.folder / str(step)} is of another model, optimizer or objective: "
            f"{'; '.join(problems)}. Go on with the settings that it was written with, or start "
            "in a new --workdir"
        )

    def _as_numpy(self, step):
        stored = self._manager.item_metadata(step)["waiting"].tree
        return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), dict(stored))

    def _write_sums(self, step):
        """Writes the checksums of all files, last: each process reads its share of the files."""
        folder = self.folder / str(step)
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        names = processes.gather(names)[0]
        own = _sums(folder, names[processes.share(len(names))])
        sums = {name: value for part in processes.gather(own) for name, value in part.items()}
        if processes.is_writer():
            files.write_text(folder / _SUMS, json.dumps(sums, indent=0) + "\n")

    def _check_sums(self, step):
        """Compares the files with their checksums; an older checkpoint has none."""
        folder = self.folder / str(step)
        if self._bucket is not None:
            wrong = bucket_checkpoints.differing(self._bucket, step)
        else:
            try:
                stored = json.loads((folder / _SUMS).read_text())
            except FileNotFoundError:
                stored = {}
            stored = processes.gather(stored)[0]
            names = sorted(stored)
            found = _sums(folder, names[processes.share(len(names))])
            own = [name for name, value in found.items() if value != stored[name]]
            wrong = [name for part in processes.gather(own) for name in part]
        if wrong:
            raise CheckpointError(
                f"checkpoint {folder} is damaged: not as they were written are "
                f"{', '.join(wrong[:_SHOWN])}; {self._way_out(step)}"
            )

    def _way_out(self, step):
        earlier = [other for other in self._manager.all_steps() if other < step]
        if earlier:
            return f"delete that folder to continue from the one before, of step {max(earlier)}"
        return "there is none before it: restore that folder from a copy, or start a new --workdir"

    def close(self) -> None:
        """Releases Orbax's threads.

        Raises:
          CheckpointError: a checkpoint could not be written in the background, unless that was
            raised before.
        """
        try:
            with _named_os_errors(self.folder):
                self._manager.close()
        except (CheckpointError, PlaceError):
            if not self._failed:
                raise


def _best(metrics: Mapping[str, float]) -> float:
    return metrics["best"]


def bytes_written(x: Any, devices: Collection[jax.Device]) -> int:
    """Returns the bytes of an array that a process with these devices writes.

    For a part that several devices hold, Orbax either splits it among them or leaves it to the
    first; this is the larger of the two.
    """
    if not isinstance(x, jax.Array):
        return x.nbytes
    part = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    held = [shard.replica_id for shard in x.global_shards if shard.device in devices]
    copies = max(shard.replica_id for shard in x.global_shards) + 1
    return part * max(held.count(0), -(-len(held) // copies))


def _sums(folder, names):
    """Returns name → CRC-32; None for a missing file."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(lambda name: _sum(folder / name), names), strict=True))


def _sum(path):
    if not path.is_file():
        return None
    value = 0
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            value = zlib.crc32(piece, value)
    return value


def _abstract(like):
    place = getattr(like, "sharding", None) or jnp.zeros(()).sharding
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=place)


def _freed(x, like):
    """Returns `x`, uncommitted if `like` is: else every jitted function that takes it would compile
    again. Such an array must pass through the host; one at a time does."""
    default = jnp.zeros(()).sharding
    tied = getattr(like, "committed", False) or len(x.sharding.device_set) > 1
    named = not isinstance(x.sharding, jax.sharding.SingleDeviceSharding)
    if tied or named or x.sharding.device_set != default.device_set:
        return x
    return jnp.array(np.asarray(x))


def _misfits(stored, like):
    """Describes the differences of two trees of arrays, one line for each kind."""
    theirs, ours = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): _described(x)
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (stored, like)
    )
    kinds = {
        "of another shape or type": [
            f"{name} is {theirs[name]}, not {ours[name]}"
            for name in theirs
            if name in ours and theirs[name] != ours[name]
        ],
        "in the checkpoint only": [
            f"{name} {theirs[name]}" for name in theirs.keys() - ours.keys()
        ],
        "not in the checkpoint": [f"{name} {ours[name]}" for name in ours.keys() - theirs.keys()],
    }
    return [
        f"{len(names)} arrays {kind}: {', '.join(sorted(names, key=_params_first)[:_SHOWN])}"
        + (", ..." if len(names) > _SHOWN else "")
        for kind, names in kinds.items()
        if names
    ]


def _params_first(name):
    return not name.startswith("params/"), name


def _described(x):
    return f"{np.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"


def _not_orbax(record: logging.LogRecord) -> bool:
    """Returns False for Orbax's progress reports, for warnings that a save has no metric or that
    a reader only reads, and for errors that are raised as well."""
    text = record.getMessage()
    expected = ("did not provide metrics", "read_only=True", "is read only")
    return "orbax" not in record.pathname or not (
        record.levelno < logging.WARNING
        or record.exc_info  # of threads: the same error is raised where the save is waited for
        or any(words in text for words in expected)
    )


@contextlib.contextmanager
def _named_os_errors(folder: Any):
    """Turns a full disk or a forbidden folder, however Orbax wraps it, into one clear message."""
    try:
        yield
    except Exception as error:
        text = str(error) or type(error).__name__
        if isinstance(error, PlaceError):
            raise
        if is_bucket(folder) and (line := buckets.refusal(str(folder), error)):
            raise CheckpointError(
                f"a checkpoint could not be written: {line}; it goes on from the last complete one"
            ) from error
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text
        if full or isinstance(error, OSError):
            raise CheckpointError(
                f"could not write under {folder} ({text.splitlines()[0][:200]}): "
                + ("free some space" if full else "check that the folder is writable")
                + " and run the same command again to continue from the last checkpoint"
            ) from error
        raise
