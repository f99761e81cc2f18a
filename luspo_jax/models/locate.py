"""Where a model's folder is: on disk, inside this package, or on the Hugging Face hub."""

import pathlib

EMBEDDED = pathlib.Path(__file__).parent / "embedded"


def embedded_models() -> list[str]:
    """Names of the models shipped inside the package."""
    return sorted(p.name for p in EMBEDDED.iterdir() if (p / "config.json").is_file())


def model_folder(path: str) -> pathlib.Path:
    """Folder of "embedded:NAME", "hub:OWNER/NAME[@REVISION]" (downloads), or a local path.

    Raises:
      FileNotFoundError: naming what is missing and what there is.
    """
    if path.startswith("embedded:"):
        name = path.removeprefix("embedded:")
        if name not in embedded_models():
            raise FileNotFoundError(
                f'no embedded model "{name}"; there are: {", ".join(embedded_models())}'
            )
        return EMBEDDED / name
    if path.startswith("hub:"):
        return _download(path.removeprefix("hub:"))
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no model folder at {folder}: give a folder in Hugging Face format, embedded:NAME, "
            "or hub:OWNER/NAME to download one"
        )
    return folder


def _download(name: str) -> pathlib.Path:
    # Only here, so that nothing reaches for a network unless a hub id was named.
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    try:
        return pathlib.Path(
            snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"],
            )
        )
    except Exception as error:  # The hub raises a dozen types; the remedy is the same.
        raise FileNotFoundError(
            f"could not download {repo} from the hub ({type(error).__name__}: {error}): check the "
            "name, the network and the login, or give a local folder"
        ) from error
