"""Pages of the reference, written from declarations: fields, metrics, commands, configurations."""

import ast
import functools
import html
import re

from experiments.site.tree import ROOT
from luspo import fields, places
from luspo.program import COMMANDS
from luspo_jax.hosts.values import Number, OneOf, Rule, Text
from luspo_jax.metrics import METRICS

_FEW = 16  # names that a cell lists
_NO_LIMIT = r" and at most (\d{8,}|\de\+\d+)"  # a bound that keeps a number finite

_FIELDS = """\
Every field of `config`, from the comments where it is declared. A flag sets one:
`--config.{example}`; an unknown name is refused, and the message has the nearest one.
In a terminal, `luspo fields{kind} {prefix}` lists those that begin so.
"""
_METRICS = """\
Every metric, from its declaration in `luspo_jax/metrics.py`. `*` stands for one or more parts of a
name: a dataset, a length bin, a source. *Combined* says how values of one step become one, over
micro-batches, updates and processes. They are written to `metrics.jsonl` and to every tracker that
`config.output` names.
"""


def pages() -> dict[str, str]:
    """Returns place in the site → Markdown of each page of the reference."""
    return {
        "reference/fields.md": fields_page("Settings", "Fields of a run", "rollout.group_size=16"),
        "reference/sft_fields.md": fields_page(
            "SftSettings", "Fields of fine-tuning", "train.batch_size=16"
        ),
        "reference/metrics.md": metrics_page(),
        "reference/commands.md": commands_page(),
    }


@functools.cache
def anchors(fine_tuning: bool = False) -> dict[str, str]:
    """Returns name → place, with its anchor, of each field and metric that a page explains.

    A field of both kinds of configuration is that of a run, or that of fine-tuning.
    """
    kinds = [("Settings", "fields"), ("SftSettings", "sft_fields")]
    found = {name: f"reference/metrics.md#{anchor(name)}" for name in METRICS}
    for kind, page in kinds if fine_tuning else reversed(kinds):
        for section in fields.sections(kind):
            for field in section.fields:
                found[field.name] = f"reference/{page}.md#{field.name}"
    return found


def anchor(name: str) -> str:
    """Returns a metric's name as the id of an element."""
    return name.replace("*", "any")


def fields_page(kind: str, title: str, example: str) -> str:
    """Returns the page of one kind of configuration, `Settings` or `SftSettings`."""
    from luspo_jax.objectives.objective import CHOICES
    from luspo_jax.run import settings

    rules = settings.rules(getattr(settings, kind))
    chosen = {f"objective.{name}": OneOf(names) for name, names in CHOICES.items()}
    prefix = example.partition("_")[0]
    option = {"SftSettings": " --sft"}.get(kind, "")
    parts = [f"# {title}\n", _FIELDS.format(example=example, prefix=prefix, kind=option)]
    for section in fields.sections(kind):
        parts.append(f"\n## {section.name or 'The run'}\n\n{_escaped(section.about)}\n")
        parts.append("| field | type | default | meaning |\n|---|---|---|---|")
        for field in section.fields:
            rule = rules.get(field.name) or chosen.get(field.name)
            about = " ".join(filter(None, [_sentence(field.about), _allowed(rule)]))
            cells = (
                f'<span id="{field.name}"></span>`{field.name}`',
                field.type.replace("|", r"\|"), f"`{field.default}`", _escaped(about),
            )  # fmt: skip
            parts.append(f"| {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def metrics_page() -> str:
    """Returns the page of metrics, by the first part of their names."""
    parts = [f"# Metrics\n\n{_METRICS}"]
    groups: dict[str, list] = {}
    for metric in METRICS.values():
        root = metric.name.partition("/")[0] if "/" in metric.name else "Of the whole step"
        groups.setdefault(root, []).append(metric)
    for root, metrics in groups.items():
        parts.append(f"\n## {root}\n\n| metric | unit | combined | meaning |\n|---|---|---|---|")
        for m in metrics:
            name = f'<span id="{anchor(m.name)}"></span>`{m.name}`'
            parts.append(f"| {name} | {m.unit} | {m.reducer} | {_escaped(m.meaning)} |")
    return "\n".join(parts) + "\n"


def commands_page() -> str:
    """Returns the page of launchers and of the configurations that come with the program."""
    lines = ["# Commands and configurations\n"]
    lines.append("`luspo NAME …` is `python -m experiments.NAME …`; `--help` lists its flags.\n")
    lines.append("| command | |\n|---|---|")
    lines += [f"| `luspo {name}` | {command.about} |" for name, command in COMMANDS.items()]
    for title, folder in (("Configurations", "configs"), ("Sweeps", "configs/sweeps")):
        lines.append(f"\n## {title}\n\n| `{folder}/` | |\n|---|---|")
        for name, file in sorted(places.configs(folder).items()):
            about = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").strip()
            path = file.relative_to(ROOT).as_posix()
            lines.append(f"| [`{name}`](../../{path}) | {_escaped(about.partition(chr(10))[0])} |")
    return "\n".join(lines) + "\n"


def _allowed(rule: Rule | None) -> str:
    """Returns a rule in words; empty for bounds that only keep numbers finite or nonempty."""
    if isinstance(rule, OneOf) and len(rule.names) <= _FEW:
        names = ", ".join(f"`{name}`" if name else "empty" for name in rule.names)
        return f"One of {names}" + (f", or a text with `{rule.mark}`." if rule.mark else ".")
    if isinstance(rule, Number):
        return f"Allowed: {re.sub(_NO_LIMIT, '', str(rule))}."
    return "Must be set." if isinstance(rule, Text) and rule.remedy.startswith("name") else ""


def _sentence(text: str) -> str:
    """Returns a comment with a full stop at its end."""
    return text if not text or text[-1] in ".:;?!" else f"{text}."


def _escaped(text: str) -> str:
    """Returns text for a cell of a table, outside code: no marks of Markdown or HTML."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = [re.sub(r"([\\*_|\[\]])", r"\\\1", html.escape(x, quote=False)) for x in parts[::2]]
    code = [part.replace("|", r"\|") for part in parts[1::2]]
    return "".join(x for pair in zip(plain, [*code, ""], strict=True) for x in pair)
