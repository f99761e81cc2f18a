"""Exports the policy as a folder that other programs load."""

import pathlib
import shutil
from typing import Any, Literal

from luspo_jax.hosts import files
from luspo_jax.hosts.values import ConfigError
from luspo_jax.images.settings import write_limits
from luspo_jax.models import adapter_files, decoder_weights, low_rank, vision_weights
from luspo_jax.run.model import Model
from luspo_jax.run.settings import Config
from luspo_jax.types import TrainState


def export_policy(
    config: Config,
    model: Model,
    params: Any,
    folder: pathlib.Path,
    *,
    dtype: str | None = None,
    overwrite: bool | Literal["own"] | None = None,
) -> None:
    """Writes the policy as a folder that `transformers` loads: process 0 writes, all must call.

    Args:
      config: of the run.
      model: its architecture and tokenizer.
      params: its weights; adapters are merged into them.
      folder: must be empty or new.
      dtype: type to store; None for float32, unless frozen weights are of few bits.
      overwrite: replace an earlier export of ours there; `files.OWN` if the folder belongs to the
        run, whose last export is replaced.

    Raises:
      ConfigError: adapters of frozen weights of few bits, without a type.
    """
    if dtype is None and low_rank.is_rounded(params):
        raise ConfigError(
            f"the frozen weights are {config.lora.base}, and merged they are no longer the model's "
            "own: say into which type, as --dtype=bfloat16, or use the adapter with the model"
        )
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
        params,
        model.config,
        source=source,
        dtype=dtype or "float32",
        overwrite=overwrite,
        finish=finish,
    )


def export_result(run: Any, state: TrainState, folder: pathlib.Path) -> bool:
    """Writes what a run made into its folder: `export`, and with an adapter, `adapter` too.

    Frozen weights of few bits are not merged: the adapter alone is written.

    Args:
      run: of either kind.
      state: its last.
      folder: of the run.

    Returns:
      Whether there is an `export`.
    """
    policy, made = run.policy(state), run.rule.logprobs.how.adapter
    if made is not None:
        trained = state.params
        if made.init == "pissa":  # beside the model's own weights, not beside what is left of them
            trained, made = low_rank.difference(trained, run.initial_params(), made)
        adapter_files.write(
            folder / "adapter",
            trained,
            run.model.config,
            made,
            base=run.settings.model.path,
            overwrite=files.OWN,
        )
    if low_rank.is_rounded(policy):
        return False
    export_policy(run.config, run.model, policy, folder / "export", overwrite=files.OWN)
    return True
