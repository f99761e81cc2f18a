"""Prompt templates, by name or as text with `{problem}`, and system messages."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from luspo_jax.datasets.dapo_math import PREFIX, SUFFIX
from luspo_jax.datasets.example import DataError
from luspo_jax.datasets.table import text as cell_text
from luspo_jax.hosts.values import nearest

# A column's name in braces. Braces after a LaTeX command hold its argument: \boxed{answer},
# \frac{a}{b}.
_FIELD = re.compile(r"\{problem\}|(?<![A-Za-z}\\^_])\{([A-Za-z_][\w.]*)\}")
PROBLEM = "problem"
TARGET = "target_length"  # the tokens that a prompt asks for, drawn for each problem


@dataclasses.dataclass(frozen=True)
class Template:
    """The message in which a problem is put to the model.

    Attributes:
      text: the message, with `{problem}` in place of the problem, and other columns' names in
        braces in place of their values.
      chat: whether the text is a user message in the tokenizer's chat template, or the whole
        prompt.
    """

    text: str
    chat: bool

    def __post_init__(self):
        if self.text.count("{problem}") != 1:
            raise ValueError(f"a template must hold {{problem}} once: {self.text!r}")

    @property
    def columns(self) -> tuple[str, ...]:
        """Returns the columns that the text names besides the problem."""
        return tuple(dict.fromkeys(filter(None, _FIELD.findall(self.text))))

    def fill(self, problem: str, columns: Mapping[str, Any] | None = None) -> str:
        """Fills in a problem; braces in the problem or a column stay unchanged.

        Raises:
          DataError: the text names a column that the problem lacks, or that is not text.
        """
        return _FIELD.sub(lambda field: _value(field[1], problem, columns or {}), self.text)


def _value(name: str | None, problem: str, columns: Mapping[str, Any]) -> str:
    if name is None:
        return problem
    if name not in columns:
        raise DataError(
            f"the template names the column {{{name}}}; there are: "
            f"{', '.join(f'{{{known}}}' for known in (PROBLEM, *columns))}"
        )
    try:
        return cell_text(columns[name])
    except ValueError as error:
        raise DataError(f"the template names the column {{{name}}}, which {error}") from error


TEMPLATES = {
    "answer_tag": Template(
        "{problem}\n\nThink step by step, then write the final answer alone between <answer> and "
        "</answer>.",
        chat=True,
    ),
    "boxed": Template(
        "{problem}\n\nReason step by step and put the final answer in \\boxed{}.", chat=True
    ),
    "chat": Template("{problem}", chat=True),
    "dapo": Template(f"{PREFIX}{{problem}}{SUFFIX}", chat=True),
    # For L1's rewards (arXiv:2503.04697): the prompt states the length that is paid for.
    "length": Template(
        "{problem}\n\nSpend about {target_length} tokens on the answer, and put its result in "
        "\\boxed{}.",
        chat=True,
    ),
    "plain": Template("{problem}", chat=False),
    # As DeepSeek-R1's README recommends, without a system message.
    "r1": Template(
        "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
        chat=True,
    ),
}

# The system message of arXiv:2602.05261, figure 3; the format "luspo_vl" checks its requirements.
LUSPO_VL_SYSTEM_PROMPT = (
    "Solve the question. When the user asks a question, first think through the reasoning process "
    "internally. Present this reasoning process explicitly, enclosed within <think> </think> tags. "
    "Then, provide the final answer in LaTeX format, wrapped in $...$, and ensure the answer is "
    "enclosed in the \\boxed{} command. The answer should be placed within <answer> </answer> "
    "tags. For example: <think> Since $1+1=2$, so the answer is $2$. </think> <answer> The answer "
    "is $\\boxed{2}$ </answer>. The output must always begin with <think> and end with </answer>."
)

SYSTEM_PROMPTS = {"": "", "luspo_vl": LUSPO_VL_SYSTEM_PROMPT}


def template(value: str, *, chat: bool = True) -> Template:
    """Returns the template with a name in TEMPLATES, or of a text with `{problem}`.

    Args:
      value: the name or the text.
      chat: whether a text is a user message in the tokenizer's chat template.

    Raises:
      ValueError: an unknown name that is not such a text.
    """
    if "{problem}" in value:
        return Template(value, chat)
    if value in TEMPLATES:
        return TEMPLATES[value]
    raise ValueError(
        f"unknown template {value!r}: {nearest(value, TEMPLATES)}; a template of your own holds "
        "{problem}"
    )
