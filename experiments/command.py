"""Shared code of the launchers: flags with one-line errors, and a run's description."""

import ast
import codecs
import errno
import os
import pathlib
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Set before jax or transformers are imported: their warnings about absent devices and libraries are
# no news, and would push a run's own lines off the screen.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from absl import flags

from experiments import versions
from luspo_jax.hosts import fetched, files, guard

installed = False  # whether the program `luspo` runs the launcher


def spoken(module: str) -> str:
    """Returns how the user calls a launcher: `python -m experiments.train`, or `luspo train`."""
    return f"luspo {module.rpartition('.')[2]}" if installed else f"python -m {module}"


class UsageError(ValueError):
    """The flags do not determine what to do."""


def call(
    main: Callable[[], None],
    *,
    required: Sequence[str] = (),
    positional: str = "",
    config: str = "default_config",
) -> int:
    """Parses flags, runs `main`, and turns every foreseen failure into one message.

    Args:
      main: reads the flags.
      required: flags that must be given.
      positional: the flag that an argument without a name sets, or several set if its value is a
        list; empty if there is none.
      config: function of `run.fields` that knows the fields of --config.

    Returns:
      The exit status: 0; 2 for flags and configurations; 1 for anything else foreseen. Unforeseen
      errors keep their traceback, because they are our fault.
    """
    say_plainly()
    if {"--help", "-help", "-h"} & set(sys.argv[1:]):
        print(sys.modules["__main__"].__doc__, flags.FLAGS.main_module_help(), sep="")
        return 0
    try:
        flags.FLAGS.set_gnu_getopt(bool(positional))  # flags may follow the argument
        rest = flags.FLAGS(sys.argv)[1:]
        if positional and rest and not (given := getattr(flags.FLAGS, positional)):
            setattr(flags.FLAGS, positional, rest.pop(0) if given is None else rest[:])
            rest = rest if given is None else []
        if rest:
            raise flags.Error(f"unexpected argument {rest[0]!r}: flags are --name=value")
        for name in required:
            if not getattr(flags.FLAGS, name) and not _is_dry(name):
                alone = ", or its value alone" if name == positional else ""
                raise flags.Error(f"--{name} is required{alone}")
    except (flags.Error, AttributeError, KeyError, ValueError, TypeError, OSError) as error:
        return _refuse(_flag_message(error, config), 2)
    _expand_home()
    try:
        _check_addresses()
    except UsageError as error:
        return _refuse(str(error), 2)
    # A warning is a line for the user, without its location in our code.
    warnings.showwarning = lambda message, *_, **__: sys.stderr.write(
        f"warning: {fetched.shown(str(message))}\n"
    )
    if pair := versions.untested(versions.installed()):
        sys.stderr.write(f"warning: {pair}\n")
    try:
        main()
    except guard.Preempted:
        return guard.PREEMPTED
    except KeyboardInterrupt as interrupt:
        guard.failed(interrupt, "interrupted")
        return _refuse("interrupted: run the same command again to continue", 130)
    except Exception as error:
        guard.failed(error, str(error) or type(error).__name__)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return _refuse(f"{error}: free some space, then run the same command again", 1)
        if isinstance(error, OSError) and error.filename and error.strerror:
            return _refuse(f"{error.filename}: {error.strerror}", 1)
        if type(error).__name__ not in _FORESEEN and type(error) is not FileNotFoundError:
            raise
        return _refuse(str(error), 2 if isinstance(error, ValueError) else 1)
    return 0


# Command → flags that may be the address of a bucket; fields of --config are read elsewhere.
_ADDRESSES = {
    "train": ("workdir", "fork"),
    "sft": ("workdir",),
    "status": ("workdir",),
    "show": ("workdir",),
    "plot": ("workdir",),
    "export": ("workdir",),
    "evaluate": ("model", "data", "image_dir", "cache_dir"),
    "buckets": ("bucket",),  # of experiments.bench
}


def _check_addresses() -> None:
    """Refuses addresses where only a path can be meant: no folder called "gs:" is ever made.

    Raises:
      UsageError: names the flag, and says what writes to buckets.
    """
    allowed = _ADDRESSES.get(pathlib.Path(sys.argv[0]).stem, ())
    for name, value in flags.FLAGS.flag_values_dict().items():
        for text in value if isinstance(value, list) else [value]:
            # NAME=PATH in some; and a path from pathlib has lost a slash.
            path = text.rpartition("=")[2] if isinstance(text, str) else ""
            if name in _TEXTS or name.startswith("config.") or not _ADDRESS.match(path):
                continue
            if name in allowed and "://" in path:
                continue
            if name in allowed:
                raise UsageError(f"--{name}={text}: write two slashes, as in gs://BUCKET/FOLDER")
            raise UsageError(
                f"--{name}={text}: this must be on this host; only experiments.train and "
                "experiments.sft write to buckets, and status, show, plot, export and evaluate "
                "read runs there"
            )


