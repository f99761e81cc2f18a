"""What the command of every study does: it runs sweeps, resumes them, publishes, says what failed.

A study's `study.py` defines these flags, and its own, and says what is run in which order.
"""

import dataclasses
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from absl import flags

from experiments import command

if TYPE_CHECKING:  # sweeps import jax, and --help answers at once
    from experiments.sweeps.spec import Sweep

flags.disclaim_key_flags()  # they are the study's, in its --help


def define_flags(published: str) -> None:
    """Defines the flags that all studies have.

    Args:
      published: what `--publish` copies, in words.
    """
    flags.DEFINE_string("workdir", None, "Folder of the study.")
    flags.DEFINE_integer("parallel", 2, "Runs at a time.", 1)
    flags.DEFINE_bool("publish", False, f"Copy {published} beside the README.")
    flags.DEFINE_bool("analyse_only", False, "Run nothing; tell of what is there.")


@dataclasses.dataclass
class Session:
    """One call of a study's command.

    Attributes:
      workdir: of the study.
      parallel: runs at a time.
      analyse_only: whether nothing is run.
      publish: whether results are copied beside the README.
      failures: member → why it failed, of all sweeps so far.
    """

    workdir: pathlib.Path
    parallel: int
    analyse_only: bool
    publish: bool
    failures: dict[str, str] = dataclasses.field(default_factory=dict)

    def run(
        self,
        sweep: "Sweep",
        folder: str = "",
        *,
        only: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> "tuple[Sweep, pathlib.Path]":
        """Runs the unfinished members of a sweep; returns it and the folder of its runs.

        Args:
          sweep: of the design.
          folder: of the runs, in the workdir.
          only: members or variants to run; empty for all.
          environment: variables of the runs.
        """
        from experiments.sweeps import runner

        place = self.workdir / folder
        if not self.analyse_only:
            self.failures |= runner.run(
                sweep, place, parallel=self.parallel, only=only, environment=environment
            )
        return sweep, place

    def check(self) -> None:
        """Stops here if a run failed, where what follows rests on all of them.

        Raises:
          UsageError: names the runs, and why each failed.
        """
        if self.failures:
            lines = "\n".join(f"  - {name}: {why}" for name, why in self.failures.items())
            raise command.UsageError(f"{len(self.failures)} members failed:\n{lines}")

    def finish(
        self, text: str, home: pathlib.Path, published: Sequence[str], suffix: str = ""
    ) -> None:
        """Prints the results, copies them if asked, and says what failed.

        Args:
          text: the results.
          home: folder of the study's README.
          published: files of the workdir to copy.
          suffix: of their names beside the README.

        Raises:
          UsageError: as `check`.
        """
        print(text)
        if self.publish:
            for name in published:
                path = pathlib.Path(name)
                shutil.copy(self.workdir / name, home / f"{path.stem}{suffix}{path.suffix}")
        self.check()


def begin() -> Session:
    """Returns the session that the flags ask for."""
    given = flags.FLAGS
    workdir = pathlib.Path(given.workdir).absolute()
    return Session(workdir, given.parallel, given.analyse_only, given.publish)


def make_base(folder: pathlib.Path, options: Sequence[str]) -> None:
    """Trains a base policy into a folder, unless it is there.

    Args:
      folder: of the base.
      options: of `experiments.make_base`.
    """
    if (folder / "README.md").is_file():
        return
    print(f"== base {folder.name}", flush=True)
    subprocess.run(
        [
            sys.executable, "-m", "experiments.make_base", "--overwrite", *options,
            f"--out={folder}",
        ],
        check=True,
        cwd=pathlib.Path(__file__).resolve().parents[2],
    )  # fmt: skip
