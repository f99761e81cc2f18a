"""What a sweep is: configuration fields × seeds, the outcomes to compare, and every mistake."""

import collections
import dataclasses
import functools
import importlib.util
import itertools
import pathlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from luspo_jax import config as configuration
from luspo_jax.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]
REDUCERS = ("first", "last", "change", "mean", "max", "auc", "at")

Fields = Mapping[str, Any]  # dotted configuration field → value; a whole section may be a dict


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One number of a run.

    Attributes:
      name: its column.
      metric: a metric's name; `*` stands for any text, and the first that fits is taken.
      reduce: first, last, change (last − first), mean, max, auc (mean by trapezoids over steps),
        or at (its value where `where` first reaches `level`, by linear interpolation; NaN where
        that never happens).
      until: last rollout step that is looked at; None for all.
      where: metric that decides for "at".
      level: what it must reach.
    """

    name: str
    metric: str
    reduce: str = "last"
    until: int | None = None
    where: str = ""
    level: float = 0.0


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs that differ in a few fields.

    Attributes:
      base: configuration file, from the repository's root or absolute.
      axes: axis → level → fields; the variants are all combinations of levels.
      members: name → fields, variants beside the grid.
      fixed: fields of every variant.
      seeds: each variant runs once with each.
      baseline: axis → level that differences are taken against, all other axes equal; or
        {"member": name}. Empty for no differences.
      outcomes: what the table shows.
    """

    base: str
    axes: Mapping[str, Mapping[str, Fields]] = dataclasses.field(default_factory=dict)
    members: Mapping[str, Fields] = dataclasses.field(default_factory=dict)
    fixed: Fields = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    baseline: Mapping[str, str] = dataclasses.field(default_factory=dict)
    outcomes: Sequence[Outcome] = (
        Outcome("accuracy", "val-core/*"),
        Outcome("length", "val-aux/*/response_length/mean"),
    )


@dataclasses.dataclass(frozen=True)
class Variant:
    """One setting of a sweep: where it stands on each axis, and its fields."""

    levels: tuple[tuple[str, str], ...]
    fields: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return ",".join(level for _, level in self.levels)


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant.name}/seed_{self.seed}"

    def folder(self, workdir: pathlib.Path) -> pathlib.Path:
        """Workdir of the run."""
        return workdir / "members" / slug(self.variant.name) / f"seed_{self.seed}"


def slug(name: str) -> str:
    """A name as a folder's."""
    return re.sub(r"[^\w.+-]+", "_", name)


