"""Finds the launcher that `luspo COMMAND …` means and runs it as `python -m experiments.COMMAND`.

The launcher is run by its own code, with its own flags. Only three things are added: configurations
and sweeps that come with the program have names (`quickstart` is configs/quickstart.py), the
argument that a command is about needs no flag (`luspo train quickstart`), and help lists the fields
of a configuration. Nothing here imports jax: `luspo --help` answers at once.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import pathlib
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence

from luspo import completion, fields, places


@dataclasses.dataclass(frozen=True)
class Command:
    """A launcher behind the door.

    Attributes:
      about: what it does, in a line.
      alone: flag that an argument without a name sets; empty where the launcher reads it itself.
      kind: configuration whose fields `--config.…` sets; empty without one.
    """

    about: str
    alone: str = ""
    kind: str = ""


COMMANDS = {
    "train": Command("train a model: RL with verifiable rewards", "config", "Settings"),
    "sft": Command("fine-tune on demonstrations, before RL", "config", "SftSettings"),
    "evaluate": Command("measure a model on benchmarks", "model"),
    "sweep": Command("run variants × seeds, and compare them", "sweep"),
    "rehearse": Command("compile a run for a machine that is not there", "config", "Settings"),
    "checkup": Command("check that this machine computes what it should", "config", "Settings"),
    "status": Command("say what runs are doing"),
    "preview": Command("show the first prompts, token by token", "config", "Settings"),
    "show": Command("show a run's responses"),
    "plot": Command("draw a run: summary, lengths, tokens, pressure", "workdir"),
    "export": Command("write a checkpoint as a Hugging Face folder", "workdir"),
    "tasks": Command("list the generated tasks of reasoning-gym, or show one", "task"),
}

# Flags whose value may be the name of something that comes with the program → its folder.
_NAMED = {"config": "configs", "sweep": "configs/sweeps"}


class Refused(ValueError):
    """The words do not say what to do; the message is one line."""


def main() -> int:
    """Runs the program; returns its exit status, which is 2 if the words cannot be read."""
    words = sys.argv[1:] or ["--help"]
    try:
        name, *rest = words
        if name in OWN:
            return _say(OWN[name], rest)
        if name not in COMMANDS:
            raise _unknown("command", name, [*COMMANDS, *_WORDS], "luspo")
        given = arguments(name, rest)
        if {"--help", "-help", "-h"} & set(rest):
            return _say(lambda _: help_of(name), [])
        return run(name, given)
    except Refused as refusal:
        sys.stderr.write(f"luspo: {refusal}\n")
        return 2


def arguments(name: str, words: Sequence[str]) -> list[str]:
    """Returns the words after `luspo NAME` as the flags that the launcher takes.

    Raises:
      Refused: the name of no configuration.
    """
    flag, given, before = COMMANDS[name].alone, [], "="
    for word in _joined(words):
        # After `--workdir` without "=" a word is that flag's value.
        if flag and "=" in before and not word.startswith("-"):
            word, flag = f"--{flag}={word}", ""
        given.append(_with_file(word))
        before = word
    return given


def _joined(words: Sequence[str]) -> list[str]:
    """Returns the words with `--config NAME` as `--config=NAME`."""
    joined = []
    for word in words:
        if joined and joined[-1] in [f"--{flag}" for flag in _NAMED] and not word.startswith("-"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _with_file(word: str) -> str:
    """Returns `--config=NAME` with the file that comes with the program under this name."""
    name, _, value = word.lstrip("-").partition("=")
    if not word.startswith("-") or name not in _NAMED or not value:
        return word
    shipped = places.configs(_NAMED[name])
    if value in shipped:
        return f"--{name}={shipped[value]}"
    if os.sep not in value and not value.endswith(".py") and ".py:" not in value:
        what = "configuration" if name == "config" else name
        raise _unknown(what, value, shipped, "luspo")
    file = places.root() / value  # as the documents name it: configs/quickstart.py
    if not pathlib.Path(value).exists() and file in shipped.values():
        return f"--{name}={file}"
    return word


def run(name: str, given: Sequence[str]) -> int:
    """Runs a launcher as `python -m` does, and returns its exit status."""
    folder, module = str(places.root()), f"experiments.{name}"
    # The program's own `experiments` comes before any other; modules of the working folder, such
    # as a user's rewards, are found as `python -m` finds them, but last.
    sys.path[:] = [folder, *(p for p in sys.path if p != folder), os.getcwd()]
    from experiments import command

    command.installed = True
    sys.argv = [module, *given]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exit_:
        if exit_.code is None or isinstance(exit_.code, int):
            return exit_.code or 0
        raise
    return 0


def help_of(name: str) -> str:
    """Returns a command's help: the launcher's own, as it is said here, and all fields."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(name, ["--help"])
    text = re.sub(r"^\S*experiments.\w+\.py:$", "Flags:", said.getvalue(), flags=re.MULTILINE)
    text = re.sub(r"python -m experiments\.", "luspo ", text)
    text = re.sub(r"--(?:config|sweep)=configs/(?:sweeps/)?(\w+)\.py", r"\1", text)
    kind = COMMANDS[name].kind
    head = "Fields of the configuration, each with its default and type:"
    return f"{text}\n{head}\n\n{fields.listing(kind)}" if kind else text


