"""Exports the policy as a folder that other programs load."""

import pathlib
import shutil
from typing import Any, Literal

from luspo_jax.images.settings import write_limits
from luspo_jax.models import decoder_weights, low_rank, vision_weights
from luspo_jax.run.model import Model
from luspo_jax.run.settings import Config


def export_policy(
    config: Config,
    model: Model,
    params: Any,
    folder: pathlib.Path,
    *,
    dtype: str = "float32",
    overwrite: bool | Literal["own"] | None = None,
) -> None:
    """Writes the policy as a folder that `transformers` loads: process 0 writes, all must call.

    Args:
      config: of the run.
      model: its architecture and tokenizer.
      params: its weights; adapters are merged into them.
      folder: must be empty or new.
      dtype: type to store.
      overwrite: replace an earlier export of ours there; `files.OWN` if the folder belongs to the
        run, whose last export is replaced.
    """
    # With another tokenizer or architecture, the folder's files do not apply.
    source = None if config.model.overrides or config.model.tokenizer else model.folder

    def finish(folder):
        if source is None:
            model.tokenizer.save_pretrained(folder)
            for name in vision_weights.COPIED_FILES:  # without them the export cannot read images
                if (model.folder / name).is_file():
                    shutil.copyfile(model.folder / name, folder / name)
        if model.config.vision is not None:  # fine-tuning on text has no limits of its own
            least, most = (getattr(config.data, f"{name}_pixels", 0) for name in ("min", "max"))
            write_limits(folder, min_pixels=least, max_pixels=most)

    decoder_weights.export(
        folder,
        low_rank.merged_tree(params),
        model.config,
        source=source,
        dtype=dtype,
        overwrite=overwrite,
        finish=finish,
    )