def load(path: str) -> Sweep:
    """The sweep of a file with `get_sweep()`.

    Raises:
      ConfigError: no such file, or none of ours.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(f"--sweep={path} does not exist")
    sweep = getattr(_module(file), "get_sweep", lambda: None)()
    if not isinstance(sweep, Sweep):
        raise ConfigError(
            f"--sweep={path} must define get_sweep() -> experiments.sweeps.spec.Sweep"
        )
    return sweep


def variants(sweep: Sweep) -> list[Variant]:
    """All settings, grid first."""
    found = []
    if sweep.axes:
        for combination in itertools.product(*(axis.items() for axis in sweep.axes.values())):
            levels = tuple(zip(sweep.axes, (name for name, _ in combination), strict=True))
            fields = dict(sweep.fixed)
            for _, chosen in combination:
                fields |= chosen
            found.append(Variant(levels, tuple(fields.items())))
    for name, fields in sweep.members.items():
        merged = {**sweep.fixed, **fields}
        found.append(Variant((("member", name),), tuple(merged.items())))
    return found


def members(sweep: Sweep) -> list[Member]:
    """All runs, those of one variant side by side: they share compiled programs."""
    return [Member(v, seed) for v in variants(sweep) for seed in sweep.seeds]


def baseline_of(sweep: Sweep, variant: Variant) -> str | None:
    """Name of the variant to compare with: equal on all axes that the baseline does not name."""
    levels = dict(variant.levels)
    if not sweep.baseline:
        return None
    if "member" in sweep.baseline:
        return sweep.baseline["member"]
    if not set(sweep.baseline) <= set(levels):
        return None
    return ",".join(sweep.baseline.get(axis, level) for axis, level in variant.levels)


def config_of(sweep: Sweep, member: Member) -> ConfigDict:
    """The member's whole configuration.

    Raises:
      ConfigError: a field that does not exist or a value of another type.
    """
    config = base_config(sweep.base)
    for name, value in (*member.variant.fields, ("seed", member.seed)):
        _set(config, name, value)
    return config


def base_config(path: str) -> ConfigDict:
    """What `get_config()` of a configuration file gives."""
    file = pathlib.Path(path)
    file = file if file.is_absolute() else ROOT / file
    if not file.is_file():
        raise ConfigError(f'the sweep\'s base "{path}" does not exist')
    return _module(file).get_config()


def check(sweep: Sweep) -> list[Member]:
    """Refuses a sweep that cannot run, all problems in one message; gives its runs.

    Raises:
      ConfigError: naming every field and member.
    """
    problems = list(_structure(sweep))
    if not problems:
        for variant in variants(sweep):
            try:
                configuration.check(config_of(sweep, Member(variant, sweep.seeds[0])))
            except ConfigError as error:
                problems.append(f"{variant.name}: {error}")
    if problems:
        raise ConfigError("this sweep cannot run:\n" + "\n".join(f"  - {p}" for p in problems))
    return members(sweep)


def launch_line(sweep: Sweep, member: Member, workdir: pathlib.Path, sweep_file: str) -> str:
    """A command that runs one member, for a cluster.

    Fields that flags cannot set (whole sections) are left to the sweep file by `--only`.
    """
    folder = member.folder(workdir)
    fields = dict(member.variant.fields)
    if any(isinstance(value, Mapping) or _open(name) for name, value in fields.items()):
        words = ["experiments.sweep", f"--sweep={sweep_file}", f"--only={member.name}"]
        words.append(f"--workdir={workdir}")
    else:
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        words = ["experiments.train", f"--config={sweep.base}", *flags]
        words += [f"--config.seed={member.seed}", f"--workdir={folder}"]
    return "python -m " + " ".join(shlex.quote(word) for word in words)


def _open(name):
    return name.startswith(configuration.OPEN_SECTIONS)


def _set(config, name, value):
    known = configuration.flat(config)
    sections = {key.rsplit(".", depth)[0] for key in known for depth in (1, 2) if "." in key}
    sections |= {prefix.rstrip(".") for prefix in configuration.OPEN_SECTIONS}
    if name not in known and name not in sections and not _open(name):
        raise ConfigError(f"unknown field {name}: {configuration.nearest(name, known)}")
    try:
        if isinstance(value, Mapping):
            *path, last = name.split(".")
            target = config
            for section in path:
                target = target[section]
            target[last] = dict(value)
        else:
            configuration.assign(config, {name: value})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{name}={value!r}: {error}") from error


def _structure(sweep) -> Iterator[str]:
    found = variants(sweep)
    if not found:
        yield "it has no members: give axes, members or both"
    if not sweep.seeds:
        yield "seeds is empty"
    for what, names in (
        ("seed", sweep.seeds),
        ("member", [slug(v.name) for v in found]),
        ("outcome", [outcome.name for outcome in sweep.outcomes]),
    ):
        for name, count in collections.Counter(names).items():
            if count > 1:
                yield f"{count} {what}s are named {name!r}: give each a name of its own"
    if found and sweep.baseline:
        names = {variant.name for variant in found}
        against = {baseline_of(sweep, variant) for variant in found} - {None}
        if not against or not against <= names:
            wrong = ", ".join(sorted(against - names)) or str(dict(sweep.baseline))
            yield f"baseline {wrong} is none of its variants: {', '.join(sorted(names)[:20])}"
    for outcome in sweep.outcomes:
        if outcome.reduce not in REDUCERS:
            yield f"outcome {outcome.name}: reduce={outcome.reduce!r}: valid: {', '.join(REDUCERS)}"
        if outcome.reduce == "at" and not outcome.where:
            yield f'outcome {outcome.name}: reduce="at" needs `where`, the metric that decides'


@functools.cache
def _module(file: pathlib.Path):
    spec = importlib.util.spec_from_file_location(f"_loaded_{slug(str(file))}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
