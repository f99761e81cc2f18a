"""Visual benchmarks: their authors' annotation files, and the hub's copies of them.

Every row is kept, named by `meta["id"]`; `meta` carries the fields by which the scorers in
`luspo_jax/benchmarks/` group.
"""

import pathlib
import re
from collections.abc import Iterator

from luspo_jax.datasets.example import DataError
from luspo_jax.datasets.rows import KEY, VARIANT, Refuse, Row, read_rows, stop
from luspo_jax.datasets.table import Table, optional_text

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
    images=("decoded_image", "image"),
    origin="huggingface.co/datasets/AI4Math/MathVista",
)
# A command whose backslash was read as an escape when the file was written: \frac as form feed +
# "rac". These control characters have no other use in an answer.
_ESCAPES = str.maketrans({"\f": r"\f", "\b": r"\b", "\v": r"\v", "\a": r"\a"})


def unescaped(cell) -> str:
    """Restores the backslashes of an answer's LaTeX commands."""
    return optional_text(cell.translate(_ESCAPES) if isinstance(cell, str) else cell)


MATHVISION = Table(
    problem=("question",),
    answer=("answer",),
    clean_answer=unescaped,
    fields={"choices": ("options",), "subject": ("subject",), "level": ("level",)},
    identity=(("id",),),
    images=("decoded_image", "image"),
    origin="huggingface.co/datasets/MathLLMs/MathVision",
)
# In the version "Vision Only", only the image contains the problem. The files of the authors'
# visualizer name some columns differently.
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
_ANYWHERE = "**/*.json"
_VARIANT = re.compile(r"((?:trial|variant|var)[_-]?(\d+))")


def variant_rows(path: pathlib.Path, refuse: Refuse = stop) -> Iterator[tuple[int, Row]]:
    """Yields (row number, row) of DynaMath's questions in all variants of a file or folder.

    One file is one variant of all questions. The name of the file or of its folder (`trial3`,
    `sample_variant3.json`) contains its number, the column `_variant`; a single file may lack one
    and is then variant 1. In a folder, files without a number are left out, and images are in the
    folder named after the variant.

    Raises:
      DataError: two files of one variant, or no file.
    """
    if not path.is_dir():
        numbers = _VARIANT.findall(_last_names(path)) or [("", "1")]
        for number, row in read_rows(path, refuse):
            yield number, row | {VARIANT: int(numbers[-1][1])}
        return
    number, seen = 0, {}
    for file in sorted(path.glob(_ANYWHERE)):
        marks = _VARIANT.findall("/".join(file.relative_to(path).parts[-2:]))
        if not marks:
            continue
        name, variant = marks[-1][0], int(marks[-1][1])
        if variant in seen:
            raise DataError(f"{file}: is variant {variant}, and so is {seen[variant]}")
        seen[variant] = file
        folder = file.parent.relative_to(path)
        if name in file.name:
            folder /= name
        for _, row in read_rows(file, refuse):
            number += 1
            yield number, _placed(row, folder) | {VARIANT: variant}
    if not seen:
        raise DataError(f"{path}: holds no .json file whose name says which variant it is")


def _placed(row: Row, folder: pathlib.Path) -> Row:
    """Rewrites the row's image path relative to the folder of all variants."""
    image = row.get("image")
    return row | {"image": str(folder / image)} if isinstance(image, str) and image else row


def _last_names(path: pathlib.Path) -> str:
    return "/".join(path.parts[-2:])


DYNAMATH = Table(
    problem=("question",),
    answer=("answer",),
    fields={
        "answer_type": ("answer_type",),
        "subject": ("subject",),
        "level": ("knowledge_level", "level"),
        "question_id": (KEY, "id"),
        "variant": (VARIANT,),
    },
    identity=((KEY, "id"), (VARIANT,)),
    images=("image",),
    rows=variant_rows,
    folder=_ANYWHERE,
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
# One of the 448 rows has neither question nor answer; it is kept, and its scorer reports it.
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
