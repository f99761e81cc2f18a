"""Locates a model's folder: on disk, in a bucket, in this package, on the Hugging Face hub, of a
GGUF file."""

import fnmatch
import json
import pathlib
from typing import Any

from luspo_jax.hosts import buckets, fetched, files

EMBEDDED = pathlib.Path(__file__).parent / "embedded"
ARCHITECTURES = pathlib.Path(__file__).parent / "architectures"
# Files of a model that are downloaded: others beside them may be large.
_WEIGHTS = "*.safetensors"
_NEEDED = ("*.json", _WEIGHTS, "*.txt", "*.jinja", "*.model")
_SEPARATOR = "--"  # OWNER--NAME.json, as in the hub's cache; no id on the hub contains it


def embedded_models() -> list[str]:
    """Returns the names of the models shipped inside the package."""
    return sorted(p.name for p in EMBEDDED.iterdir() if (p / "config.json").is_file())


def model_folder(path: str, *, weights: bool = True) -> pathlib.Path:
    """Returns the folder of "embedded:NAME", "hub:OWNER/NAME[@REVISION]" or "gguf:FILE", or a path.

    A hub id is downloaded, and so is an address of a bucket, gs://… or s3://…, a GGUF file's too.
    Of a GGUF file (or an installed package that contains one) a folder is made in the user's cache,
    the first time.

    Args:
      path: of the model.
      weights: whether weights are downloaded from the hub too.

    Raises:
      FileNotFoundError: names what is missing and what is available.
      BucketError: of an address that cannot be read.
      PlaceError, WeightsError: of a GGUF file, as `gguf_folder.cached_folder`.
    """
    if path.startswith("embedded:"):
        name = path.removeprefix("embedded:")
        if name not in embedded_models():
            raise FileNotFoundError(
                f'no embedded model "{name}"; there are: {", ".join(embedded_models())}'
            )
        return EMBEDDED / name
    if path.startswith("hub:"):
        wanted = [name for name in _NEEDED if weights or name != _WEIGHTS]
        return _download(path.removeprefix("hub:"), wanted)
    if path.startswith("gguf:"):
        from luspo_jax.models import gguf_folder  # with jax, which a folder does not need

        file = path.removeprefix("gguf:")
        return gguf_folder.cached_folder(
            str(fetched.place(file)) if buckets.is_bucket(file) else file
        )
    if buckets.is_bucket(path):
        return _fetched(path)
    folder = files.local(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no model folder at {folder}: give a folder in Hugging Face format, embedded:NAME, "
            "gguf:FILE, or hub:OWNER/NAME to download one"
        )
    return folder


def shipped_architectures() -> list[str]:
    """Returns the hub ids of the models whose sizes are known without a network."""
    return sorted(path.stem.replace(_SEPARATOR, "/", 1) for path in ARCHITECTURES.glob("*.json"))


def architecture(path: str) -> dict[str, Any]:
    """Returns the `config.json` of a model, without its weights and without a network.

    Args:
      path: as for `model_folder`. For "hub:OWNER/NAME[@REVISION]" it reads the file shipped in this
        package, whatever the revision: sufficient for sizes (its README lists what is not
        confirmed). A run reads the file that comes with the weights.

    Raises:
      FileNotFoundError: names what is missing and what is available.
      ValueError: a file that is not a JSON object.
    """
    if path.startswith("hub:"):
        name = path.removeprefix("hub:").partition("@")[0]
        if name not in shipped_architectures():
            raise FileNotFoundError(
                f"the sizes of {name} are not in this package; there are those of: "
                f"{', '.join(shipped_architectures())}. Download its config.json and name the "
                "folder that holds it"
            )
        file = ARCHITECTURES / f"{name.replace('/', _SEPARATOR)}.json"
    elif buckets.is_bucket(path):
        file = fetched.place(f"{path.rstrip('/')}/config.json")
    else:
        file = model_folder(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: a model's folder holds a config.json")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, not a {type(values).__name__}")
    return values


def _fetched(url: str) -> pathlib.Path:
    def needed(name):
        return "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in _NEEDED)

    folder = fetched.place(url, needed)
    if not folder.is_dir():
        raise FileNotFoundError(f"{url} is one object: name the folder that a model's files are in")
    return folder


def _download(name: str, wanted: list[str]) -> pathlib.Path:
    # Imported here, so that nothing uses the network unless a hub id is named.
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    try:
        return pathlib.Path(
            snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=wanted,
            )
        )
    except Exception as error:  # The hub raises a dozen types with the same remedy.
        raise FileNotFoundError(
            f"could not download {repo} from the hub ({type(error).__name__}: {error}): check the "
            "name, the network and the login, or give a local folder"
        ) from error