_ADDRESS = re.compile(r"(gs|s3):/")
_TEXTS = ("find", "template", "system_prompt")  # flags that are no paths, whatever they say


def _expand_home() -> None:
    """Expands `~/` at the start of a flag to the home folder; no shell does so in `--out=~/x`."""
    for name, value in flags.FLAGS.flag_values_dict().items():
        if isinstance(value, str) and value.startswith("~/"):
            setattr(flags.FLAGS, name, str(files.local(value)))


_PLAIN = {
    "×": "x", "—": "-", "–": "-", "−": "-", "→": "->", "≤": "<=", "≥": ">=", "·": "*", "│": "|",
    "┊": ":",
}  # fmt: skip


def say_plainly() -> None:
    """Makes consoles without UTF-8 show what they can: no message may fail for its characters."""
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's or a test's may not
            stream.reconfigure(errors="plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Returns ASCII for signs an encoding lacks: … is three dots, others \\u…."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = [_ascii(sign) for sign in error.object[error.start : error.end]]
    return "".join(found), error.end


def _ascii(sign: str) -> str:
    plain = _PLAIN.get(sign) or unicodedata.normalize("NFKD", sign)
    return (
        plain.encode("ascii", "ignore").decode()
        or sign.encode("ascii", "backslashreplace").decode()
    )


# By name, because importing their modules would import jax before flags are read.
_FORESEEN = (
    "AgreementError", "BenchmarkError", "BucketError", "CheckpointError", "ClusterError",
    "ConfigError", "DataError", "GroupRewardError", "MeshError", "MetricsError", "MismatchError",
    "PlaceError", "StoreError", "TooManyFailures", "UsageError", "WeightsError", "WorkdirError",
)  # fmt: skip


def config_value(flag: Any) -> Any:
    """Returns the configuration of a config-file flag, loaded on first access.

    Raises:
      UsageError: the file does not exist or fails.
    """
    try:
        list(flag.value)
    except (OSError, TypeError) as error:
        cause = error.__cause__ or error
        said = " ".join(str(cause).split())
        raise UsageError(f"--config cannot be loaded: {type(cause).__name__}: {said}") from error
    return flag.value


def description(run: Any) -> str:
    """Describes the resolved run: configuration, data, batch arithmetic, parameters, memory."""
    import jax

    from luspo_jax.models import decoder_weights
    from luspo_jax.run import fields, length_controls
    from luspo_jax.run.arithmetic import batch_arithmetic
    from luspo_jax.run.memory import memory_estimate

    how, model = run.rule.logprobs.how, run.model.config
    layouts = how.layout, run.rollout_layout
    arithmetic, sampler = batch_arithmetic(run.config), run.sampler
    pace = run.settings.rollout
    in_flight = arithmetic.responses_per_step + pace.overlap * pace.group_size
    responses = -(-in_flight // len(run.roles.rollout))
    pages = sampler.pages_of(sampler.cache.gb * 1e9, responses)
    memory = memory_estimate(run.config, model, layouts, pages * sampler.page_bytes)
    leaves = fields.flat(run.config)
    shown = {k: v for k, v in leaves.items() if v is not None and v != ""}
    overlap = run.data.overlap()
    lines = [
        *(f"  {name} = {value}" for name, value in shown.items()),
        f"objective : {_objective(run)}",
        f"device(s) : {jax.device_count()} × {jax.devices()[0].device_kind}; training "
        f"{mesh_sizes(layouts[0])}; rollout {mesh_sizes(layouts[1])}; attention {how.attention}",
        f"model     : {run.model.folder.name}, {decoder_weights.num_params(model):,} parameters"
        + ("" if run.model.stop_token_ids else "; NO TOKEN ENDS A RESPONSE: all are cut"),
        *(f"training  : {report}" for report in run.data.reports),
        f"held out  : {run.data.held_out_report}"
        + (" — THE TRAINING SET ITSELF" if run.data.held_out_report in run.data.reports else ""),
        *([f"overlap   : {overlap}"] if overlap else []),
        f"prompts   : {len(run.data.stream):,} to train on ({run.data.stream.survey(*_SURVEY)}, "
        f"at data.max_prompt_length={run.config.data.max_prompt_length}), "
        f"{len(run.data.held_out):,} held out{_refused(run.data.refused)}; template "
        f"{run.data.template_hash}",
        f"rewards   : {', '.join((run.scorer.labels | run.group_scorer.labels).values())}",
        *(f"note      : {line}" for line in length_controls.notices(run.settings)),
        f"batch     : {arithmetic}{_sharing(run)}",
        *([f"in flight : {_pace(run)}"] if pace.overlap or run.apart else []),
        f"pages     : {pages - 1:,} of {sampler.page_tokens} tokens in "
        f"{pages * sampler.page_bytes / 1e9:.2f} GB a device, {sampler.how.paged_attention} "
        f"attention; up to {sampler.most_rows(responses)} responses at a time, "
        f"{(pages - 1) * sampler.page_tokens / sampler.most_rows(responses):,.0f} tokens each",
        f"memory    : about {sum(memory.values()) / 1e9:.2f} GB a device: "
        + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items() if size),
    ]
    return "\n".join(["configuration", *lines])


def _sharing(run):
    """Says whether responses share their prompt in training, or why not."""
    from luspo_jax.run import forwards

    why = forwards.why_not_shared(run.settings, run.model.config, run.rule.logprobs.how.layout)
    if not why:
        return "; a prompt is computed once for the responses that share its row"
    return f"; a prompt is computed with every response: {why}"


def _pace(run):
    """Says when a step ends, and who samples meanwhile."""
    pace = run.settings.rollout
    lines = []
    if pace.overlap:
        late = {"wait": "it waits for older ones", "drop": "older ones are DROPPED"}[pace.late]
        lines.append(
            f"{pace.prompts_per_step} + {pace.overlap} prompts; a step ends when "
            f"{pace.prompts_per_step} are complete, and takes them at most {run.asker.max_age} "
            f"step(s) after it began them: {late}"
        )
    if run.apart:
        lines.append(
            f"{run.settings.rollout_mesh.apart} device(s) sample the next step's responses while "
            "the others train"
        )
    return "; ".join(lines)


# Training problems that are checked for refused prompts, and after how many seconds no more are.
_SURVEY = 10_000, 20.0


def _refused(counts: Mapping[str, int]) -> str:
    """Describes the refused held-out problems, and why."""
    if not counts:
        return ""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return f" ({sum(counts.values()):,} not asked: {reasons})"


def _objective(run: Any) -> str:
    """Describes the preset, its axes, and the hyperparameters that it reads."""
    from luspo_jax.objectives.presets import used_hyperparameters

    objective = run.rule.objective
    axes = ("ratio", "surrogate", "length_scale", "aggregation", "advantage")
    shared = ("kl_coef", "entropy_coef", "correction", "old_policy", "loss_scale")
    return f"{run.config.objective.preset}: " + ", ".join(
        f"{name}={getattr(objective, name)}"
        for name in (*axes, *used_hyperparameters(objective), *shared)
    )


def mesh_sizes(layout: Any) -> str:
    """Formats the sizes of a mesh that are not 1."""
    if layout is None:
        return "on one"
    return " × ".join(f"{name} {size}" for name, size in layout.mesh.shape.items() if size > 1)


def _is_dry(name: str) -> bool:
    return name == "workdir" and bool(getattr(flags.FLAGS, "dry_run", False))


def _flag_message(error: BaseException, config: str) -> str:
    """Describes the error in the flags, with the nearest valid field for an unknown one."""
    unknown = _unknown_field(config)
    if unknown is not None:
        return unknown
    return str(error).replace("\\n", " ").strip("\"'") or type(error).__name__


def _unknown_field(config: str) -> str | None:
    """The first --config.a.b that cannot be set so, in words."""
    if not any(a.lstrip("-").removeprefix("no").startswith("config.") for a in sys.argv[1:]):
        return None
    from luspo_jax.run import fields  # which imports jax: a typo elsewhere is answered at once

    names = fields.flat(getattr(fields, config)())
    for argument in sys.argv[1:]:
        name, equals, value = argument.lstrip("-").partition("=")
        if not name.removeprefix("no").startswith("config."):
            continue
        field = name.removeprefix("no").removeprefix("config.")
        section = next((s for s in fields.OPEN_SECTIONS if f"{field}.".startswith(s)), None)
        if section is not None and equals:
            wrong = _wrong_entry(field, section.rstrip("."), value)
            if wrong:
                return wrong
        elif section is None and field not in names:
            instead = fields.instead_of(field, _flags(names))
            return f"the configuration has no field {field!r}: {instead}"
    return None


def _flags(fields: Iterable[str]) -> list[str]:
    return [f"--config.{field}" for field in fields]


def _wrong_entry(field: str, section: str, value: str) -> str | None:
    """Explains how to write an unreadable flag of a section with user-defined names."""
    flag = f"--config.{field}"
    if field != section:  # absl knows only the entries in the file
        entry, *deeper = field.removeprefix(f"{section}.").split(".")
        if flag.removeprefix("--") in flags.FLAGS:
            return None
        inside = f"{{'{deeper[-1]}': …}}" if deeper else "…"
        return (
            f"{flag}: a flag changes an entry that the file has; write the whole section, as "
            f"\"--config.{section}={{'{entry}': {inside}}}\""
        )
    try:
        sound = isinstance(ast.literal_eval(value), dict)
    except (ValueError, SyntaxError):
        sound = False
    if sound:
        return None
    return (
        f"{flag}={value} is no dictionary: write \"{flag}={{'name': value}}\", names in quotes and "
        "the whole in double quotes"
    )


def _refuse(message: str, status: int) -> int:
    name = os.path.basename(sys.argv[0])
    name = spoken(name.removesuffix(".py")) if installed else name
    sys.stderr.write(f"{name}: {fetched.shown(message)}\n")
    return status