def overview() -> str:
    """Returns the commands and configurations, a line each."""
    lines = ["luspo: reinforcement learning with verifiable rewards in JAX", ""]
    lines += ["  luspo train quickstart --workdir=/tmp/quickstart", "", "Commands:"]
    said = {name: known.about for name, known in COMMANDS.items()} | _WORDS
    lines += _table(said)
    for title, under in (("Configurations", "configs"), ("Sweeps", "configs/sweeps")):
        found = places.configs(under)
        lines += ["", f"{title}, by name, or the path of your own file:"]
        lines += _table({name: places.about(file) for name, file in found.items()})
    return "\n".join([*lines, "", "luspo COMMAND --help lists flags, and every field."])


def _table(said: dict[str, str]) -> list[str]:
    width = max(map(len, said))
    return [f"  {name:<{width}}  {text}" for name, text in said.items()]


def _overview(rest):
    if rest and rest[0] in COMMANDS:
        return help_of(rest[0])
    if rest and rest[0] not in OWN:
        raise _unknown("command", rest[0], [*COMMANDS, *_WORDS], "luspo")
    return overview()


def _fields(rest):
    kinds = [word for word in rest if word == "--sft"]
    prefixes = [word for word in rest if not word.startswith("-")]
    if len(kinds) + len(prefixes) < len(rest) or len(prefixes) > 1:
        raise Refused("luspo fields [--sft] [PREFIX]: one prefix, such as rollout or train.learn")
    kind = "SftSettings" if kinds else "Settings"
    prefix = "".join(prefixes).removeprefix("--").removeprefix("config.")
    found = fields.listing(kind, prefix)
    if not found:
        names = [field.name for section in fields.sections(kind) for field in section.fields]
        names += [section.name for section in fields.sections(kind)]
        raise _unknown("field that begins with", prefix, names, "luspo fields")
    return found


def _completion(rest):
    if len(rest) != 1 or rest[0] not in completion.SHELLS:
        raise Refused(f"luspo completion SHELL, one of {', '.join(completion.SHELLS)}")
    known = {
        name: completion.words(command.about, name, command.alone, command.kind)
        for name, command in COMMANDS.items()
    }
    names = {"completion": (*completion.SHELLS,), "help": (*COMMANDS,)}
    names["fields"] = tuple(s.name for s in fields.sections("Settings") if s.name)
    known |= {name: completion.Words(about, names[name]) for name, about in _WORDS.items()}
    return completion.SHELLS[rest[0]](known)


def _version(rest):
    from importlib import metadata  # as slow as all the rest

    try:
        return f"luspo_jax {metadata.version('luspo_jax')}"
    except metadata.PackageNotFoundError:
        return "luspo_jax, not installed"


# Commands of the door itself → their line in the overview.
_WORDS = {
    "fields": "list the fields of a configuration: luspo fields [--sft] [PREFIX]",
    "completion": "print what completes this program in bash, zsh or fish",
    "help": "print this, or the help of a command",
}

OWN: dict[str, Callable[[Sequence[str]], str]] = {
    "fields": _fields,
    "completion": _completion,
    "help": _overview,
    "--help": _overview,
    "-h": _overview,
    "--version": _version,
}


def _say(text: Callable[[Sequence[str]], str], rest: Sequence[str]) -> int:
    """Prints; a reader that has seen enough, as `| head`, is no error."""
    said = text(rest)
    if hasattr(sys.stdout, "reconfigure"):  # a test's may not
        sys.stdout.reconfigure(errors="replace")
    try:
        print(said.rstrip(), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _unknown(what: str, name: str, names: Iterable[str], lister: str) -> Refused:
    close = difflib.get_close_matches(name, list(names), n=1)
    hint = f"did you mean {close[0]!r}?" if close else "nothing has a name like it;"
    return Refused(f"no {what} {name!r}: {hint} `{lister}` lists them")
