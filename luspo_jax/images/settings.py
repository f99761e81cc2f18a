"""Settings of the image processor, read from and written to a model's folder; table of values."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from luspo_jax.hosts import files
from luspo_jax.images.pixels import Patching

_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
_READ = (
    *("patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels", "size"),
    *("resample", "rescale_factor", "image_mean", "image_std", "do_normalize", "do_rescale"),
)
_MUST_BE_TRUE = ("do_resize", "do_convert_rgb")  # else images do not fit patches or channels
_NAMES_ONLY = ("image_processor_type", "processor_class", "feature_extractor_type")


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """The settings of image preparation; hashable.

    Attributes:
      patching: size limits, patches, and whether every image is blanked.
      temporal_patch_size: frames of a patch; a still image fills them all.
      rescale_factor, mean, std: of the values, (u · rescale_factor − mean) / std in float32.
      text_blank: (height, width) of a white image given to each problem without images, as in the
        ablation of arXiv:2602.05261 §5.4; None for none.
    """

    patching: Patching = dataclasses.field(default_factory=Patching)
    temporal_patch_size: int = 2
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    text_blank: tuple[int, int] | None = None

    def __post_init__(self):
        low, high = self.patching.min_pixels, self.patching.max_pixels
        if not 0 < low <= high:
            raise ValueError(f"min_pixels={low} must be positive and at most max_pixels={high}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"image_mean={self.mean} and image_std={self.std} must be of 3 colours"
            )
        if self.text_blank is not None and min(self.text_blank) < 1:
            raise ValueError(f"text_blank={self.text_blank} must be a height and a width in pixels")

    @property
    def hash(self) -> str:
        """Returns sixteen hex digits that change with anything that changes a patch."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def read_settings(
    folder: str | pathlib.Path,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    blank: bool = False,
    text_blank: tuple[int, int] | None = None,
    **limits,
) -> ImageSettings:
    """Reads the settings in `preprocessor_config.json` of a model's folder.

    Args:
      folder: the model's.
      min_pixels, max_pixels: replace the file's.
      blank, text_blank: as in `Patching` and `ImageSettings`.
      **limits: other fields of `Patching`, which replace the file's.

    Raises:
      FileNotFoundError: the folder has no such file.
      ValueError: another processor, an unknown field, or an unsupported value.
    """
    path = pathlib.Path(folder) / "preprocessor_config.json"
    nested = path.with_name("processor_config.json")  # written by transformers 5
    if path.is_file():
        values = json.loads(path.read_text())
    elif nested.is_file():
        path, values = nested, json.loads(nested.read_text()).get("image_processor") or {}
    else:
        raise FileNotFoundError(
            f"{path} does not exist: a model that reads images needs its image processor's settings"
        )
    _check_fields(values, path)
    size = values.get("size") or {}
    patching = {
        "patch_size": values.get("patch_size"),
        "merge_size": values.get("merge_size"),
        "resample": values.get("resample"),
        "min_pixels": _first(min_pixels, values.get("min_pixels"), size.get("shortest_edge")),
        "max_pixels": _first(max_pixels, values.get("max_pixels"), size.get("longest_edge")),
        "blank": blank,
        **limits,
    }
    return ImageSettings(
        Patching(**{name: value for name, value in patching.items() if value is not None}),
        text_blank=text_blank,
        **_values(values),
    )


def _first(*values):
    return next((value for value in values if value is not None), None)


def _check_fields(values: Mapping[str, Any], path: pathlib.Path) -> None:
    kind = values.get("image_processor_type", _PROCESSORS[0])
    if kind not in _PROCESSORS:
        raise ValueError(
            f"{path}: image_processor_type {kind!r} is not read; known: {', '.join(_PROCESSORS)}"
        )
    for name in _MUST_BE_TRUE:
        if values.get(name) is False:
            raise ValueError(f"{path}: {name}=false is not supported: leave it out")
    known = {*_READ, *_MUST_BE_TRUE, *_NAMES_ONLY}
    strange = sorted(k for k, v in values.items() if k not in known and v is not None)
    sizes = sorted({*(values.get("size") or {})} - {"shortest_edge", "longest_edge"})
    if strange or sizes:
        raise ValueError(f"{path}: fields that are not read: {', '.join([*strange, *sizes])}")


def _values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of ImageSettings that transform a value."""
    found: dict[str, Any] = {}
    if values.get("temporal_patch_size") is not None:
        found["temporal_patch_size"] = values["temporal_patch_size"]
    if values.get("do_rescale") is False:
        found["rescale_factor"] = 1.0
    elif values.get("rescale_factor") is not None:
        found["rescale_factor"] = values["rescale_factor"]
    if values.get("do_normalize") is False:
        return found | {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    for name in ("mean", "std"):
        if values.get(f"image_{name}") is not None:
            found[name] = tuple(values[f"image_{name}"])
    return found


@functools.lru_cache(maxsize=8)
def value_table(settings: ImageSettings) -> np.ndarray:
    """Returns float32 [3, 256]: each normalized uint8 value of each colour, rounded as NumPy."""
    scaled = (np.arange(256, dtype=np.uint8) * settings.rescale_factor).astype(np.float32)
    mean, std = (np.array(x, np.float32)[:, None] for x in (settings.mean, settings.std))
    table = ((scaled - mean) / std).astype(np.float32)
    table.setflags(write=False)  # cached, hence shared
    return table


def write_limits(folder: str | pathlib.Path, *, min_pixels: int = 0, max_pixels: int = 0) -> None:
    """Sets size limits in the settings of a model's folder; 0 leaves a limit unchanged."""
    edges = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = pathlib.Path(folder) / name
        if not path.is_file() or not any(edges.values()):
            continue
        stored = json.loads(path.read_text())
        values = stored if name.startswith("pre") else stored.get("image_processor") or {}
        for field, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if edges[edge]:
                values[field] = edges[edge]
                if edge in (values.get("size") or {}):
                    values["size"][edge] = edges[edge]
        files.write_text(path, json.dumps(stored, indent=2) + "\n")
