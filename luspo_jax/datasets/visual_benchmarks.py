"""Visual benchmarks: the annotation files of their authors, and the hub's copies of them.

Every row is kept, named by `meta["id"]`; `meta` carries what the scorers in
`luspo_jax/benchmarks/` group by.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

from luspo_jax.datasets.example import DataError, Example
from luspo_jax.datasets.rows import KEY
from luspo_jax.datasets.table import Table, optional_text, read_examples

MATHVISTA = Table(
    problem=("question",),
    answer=("answer",),
    meta=("unit", "precision"),
    fields={
        "choices": ("choices",),
        "question_type": ("question_type",),
        "answer_type": ("answer_type",),
        "task": ("metadata.task", "task"),
        "skills": ("metadata.skills", "skills"),
    },
    identity=(("pid",),),
    images=("image",),
    origin="huggingface.co/datasets/AI4Math/MathVista",
)
# A command whose backslash was read as an escape when the file was written: \frac as form feed +
# "rac". These control characters have no other business in an answer.
_ESCAPES = str.maketrans({"\f": r"\f", "\b": r"\b", "\v": r"\v", "\a": r"\a"})


def unescaped(cell) -> str:
    """An answer with the backslashes of its LaTeX commands restored."""
    return optional_text(cell.translate(_ESCAPES) if isinstance(cell, str) else cell)


MATHVISION = Table(
    problem=("question",),
    answer=("answer",),
    clean_answer=unescaped,
    fields={"choices": ("options",), "subject": ("subject",), "level": ("level",)},
    identity=(("id",),),
    images=("image",),
    origin="huggingface.co/datasets/MathLLMs/MathVision",
)
# The problem of the version "Vision Only" stands in the image alone. The files of the authors'
# visualizer name some columns otherwise.
MATHVERSE = Table(
    problem=("question",),
    answer=("answer",),
    meta=("choices", "question_for_eval", "query_cot"),
    clean_problem=optional_text,
    fields={
        "question_type": ("question_type",),
        "problem_version": ("problem_version", "metadata.problem_version"),
        "subject": ("metadata.subject", "metadata.subjects"),
        "subfield": ("metadata.subfield", "metadata.subfields"),
    },
    identity=(("sample_index", "pid"),),
    images=("image",),
    origin="huggingface.co/datasets/AI4Math/MathVerse",
)
# One file is one variant of all questions.
DYNAMATH = Table(
    problem=("question",),
    answer=("answer",),
    fields={
        "answer_type": ("answer_type",),
        "subject": ("subject",),
        "level": ("knowledge_level", "level"),
    },
    identity=((KEY, "id"),),
    images=("image",),
    origin="github.com/DynaMath/DynaMath",
)
WEMATH = Table(
    problem=("question",),
    answer=("answer",),
    fields={"option": ("option",), "problem_id": ("ID",), "step": ("key",)},
    meta=("knowledge concept",),
    identity=(("ID",), ("key",)),
    images=("image_path",),
    origin="github.com/We-Math/We-Math",
)
# One of the 448 rows has neither question nor answer; it is kept, and its scorer says so.
LOGICVISTA = Table(
    problem=("question",),
    answer=("answer",),
    meta=("broad_capability", "specific_capability"),
    clean_problem=optional_text,
    clean_answer=optional_text,
    fields={"skill": ("skill",)},
    identity=((KEY, "id"),),
    images=("imagename",),
    origin="github.com/Yijia-Xiao/LogicVista",
)

_VARIANT = re.compile(r"(?:trial|variant|var)[_-]?(\d+)")


def read_variants(paths: Sequence[str | pathlib.Path]) -> list[Example]:
    """DynaMath's questions in all variants, one file each, with ids "question/variant".

    The variant's number stands in the name of its file or of the file's folder (`trial3`,
    `sample_variant3.json`); a single file may do without and is then variant 1.

    Args:
      paths: files, or folders of them, of which files without a number are left out.

    Raises:
      DataError: a file without a number among several, two files with the same, or no file.
    """
    examples: list[Example] = []
    seen: dict[int, pathlib.Path] = {}
    paths = [file for path in map(pathlib.Path, paths) for file in _variant_files(path)]
    for path in paths:
        numbers = _VARIANT.findall(_last_names(path)) or (["1"] * (len(paths) == 1))
        if not numbers:
            raise DataError(f"{path}: its name must say which variant it is, as in trial3")
        variant = int(numbers[-1])
        if variant in seen:
            raise DataError(f"{path}: is variant {variant}, and so is {seen[variant]}")
        seen[variant] = path
        for example in read_examples(DYNAMATH, path)[0]:
            question = example.meta["id"]
            meta = {"question_id": question, "variant": variant, "id": f"{question}/{variant}"}
            examples.append(
                dataclasses.replace(example, id=len(examples), meta=example.meta | meta)
            )
    return examples


def _variant_files(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.is_dir():
        return [path]
    files = [f for f in sorted(path.rglob("*.json")) if _VARIANT.search(_last_names(f))]
    if not files:
        raise DataError(f"{path}: holds no .json file whose name says which variant it is")
    return files


def _last_names(path: pathlib.Path) -> str:
    return "/".join(path.parts[-2:])
