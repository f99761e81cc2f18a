"""The section of the data: problems, and how they become prompts."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from luspo_jax.datasets import DATASETS
from luspo_jax.datasets.filters import Filter, FilterError
from luspo_jax.hosts.values import Number, OneOf, Rule, Text, check_fields, shown
from luspo_jax.prompts.templates import TARGET, TEMPLATES

_LONGEST = 2**24  # tokens
_ROWS = Number(0, 2**53)
_SPLIT = Text("say train, or another split of the dataset")


def open_section() -> Any:
    """Returns a section whose field names the user chooses."""
    return dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Problems for training and evaluation, and how they become prompts."""

    name: str = ""  # One of luspo_jax.datasets.DATASETS.
    # File of a dataset that is not generated, several as "DIR/*.parquet", or a folder of them; or
    # their address, gs://… or s3://…; or hub:OWNER/NAME, perhaps with /FILE, /FOLDER or /PATTERN.
    path: str = ""
    split: str = "train"  # Of a dataset, folder or repository with several splits.
    subset: str = ""  # Of a repository or folder with several tables.
    # Rows to take, such as 'difficulty >= 3 and source != "x"'; empty = all. See docs/data.md.
    filter: str = ""
    limit: int = 0  # Only the first so many rows, before the filter; 0 = all.
    # Read these rows of hub:OWNER/NAME without downloading its files, and the held-out ones if
    # eval_limit is set; once, into the user's cache. Needs the package datasets.
    streaming: bool = False
    options: Mapping[str, Any] = open_section()  # Of a generated dataset.
    # Several training sources instead of `name`: your name → {name, path, split, subset, filter,
    # limit, streaming, weight, problem_column, answer_column, image_column, image_dir}; weight is a
    # share of the prompts.
    mixture: Mapping[str, Any] = open_section()
    eval_name: str = ""  # Held-out set; empty = data.name.
    # Of a generated held-out set; empty = data.options, if the dataset is the same.
    eval_options: Mapping[str, Any] = open_section()
    eval_path: str = ""  # Empty = data.path, if the dataset is the same.
    eval_split: str = "test"  # Of the held-out set.
    eval_subset: str = ""  # The same; empty = data.subset, if the path is the same.
    eval_filter: str = ""  # The same; empty = all rows, whatever data.filter is.
    eval_limit: int = 0  # The same as data.limit.
    cache_dir: str = ""  # Folder or address for built datasets; empty = the user's cache folder.
    # Of the user's own files; with dots for nested ones, as prompt.0.content. A list of messages,
    # {role, content}, is a conversation whose last message is the problem.
    problem_column: str = ""
    answer_column: str = ""  # The same.
    eval_problem_column: str = ""  # Of the held-out set; empty = as the training set's.
    eval_answer_column: str = ""  # The same.
    eval_image_column: str = ""  # The same.
    drop_bad_rows: bool = False  # Drop and count rows that cannot be used, instead of refusing.
    # One of luspo_jax.prompts.templates.TEMPLATES, or your own text, such as
    # "{problem}\nAnswer with a number." It has {problem} once, and other columns as {hint}.
    template: str = "plain"
    # Whether such a text is a user message in the tokenizer's chat template, or the whole prompt;
    # unset = a message if the tokenizer has a chat template.
    template_chat: bool | None = None
    system_prompt: str = ""  # For a chat template; empty = the template's own.
    enable_thinking: bool | None = None  # Passed to the chat template if set.
    # Of an image, for models that read them; 0 = as in the model's preprocessor_config.json.
    min_pixels: int = 0
    max_pixels: int = 0  # The same.
    image_column: str = ""  # Empty = the dataset's; in a file, image or images.
    image_dir: str = ""  # Folder or address of images; empty = the data file's.
    eval_image_dir: str = ""  # The same for a held-out set with its own file.
    blank_images: bool = False  # Replace images by white ones of equal size, to measure guessing.
    text_blank: int = 0  # Side of a white image for problems without one; 0 = none.
    image_workers: int = 0  # Processes that decode images; 0 = one per core, at most 8.
    max_prompt_length: int = 1024  # Tokens; longer prompts are dropped and counted.
    # Fewest tokens that a prompt may ask for: drawn for each problem, and stated by the template as
    # {target_length}. Both bounds 0 = prompts ask for no length.
    length_target_low: int = 0
    length_target_high: int = 0  # Most tokens that a prompt may ask for.

    RULES: ClassVar[dict[str, Rule]] = {
        "name": OneOf(DATASETS),
        "split": _SPLIT,
        "limit": _ROWS,
        "eval_limit": _ROWS,
        "eval_name": OneOf(("", *DATASETS)),
        "eval_split": Text("say test, or another split of the dataset"),
        "template": OneOf(TEMPLATES, mark="{problem}"),
        "min_pixels": Number(0, 2**31 - 1),
        "max_pixels": Number(0, 2**31 - 1),
        "text_blank": Number(0, 2**14),
        "image_workers": Number(0, 1024),
        "max_prompt_length": Number(1, _LONGEST),
        "length_target_low": Number(0, _LONGEST),
        "length_target_high": Number(0, _LONGEST),
    }

    def __post_init__(self):
        check_fields(self, "data.", self._wrong())

    def _wrong(self):
        template, named = self.template, TEMPLATES.get(self.template)
        told = self.system_prompt != "" or self.enable_thinking is not None
        if named is not None and not named.chat and told:
            yield (
                f"data.template={template!r} is no chat template: data.system_prompt and "
                "data.enable_thinking would be ignored; take data.template=chat, or leave them out"
            )
        if named is not None and self.template_chat is not None:
            yield (
                "data.template_chat is of a template of your own, which holds {problem}: "
                f"data.template={template} is a named one, which says so itself"
            )
        yield from self._wrong_targets()
        yield from self._wrong_selection()
        if 0 < self.max_pixels < self.min_pixels:
            yield f"data.min_pixels={self.min_pixels} exceeds data.max_pixels={self.max_pixels}"

    def _wrong_selection(self):
        for field in ("filter", "eval_filter"):
            yield from wrong_filter(f"data.{field}", getattr(self, field))
        if self.streaming and not self.limit:
            yield "data.streaming takes the first data.limit rows: set data.limit"
        for field in ("subset", "filter", "limit", "streaming") if self.mixture else ():
            if getattr(self, field):
                yield (
                    f"data.{field} is of data.name: with data.mixture, set it in its sources, "
                    f"such as data.mixture.{next(iter(self.mixture))}"
                )

    def _wrong_targets(self):
        low, high = self.length_target_low, self.length_target_high
        text = TEMPLATES[self.template].text if self.template in TEMPLATES else self.template
        states = f"{{{TARGET}}}" in text
        if (low, high) != (0, 0) and not 0 < low <= high:
            yield (
                f"data.length_target_low={low} and data.length_target_high={high} must be 1 or "
                "more, the first at most the second; both 0 ask for no length"
            )
        elif high and not states:
            yield (
                f"data.length_target_high={high} draws a length for each prompt, and "
                f"data.template={shown(self.template)} does not state it: take "
                f"data.template=length, or put {{{TARGET}}} into yours"
            )
        elif states and not high:
            yield (
                f"data.template={shown(self.template)} states {{{TARGET}}}: set "
                "data.length_target_low and data.length_target_high, from which it is drawn"
            )


def wrong_filter(field: str, text: str) -> Iterator[str]:
    """Yields a line if a field holds no filter."""
    try:
        if text:
            Filter(text)
    except FilterError as error:
        yield f"{field}={error}"


# Field of a source in data.mixture → (type, rule for its value).
SOURCE_FIELDS: dict[str, tuple[type, Rule | None]] = {
    "name": (str, OneOf(DATASETS)),
    "path": (str, None),
    "split": (str, _SPLIT),
    "subset": (str, None),
    "filter": (str, None),
    "limit": (int, _ROWS),
    "streaming": (bool, None),
    "weight": (float, Number(0, 1e15, open_low=True)),
    "problem_column": (str, None),
    "answer_column": (str, None),
    "image_dir": (str, None),
    "image_column": (str, None),
}
