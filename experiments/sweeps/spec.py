"""Definition of a sweep: configuration fields × seeds, the outcomes to compare, and all checks."""

import collections
import dataclasses
import functools
import importlib.util
import itertools
import pathlib
import re
import shlex
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import command
from luspo_jax.hosts.values import ConfigError, nearest
from luspo_jax.run import checks, fields

ROOT = pathlib.Path(__file__).resolve().parents[2]
REDUCERS = ("first", "last", "change", "mean", "max", "auc", "at")

Fields = Mapping[str, Any]  # dotted configuration field → value; a whole section may be a dict


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One number of a run.

    Attributes:
      name: its column.
      metric: a metric's name; `*` matches any text, and the first match is used.
      reduce: first, last, change (last − first), mean, max, auc (mean by trapezoids over steps), or
        at (its value where `where` first reaches `level`, by linear interpolation; NaN if never).
      until: last rollout step to use; None for all.
      where: metric that triggers "at".
      level: value that `where` must reach.
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
      base: configuration file, from the folder that holds `configs`, the working folder, or
        absolute.
      axes: axis → level → fields; the variants are all combinations of levels. If two axes set one
        field, the later axis wins.
      members: name → fields, additional variants outside the grid.
      fixed: fields of every variant.
      seeds: each variant runs once per seed.
      baseline: axis → reference level for differences, with all other axes equal; or {"member":
        name}. Empty for no differences.
      outcomes: columns of the table.
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
    """One setting of a sweep: its level on each axis, and its fields."""

    levels: tuple[tuple[str, str], ...]
    fields: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """Its levels, joined by commas."""
        return ",".join(level for _, level in self.levels)


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Its variant and its seed, joined by a slash."""
        return f"{self.variant.name}/seed_{self.seed}"

    def folder(self, workdir: pathlib.Path) -> pathlib.Path:
        """Returns the workdir of the run."""
        return workdir / "members" / slug(self.variant.name) / f"seed_{self.seed}"


def slug(name: str) -> str:
    """Converts a name to a folder name."""
    return re.sub(r"[^\w.+-]+", "_", name)


def load(path: str) -> Sweep:
    """Loads the sweep of a file with `get_sweep()`.

    Raises:
      ConfigError: no such file, or not a sweep file.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(f"--sweep={path} does not exist")
    sweep = _given_by(file, "get_sweep")
    if not isinstance(sweep, Sweep):
        raise ConfigError(
            f"--sweep={path} must define get_sweep() -> experiments.sweeps.spec.Sweep"
        )
    return sweep


def variants(sweep: Sweep) -> list[Variant]:
    """Lists all settings, grid first."""
    found = []
    if sweep.axes:
        for combination in itertools.product(*(axis.items() for axis in sweep.axes.values())):
            # A level may be named by its value, a number.
            names = (str(name) for name, _ in combination)
            levels = tuple(zip(sweep.axes, names, strict=True))
            leaves = dict(sweep.fixed)
            for _, chosen in combination:
                leaves |= chosen
            found.append(Variant(levels, tuple(leaves.items())))
    for name, leaves in sweep.members.items():
        merged = {**sweep.fixed, **leaves}
        found.append(Variant((("member", name),), tuple(merged.items())))
    return found


def members(sweep: Sweep) -> list[Member]:
    """Lists all runs, those of one variant together: they share compiled programs."""
    return [Member(v, seed) for v in variants(sweep) for seed in sweep.seeds]


def baseline_of(sweep: Sweep, variant: Variant) -> str | None:
    """Returns the name of the variant to compare with: equal on all axes outside the baseline."""
    levels = dict(variant.levels)
    if not sweep.baseline:
        return None
    if "member" in sweep.baseline:
        return sweep.baseline["member"]
    if not set(sweep.baseline) <= set(levels):
        return None
    return ",".join(str(sweep.baseline.get(axis, level)) for axis, level in variant.levels)


def config_of(sweep: Sweep, member: Member) -> ConfigDict:
    """Builds the member's whole configuration.

    Raises:
      ConfigError: fields that do not exist or values of another type, all in one message.
    """
    config, problems = base_config(sweep.base), []
    for name, value in (*member.variant.fields, ("seed", member.seed)):
        try:
            _set(config, name, value)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def base_config(path: str) -> ConfigDict:
    """Returns the result of a configuration file's `get_config()`."""
    file = pathlib.Path(path)
    if (ROOT / file).is_file():  # else of the working folder
        file = ROOT / file
    if not file.is_file():
        raise ConfigError(f'the sweep\'s base "{path}" does not exist')
    config = _given_by(file, "get_config")
    if not isinstance(config, ConfigDict):
        raise ConfigError(f'the sweep\'s base "{path}" must define get_config() -> ConfigDict')
    return config


def check(sweep: Sweep) -> list[Member]:
    """Refuses an invalid sweep, with all problems in one message; returns its runs.

    Raises:
      ConfigError: names every field and member.
    """
    problems = list(_structure(sweep))
    if not problems:
        found = variants(sweep)
        wrong: dict[str, list[str]] = {}  # a problem of many members is reported once
        for variant in found:
            try:
                checks.check(config_of(sweep, Member(variant, sweep.seeds[0])))
            except ConfigError as error:
                wrong.setdefault(str(error), []).append(variant.name)
        for message, names in wrong.items():
            who = "all members" if len(names) == len(found) > 1 else " and ".join(names)
            problems.append(f"{who}: {message}")
    if problems:
        raise ConfigError("this sweep cannot run:\n" + "\n".join(f"  - {p}" for p in problems))
    return members(sweep)


