"""What completes the program in a shell: commands, configurations, flags, fields and their values.

A script holds all words, so that a shell completes at once and starts no Python:
`source <(luspo completion bash)`. It is of the version that printed it.
"""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping

from luspo import fields, flags, places
from luspo.fields import Field
from luspo.flags import Flag


@dataclasses.dataclass(frozen=True)
class Words:
    """What may follow a command.

    Attributes:
      about: the command's line in the overview.
      names: of the configurations or sweeps that come with the program, and can be its argument.
      flags: its own flags.
      fields: the fields that it takes as `--config.NAME`.
    """

    about: str
    names: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()
    fields: tuple[Field, ...] = ()


def words(about: str, command: str, alone: str, kind: str) -> Words:
    """Returns what may follow a launcher."""
    names = {"config": places.configs(), "sweep": places.configs("configs/sweeps")}.get(alone, {})
    # Configurations of fine-tuning are named sft_….
    mine = [n for n in names if alone != "config" or n.startswith("sft_") == (kind[:3] == "Sft")]
    found = [f for section in fields.sections(kind) for f in section.fields] if kind else []
    return Words(about, tuple(mine), tuple(flags.flags(command)), tuple(found))


def bash(known: Mapping[str, Words]) -> str:
    """Returns the script for bash."""
    cases, values = [], {}
    for command, said in known.items():
        given = [f"--{f.name}{'=' * f.takes_value}" for f in said.flags]
        given += [f"--config.{f.name}=" for f in said.fields]
        cases.append(
            f"    {command}) names={_quoted(said.names)} flags={_quoted([*given, '--help'])} ;;"
        )
        values |= {f"{command} --{f.name}": f.values for f in said.flags if f.values}
    choices = [f"    {shlex.quote(flag)}) values={_quoted(v)} ;;" for flag, v in values.items()]
    return _BASH.format(commands=_quoted(known), cases="\n".join(cases), choices="\n".join(choices))


_BASH = """\
# Completes luspo in bash: source <(luspo completion bash)
_luspo() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
  local flag='' names='' flags='' values=''
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W {commands} -- "$word"))
    return
  fi
  case ${{COMP_WORDS[1]}} in
{cases}
  esac
  # bash makes words of their own of --flag, = and the value.
  if [ "$word" = = ]; then flag=$before word=''; fi
  if [ "$before" = = ]; then flag=${{COMP_WORDS[COMP_CWORD-2]}}; fi
  if [ -n "$flag" ]; then
    case "${{COMP_WORDS[1]}} $flag" in
{choices}
    *' --config' | *' --sweep') values=$names ;;
    esac
    COMPREPLY=($(compgen -W "$values" -- "$word"))
  elif [[ $word == -* ]]; then
    COMPREPLY=($(compgen -W "$flags" -- "$word"))
    if [[ ${{COMPREPLY[0]}} == *= ]]; then compopt -o nospace; fi
  else
    COMPREPLY=($(compgen -W "$names" -- "$word"))
  fi
}}
complete -o default -F _luspo luspo"""


def zsh(known: Mapping[str, Words]) -> str:
    """Returns the script for zsh."""
    cases = []
    for command, said in known.items():
        given = [_entry(f"--{f.name}{'=' * f.takes_value}", f.about) for f in said.flags]
        given += [_entry(f"--config.{f.name}=", f.about) for f in said.fields]
        given.append(_entry("--help", "flags, and fields of the configuration"))
        named = " ".join(map(shlex.quote, said.names))
        listed = "\n      ".join(map(shlex.quote, given))
        chosen = [
            f"    {shlex.quote(f'{command} --{f.name}')}) values=({' '.join(f.values)}) ;;"
            for f in said.flags
            if f.values
        ]
        cases.append((f"    {command}) names=({named}) flags=(\n      {listed}\n    ) ;;", chosen))
    return _ZSH.format(
        commands="\n    ".join(shlex.quote(_entry(c, said.about)) for c, said in known.items()),
        cases="\n".join(case for case, _ in cases),
        choices="\n".join(line for _, lines in cases for line in lines),
    )


_ZSH = """\
#compdef luspo
# Completes luspo in zsh: source <(luspo completion zsh), after compinit
_luspo() {{
  local -a commands names flags values
  commands=(
    {commands}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  case $words[2] in
{cases}
  esac
  if [[ $PREFIX == --*=* ]]; then
    local flag=${{PREFIX%%=*}}
    case "$words[2] $flag" in
{choices}
    *' --config' | *' --sweep') values=($names) ;;
    esac
    compset -P '*='
    if (( $#values )); then compadd -a values; else _files; fi
  elif [[ $PREFIX == -* ]]; then
    _describe -o flag flags -S ''
  else
    compadd -a names
    _files
  fi
}}
compdef _luspo luspo"""


def fish(known: Mapping[str, Words]) -> str:
    """Returns the script for fish."""
    lines = ["# Completes luspo in fish: luspo completion fish | source"]
    first = "complete -c luspo -n __fish_use_subcommand -f"
    lines += [f"{first} -a {c} -d {_fish(said.about)}" for c, said in known.items()]
    for command, said in known.items():
        after = f"complete -c luspo -n '__fish_seen_subcommand_from {command}'"
        if said.names:
            files = "" if said.flags else " -f"  # the door's own commands read none
            lines.append(f"{after}{files} -a {_fish(' '.join(said.names))}")
        for f in said.flags:
            value = f" -x -a {_fish(' '.join(f.values))}" if f.values else " -r" * f.takes_value
            lines.append(f"{after} -l {f.name}{value} -d {_fish(_short(f.about))}")
        lines += [f"{after} -l config.{f.name} -r -d {_fish(_short(f.about))}" for f in said.fields]
    return "\n".join(lines)


# Shell → the function that writes its script.
SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def _quoted(said: Iterable[str]) -> str:
    return shlex.quote(" ".join(said))


def _entry(name: str, about: str) -> str:
    """Returns `name:about` as zsh's _describe reads it."""
    return f"{name.replace(':', chr(92) + ':')}:{_short(about)}"


def _short(about: str) -> str:
    return about if len(about) <= _MOST else f"{about[: _MOST - 1]}…"


_MOST = 70  # characters of a description


def _fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
