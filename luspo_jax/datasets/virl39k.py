"""ViRL39K: 38,870 verifiable questions about images, for training (arXiv:2504.08837)."""

from luspo_jax.datasets.open_problems import boxed
from luspo_jax.datasets.table import Table

# The schema is that of `39Krelease.parquet` as described by its card and several public readers:
# qid, question (with an <image> for each image), answer in \boxed{}, image (a list of paths such as
# images/Processed-….jpg, relative to the file once images.zip is unpacked beside it), category,
# source, PassRate_32BTrained and PassRate_7BBase. Unconfirmed here, without the file: whether
# `image` is ever empty (problems from DeepScaleR have no figure; an empty list is accepted), and
# how a missing PassRate_7BBase is written (half of them are; null is kept out of `meta`).
VIRL39K = Table(
    problem=("question",),
    answer=("answer",),
    meta=("PassRate_32BTrained", "PassRate_7BBase"),
    clean_answer=boxed,
    fields={"category": ("category",), "source": ("source",)},
    identity=(("qid",),),
    images=("image",),
    origin="huggingface.co/datasets/TIGER-Lab/ViRL39K",
)