def tracked(config: ConfigDict, member: Member, workdir: pathlib.Path) -> dict[str, str]:
    """Returns the fields by which trackers show a sweep's members together, under their names.

    Names that the sweep gives itself stay. They are no part of what a member is: its fingerprint
    is without them.
    """
    if not config.output.trackers:
        return {}
    given = {"group": workdir.resolve().name, "run_name": member.name}
    return {f"output.{name}": config.output[name] or value for name, value in given.items()}


def launch_line(sweep: Sweep, member: Member, workdir: pathlib.Path, sweep_file: str) -> str:
    """Returns a command that runs one member, for a cluster.

    Fields that flags cannot set (whole sections, None) come from the sweep file by `--only`.
    """
    folder = member.folder(workdir)
    leaves = dict(member.variant.fields)
    if any(v is None or isinstance(v, Mapping) or _open(name) for name, v in leaves.items()):
        module = "experiments.sweep"
        words = [f"--sweep={sweep_file}", f"--only={member.name}", f"--workdir={workdir}"]
    else:
        leaves |= tracked(config_of(sweep, member), member, workdir)
        flags = [f"--config.{name}={value}" for name, value in leaves.items()]
        module, words = "experiments.train", [f"--config={sweep.base}", *flags]
        words += [f"--config.seed={member.seed}", f"--workdir={folder}"]
    return " ".join([command.spoken(module), *(shlex.quote(word) for word in words)])


def _open(name):
    return name.startswith(fields.OPEN_SECTIONS)


def _set(config, name, value):
    known = fields.flat(config)
    sections = {key.rsplit(".", depth)[0] for key in known for depth in (1, 2) if "." in key}
    sections |= {prefix.rstrip(".") for prefix in fields.OPEN_SECTIONS}
    if name not in known and name not in sections and not _open(name):
        near = nearest(name, {*known, *sections})
        raise ConfigError(f"unknown field {name}: {near}")
    try:
        if isinstance(value, Mapping) or value is None:
            *path, last = name.split(".")
            target = config
            for section in path:
                target = target[section]
            if value is None and fields.flat(fields.default_config()).get(name):
                raise TypeError("only a field that is unset by default can be None")
            target[last] = None if value is None else dict(value)
        else:
            fields.assign(config, {name: value})
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{name}={value!r}: {error}") from error


def _structure(sweep) -> Iterator[str]:
    found = variants(sweep)
    if not found:
        yield "it has no members: give axes, members or both"
    if not sweep.seeds:
        yield "seeds is empty"
    if not all(type(seed) is int for seed in sweep.seeds):
        yield f"seeds={tuple(sweep.seeds)!r} must be whole numbers"
    if not sweep.outcomes:
        yield "outcomes is empty: name a metric to compare"
    yield from _names(sweep, found)
    if any("seed" in dict(variant.fields) for variant in found):
        yield "the field seed is set by `seeds`: take it out of the other fields"
    if found and sweep.baseline:
        names = {variant.name for variant in found}
        against = {baseline_of(sweep, variant) for variant in found} - {None}
        if not against or not against <= names:
            wrong = ", ".join(sorted(against - names)) or str(dict(sweep.baseline))
            yield f"baseline {wrong} is none of its variants: {', '.join(sorted(names)[:20])}"
    for outcome in sweep.outcomes:
        if outcome.reduce not in REDUCERS:
            near = nearest(outcome.reduce, REDUCERS)
            yield f"outcome {outcome.name}: reduce={outcome.reduce!r} does not exist: {near}"
        if outcome.reduce == "at" and not outcome.where:
            yield f'outcome {outcome.name}: reduce="at" needs `where`, the metric that decides'


def _names(sweep, found) -> Iterator[str]:
    """Yields problems with names: each must be a column or folder of its own."""
    folders: dict[str, list[str]] = {}
    for variant in found:
        folders.setdefault(slug(variant.name), []).append(variant.name)
    for folder, names in folders.items():
        if folder in ("", ".", ".."):
            yield f"a member is named {names[0]!r}, which cannot name a folder"
        if len(names) > 1:
            named = " and ".join(repr(name) for name in dict.fromkeys(names))
            yield f"{len(names)} members are named {named}: their one folder would be {folder!r}"
    for what, names in (("seed", sweep.seeds), ("outcome", [o.name for o in sweep.outcomes])):
        for name, count in collections.Counter(names).items():
            if count > 1:
                yield f"{count} {what}s are named {name!r}: give each a name of its own"


def _given_by(file: pathlib.Path, function: str) -> Any:
    """Returns the result of a function in a file; None without such a function.

    Raises:
      ConfigError: the file or the function fails; names the line.
    """
    try:
        return getattr(_module(file), function, lambda: None)()
    except ConfigError:
        raise
    except Exception as error:  # a user's file may raise anything
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)
        ]
        place = f"{file}, line {lines[-1]}" if lines else f"{file}"
        raise ConfigError(f"{place}: {type(error).__name__}: {error}") from error


@functools.cache
def _module(file: pathlib.Path):
    spec = importlib.util.spec_from_file_location(f"_loaded_{slug(str(file))}", file)
    if spec is None:
        raise ConfigError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
