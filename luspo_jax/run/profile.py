"""A trace of a few rollout steps, by jax.profiler, with the phases of a step named in it."""

import contextlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

import jax

from luspo_jax import metrics
from luspo_jax.hosts.values import ConfigError

FLAG = "--profile_steps"
_STEPS = "steps.json"  # in a profile: its first and last step


def steps_of(text: str, num_steps: int) -> tuple[int, int] | None:
    """Reads the value of the flag: "4-6", or "4" for one step; None if it is empty.

    Args:
      text: steps as metrics.jsonl counts them, from 1; both ends belong to the range.
      num_steps: of the whole run.

    Raises:
      ConfigError: it is no range, or goes beyond the run.
    """
    if not text:
        return None
    found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text)
    if found is None:
        raise ConfigError(f"{FLAG}={text} is no range of steps: write FIRST-LAST, as in 4-6")
    first, last = int(found[1]), int(found[2] or found[1])
    if not 1 <= first <= last:
        raise ConfigError(f"{FLAG}={text}: steps count from 1, and the first comes first")
    if last > num_steps:
        raise ConfigError(f"{FLAG}={text} goes beyond the run: num_steps={num_steps}")
    return first, last


class Profile:
    """Traces some of a run's steps into WORKDIR/profile; a context manager.

    The folder appears when the last of the steps has ended, and is complete then. A run that ends
    before leaves none, and traces those of the steps that it still takes when it resumes.

    Args:
      workdir: of the run; None if there is none yet.
      steps: first and last, counted from 1; None traces nothing.
      several: whether this is one of several processes: each then has a folder of its own.

    Attributes:
      folder: of this process's profile.
      there: whether these steps were traced already; they are not traced again.

    Raises:
      ConfigError: the workdir holds a profile of other steps.
    """

    def __init__(
        self,
        workdir: str | os.PathLike | None = None,
        steps: tuple[int, int] | None = None,
        *,
        several: bool = False,
    ):
        self.folder = pathlib.Path(workdir or "").absolute() / "profile"
        if several:
            self.folder /= f"process_{jax.process_index()}"
        self._steps, self._partial = steps, self.folder.with_name(f".{self.folder.name}.partial")
        self._naming: contextlib.ExitStack | None = None  # while the trace is on
        self.there = bool(workdir and steps) and os.path.lexists(self.folder)
        if self.there and (held := _held(self.folder)) != steps:
            whose = "of steps {}-{}".format(*held) if held else "or something else"
            raise ConfigError(
                f"{FLAG}={_shown(steps)}: {self.folder} holds a profile {whose}: move it away"
            )

    def __enter__(self) -> "Profile":
        """Returns itself."""
        return self

    def __exit__(self, *error) -> None:
        """Ends and drops a trace whose last step was not reached."""
        if self._naming is not None:
            self._end()
            shutil.rmtree(self._partial, ignore_errors=True)

    def check_ahead(self, taken: int) -> None:
        """Checks that a step to trace is still to come.

        Raises:
          ConfigError: all of them were taken before, untraced.
        """
        if self._steps and not self.there and taken >= self._steps[1]:
            raise ConfigError(
                f"{FLAG}={_shown(self._steps)}: the run goes on at step {taken + 1}, after these"
            )

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Traces what is inside if it is one of the steps, counted from 1."""
        if not self._steps or self.there or not self._steps[0] <= step <= self._steps[1]:
            yield
            return
        if self._naming is None:
            self._begin()
        with jax.profiler.StepTraceAnnotation("rollout_step", step_num=step):
            yield
        if step == self._steps[1]:
            self._end()
            self._keep(step)

    def _begin(self):
        shutil.rmtree(self._partial, ignore_errors=True)  # of a run that was killed
        self._partial.mkdir(parents=True)
        options = jax.profiler.ProfileOptions()
        # Each Python call would be an event: the sampler's loop would fill the trace with them.
        options.python_tracer_level = 0
        jax.profiler.start_trace(
            self._partial, create_perfetto_trace=True, profiler_options=options
        )
        self._naming = contextlib.ExitStack()
        self._naming.enter_context(metrics.phases_in(jax.profiler.TraceAnnotation))

    def _end(self):
        naming, self._naming = self._naming, None
        naming.close()
        jax.profiler.stop_trace()

    def _keep(self, last):
        first = self._steps[0]
        (self._partial / _STEPS).write_text(json.dumps({"first": first, "last": last}) + "\n")
        os.replace(self._partial, self.folder)
        self.there = True


def _shown(steps):
    return "{}-{}".format(*steps)


def _held(folder):
    """Returns first and last step of the profile in a folder; None if nothing says them."""
    try:
        stored = json.loads((folder / _STEPS).read_text())
        return stored["first"], stored["last"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
