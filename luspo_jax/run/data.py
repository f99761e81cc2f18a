"""Loads the data of a configuration: prompts, held-out prompts, images."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from luspo_jax import datasets, prompts
from luspo_jax.datasets.images import ImageFiles
from luspo_jax.hosts import fetched, processes
from luspo_jax.hosts.values import ConfigError
from luspo_jax.images.preparer import ImagePreparer
from luspo_jax.images.settings import read_settings
from luspo_jax.run.model import Model
from luspo_jax.run.settings import Config, section

_OWN_COLUMNS = datasets.Columns()  # whatever a dataset calls them
_LOOKED_AT = 64  # problems checked for images per dataset or source


@dataclasses.dataclass(frozen=True)
class Data:
    """Prompts for training and evaluation.

    Attributes:
      stream: the training prompts.
      held_out: prompts of the held-out problems.
      reports: how the rows of each training source were used.
      held_out_report: the same for the held-out set.
      examples: training problems, and held-out problems.
      renderer: of the training prompts.
      held_out_renderer: of the held-out ones, whose images are elsewhere.
      refused: held-out problems that are not asked: reason → number.
    """

    stream: prompts.PromptStream
    held_out: list[prompts.PromptRecord]
    reports: tuple[datasets.Report, ...]
    held_out_report: datasets.Report
    examples: tuple[Sequence[datasets.Example], Sequence[datasets.Example]]
    renderer: prompts.Renderer
    held_out_renderer: prompts.Renderer
    refused: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def template_hash(self) -> str:
        """A hash that changes with anything that changes a prompt."""
        return self.renderer.hash

    def overlap(self) -> datasets.Overlap | None:
        """Returns what training and held-out problems share; reads the whole training set.

        None if either is generated: generated splits are disjoint by construction.
        """
        if not all(report.sha256 for report in (*self.reports, self.held_out_report)):
            return None
        trained, held_out = self.examples
        return datasets.overlap(held_out, trained)

    def close(self) -> None:
        """Ends the processes that decode images."""
        if self.renderer.images is not None:
            self.renderer.images.close()


def load_data(config: Config, model: Model) -> Data:
    """Loads the training stream and held-out prompts of `config.data`, with their images if `model`
    reads images.

    Raises:
      ConfigError: the problems have images, and the model reads only text.
      DataError: data cannot be read, or there is no held-out prompt at all.
    """
    data = section(config, "data")
    preparer = image_preparer(config, model)
    renderer = _renderer(data, model, preparer, config.seed)
    train, reports = _training_set(data, renderer.columns)
    name, path, image_dir = held_out_place(data)
    held_out, held_out_report = _held_out_set(data, renderer.columns)
    files = _files((name, path, data.eval_split), image_dir, _held_out_selection(data))
    tested = dataclasses.replace(renderer, image_files=files)
    trained = "data.mixture" if data.mixture else f"data.name={data.name}"
    _check_sight(model, trained, train, reports)
    _check_sight(model, f"data.eval_name={name}", held_out, (held_out_report,))
    stream = prompts.PromptStream(
        train,
        renderer,
        max_length=data.max_prompt_length,
        seed=config.seed,
        gather=None if preparer is None else processes.gather,
    )
    wanted = [held_out[i] for i in range(min(len(held_out), config.eval.num_problems))]
    found = prompts.outcomes(wanted, tested, max_length=data.max_prompt_length)
    if preparer is not None:  # the list must be equal, as each process asks its share of it
        found = prompts.agreed(found, processes.gather)
    records = [prompt for prompt in found if isinstance(prompt, prompts.PromptRecord)]
    refusals = [prompt for prompt in found if isinstance(prompt, prompts.Refusal)]
    if not records:
        raise datasets.DataError(
            f"no held-out prompt of {held_out_report.source} can be asked within "
            f"data.max_prompt_length={data.max_prompt_length} tokens; the first: "
            f"{refusals[0].detail}"
        )
    refused = collections.Counter(refusal.reason for refusal in refusals)
    examples = train, wanted
    return Data(stream, records, reports, held_out_report, examples, renderer, tested, refused)


def _renderer(data, model, preparer, seed):
    image_files = _image_files(data)
    try:
        return prompts.Renderer(
            model.tokenizer,
            data.template,
            data.system_prompt,
            enable_thinking=data.enable_thinking,
            images=preparer,
            image_files=image_files,
            template_chat=data.template_chat,
            length_targets=(data.length_target_low, data.length_target_high),
            seed=seed,
        )
    except ValueError as error:
        raise ConfigError(f"data.template: {error}") from None


def _columns(fields, keep, prefix="", default=_OWN_COLUMNS):
    """Returns the columns that fields with a prefix name, in `data` or a source of its mixture."""
    names = {
        kind: fields.get(f"{prefix}{kind}_column") or getattr(default, kind)
        for kind in ("problem", "answer", "image")
    }
    return datasets.Columns(**names, keep=keep)


def _check_sight(model, field, examples, reports):
    """Refuses problems with images for a model that reads only text."""
    if model.config.vision is not None:
        return
    shown = any(report.pictured for report in reports)
    if shown or any(example.meta.get("images") for example in _some(examples)):
        raise ConfigError(
            f"{field} has problems with images, and {model.folder.name} reads none: choose a "
            "Qwen2.5-VL as model.path (data.blank_images shows it white ones)"
        )


def _some(examples):
    """Yields a few examples spread over a dataset, or over each source of a mixture."""
    sizes = examples.sizes if isinstance(examples, datasets.Mixture) else (len(examples),)
    start = 0
    for size in sizes:
        places = np.linspace(start, start + size, min(size, _LOOKED_AT), endpoint=False)
        yield from (examples[int(place)] for place in places)
        start += size


def image_preparer(config: Config, model: Model) -> ImagePreparer | None:
    """Returns the preparer of images, by the settings in the model's folder and `config.data`.

    None for a text-only model.

    Raises:
      ConfigError: settings that are invalid or do not fit the model.
    """
    data, vision = config.data, model.config.vision
    if vision is None:
        return None
    try:
        settings = read_settings(
            model.folder,
            min_pixels=data.min_pixels or None,
            max_pixels=data.max_pixels or None,
            blank=data.blank_images,
            text_blank=(data.text_blank, data.text_blank) if data.text_blank else None,
        )
    except ValueError as error:
        raise ConfigError(f"data (images): {error}") from None
    patching = settings.patching
    if (patching.patch_size, patching.merge_size) != (vision.patch_size, vision.merge_size):
        raise ConfigError(
            f"{model.folder}: preprocessor_config.json cuts patches of {patching.patch_size} "
            f"pixels and merges {patching.merge_size} a side, config.json's tower takes "
            f"{vision.patch_size} and {vision.merge_size}: they do not belong together"
        )
    return ImagePreparer(settings, workers=data.image_workers or None)


def _image_files(data):
    """Returns where the images of the training problems are."""
    if not data.mixture:
        place = data.name, data.path, data.split
        return _files(place, data.image_dir, _selection(data))
    return ImageFiles(
        of_source={
            name: _files(
                (source["name"], source.get("path", ""), source.get("split", "train")),
                source.get("image_dir", ""),
                _selection(data, source),
            )
            for name, source in data.mixture.items()
        }
    )


def held_out_place(data):
    """Returns (name, path, folder of images) of the held-out set.

    Unset fields are those of the training set, unless the dataset differs.
    """
    name = data.eval_name or data.name
    if data.eval_path or name != data.name:
        return name, data.eval_path, data.eval_image_dir
    return name, data.path, data.image_dir


def held_out_options(data) -> Mapping[str, Any]:
    """Returns the options of a generated held-out set: its own, or those of the same dataset."""
    if data.eval_options:
        return data.eval_options
    return data.options if held_out_place(data)[0] == data.name else {}


def _selection(data, source=None):
    """Returns which rows are taken, of `data` or of a source of its mixture."""
    given = {"drop_bad_rows": data.drop_bad_rows, **(vars(data) if source is None else source)}
    names = (field.name for field in dataclasses.fields(datasets.Selection))
    return datasets.Selection(**{name: given[name] for name in names if name in given})


def _held_out_selection(data):
    """Returns which rows of the held-out set are taken; its table is that of training, if any."""
    same = held_out_place(data)[:2] == (data.name, data.path)
    return datasets.Selection(
        subset=data.eval_subset or (data.subset if same else ""),
        filter=data.eval_filter,
        limit=data.eval_limit,
        streaming=data.streaming and data.eval_limit > 0,
        drop_bad_rows=data.drop_bad_rows,
    )


def _files(place, image_dir, selection):
    name, path, split = place
    source = datasets.image_source(name, path or None, split, selection)
    return ImageFiles(source, fetched.local(image_dir) if image_dir else None)


def _held_out_set(data, keep):
    """Loads (examples, report) of the held-out set, with the columns `keep` too."""
    # Another dataset has its own columns and options.
    name, path, _ = held_out_place(data)
    same = name == data.name
    default = _columns(vars(data), keep) if same else _OWN_COLUMNS
    return datasets.load(
        name,
        path or None,
        data.eval_split,
        columns=_columns(vars(data), keep, "eval_", default),
        selection=_held_out_selection(data),
        **_shared(data),
        **held_out_options(data),
    )


def _shared(data):
    return {"data_dir": data.cache_dir or None}


def _training_set(data, keep):
    """Loads (examples, report of each source) of the one dataset or of the mixture."""
    if not data.mixture:
        columns = _columns(vars(data), keep)
        examples, report = datasets.load(
            data.name,
            data.path or None,
            data.split,
            columns=columns,
            selection=_selection(data),
            **_shared(data),
            **data.options,
        )
        return examples, (report,)
    sources, weights, reports = {}, {}, []
    for key, source in data.mixture.items():
        sources[key], report = datasets.load(
            source["name"],
            source.get("path") or None,
            source.get("split", "train"),
            columns=_columns(source, keep),
            selection=_selection(data, source),
            **_shared(data),
        )
        weights[key] = source.get("weight", 1.0)
        reports.append(report)
    return datasets.Mixture(sources, weights), tuple(reports)
