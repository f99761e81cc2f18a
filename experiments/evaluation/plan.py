"""From flags to tasks: the problems, their prompts, their scorers and their files."""

import collections
import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.command import UsageError
from luspo_jax import datasets, prompts
from luspo_jax.benchmarks import Benchmark, Protocol
from luspo_jax.datasets import Example, Report
from luspo_jax.datasets.images import ImageFiles
from luspo_jax.datasets.rows import SUFFIXES
from luspo_jax.hosts import fetched, files
from luspo_jax.hosts.buckets import Bucket, is_bucket
from luspo_jax.images.preparer import ImagePreparer
from luspo_jax.images.settings import ImageSettings
from luspo_jax.prompts import templates
from luspo_jax.run import fields
from luspo_jax.run.data import image_preparer
from luspo_jax.run.model import Model

_NO_LIMIT = 1 << 30  # tokens: an overlong prompt is refused later, by its length
_AT_ONCE = 64  # problems whose images are in memory while prompts are made
_SHOWN = 1  # refusals quoted in a message


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of an evaluation from the flags.

    Attributes:
      protocol: sampling settings, including the number of responses.
      data: a folder, or name=path pairs joined by commas.
      dataset_options: of the one generated benchmark.
      cache_dir: folder of built datasets; empty for the user's cache.
      limit: number of first problems to use, each with all its parts or variants; 0 for all.
      seed: of the sampling noise.
      template, template_chat, system_prompt, enable_thinking: as in `prompts.Renderer`; an empty
        template is the benchmark's, and so is a system prompt of None.
      image_dir: a folder, or name=path pairs joined by commas; empty if images are beside their
        data.
      min_pixels, max_pixels: limits of an image; 0 for the model's own.
      blank_images: whether every image is blanked.
      refusals: problems that cannot be asked: "stop", or "skip" them and report it.
      id_columns, prediction_column: columns of a file of predictions.
      dtype: of weights, activations and cache.
      num_slots: most responses decoded together.
      cache_gb: gigabytes of keys and values on a device; 0 for half of what it has left.
      tensor: devices that share one copy of the weights.
      budgets: tokens at which stored responses are cut and judged again, as `budgets.budgets` reads
        them; empty for none.
      save_every: problems between two saves; 0 for as many as fill the slots four times.
      workers, timeout_s: of the scorer; as many processes read images.
      step: checkpoint of a run.
    """

    protocol: Protocol
    data: str = ""
    dataset_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cache_dir: str = ""
    limit: int = 0
    seed: int = 0
    template: str = ""
    template_chat: bool | None = None
    system_prompt: str | None = None
    image_dir: str = ""
    min_pixels: int = 0
    max_pixels: int = 0
    blank_images: bool = False
    refusals: str = "stop"
    id_columns: tuple[str, ...] = ("id",)
    prediction_column: str = "prediction"
    enable_thinking: bool | None = None
    dtype: str = "float32"
    num_slots: int = 64
    cache_gb: float = 0.0
    tensor: int = 1
    budgets: str = ""
    save_every: int = 0
    workers: int = 2
    timeout_s: float = 10.0
    step: str = "latest"


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark with its prompts.

    Attributes:
      benchmark: the benchmark.
      report: source of its problems.
      template: name of the prompt template.
      renderer: of its prompts.
      prompts: the problems to ask; their images are read again when their turn comes.
      refused: reason → names of the problems left out.
      images: how images were processed, and a hash of those shown; None without images.
    """

    benchmark: Benchmark
    report: Report
    template: str
    renderer: prompts.Renderer
    prompts: list[prompts.PromptRecord]
    refused: dict[str, list[str]]
    images: dict[str, Any] | None = None

    @property
    def longest_prompt(self) -> int:
        """Returns its length in tokens."""
        return max(len(prompt.tokens) for prompt in self.prompts)


def tasks(chosen: Sequence[Benchmark], options: Options, model: Model) -> list[Task]:
    """Renders the chosen benchmarks' problems as token prompts for a model.

    Raises:
      UsageError, DataError, BenchmarkError, ConfigError: an unusable file, annotation, template or
        setting, or problems that cannot be asked, named in the message.
    """
    shown = [entry.name for entry in chosen if entry.images]
    if shown and model.config.vision is None:
        raise UsageError(
            f"--benchmarks={','.join(shown)}: problems show images, and {model.folder.name} is a "
            f"{model.config.model_type} model, which reads text only: give a Qwen2.5-VL model"
        )
    preparer = _preparer(options, model) if shown else None
    found = examples(chosen, options)
    image_files = _image_files(chosen, options)
    tasks = []
    for entry in chosen:
        try:
            renderer = prompts.Renderer(
                model.tokenizer,
                options.template or entry.template,
                _system_prompt(entry, options),
                enable_thinking=options.enable_thinking,
                images=preparer if entry.images else None,
                image_files=image_files[entry.name],
                template_chat=options.template_chat,
            )
        except ValueError as error:
            raise UsageError(f"{entry.name}: {error} (flag --template)") from error
        tasks.append(_task(entry, *found[entry.name], options, renderer, model.config.max_position))
    return tasks


def examples(
    chosen: Sequence[Benchmark], options: Options
) -> dict[str, tuple[list[Example], Report]]:
    """Maps each benchmark to its problems, up to the limit, and their source."""
    paths = data_paths(options.data, chosen)
    generated = [entry.name for entry in chosen if entry.generated]
    if options.dataset_options and len(generated) != 1:
        raise UsageError(
            f"--options are those of one generated benchmark, and --benchmarks names "
            f"{', '.join(generated) or 'none'}"
        )
    loaded = {}
    for entry in chosen:
        problems, report = datasets.load(
            entry.dataset,
            paths.get(entry.name),
            "test",
            data_dir=options.cache_dir or None,
            columns=datasets.Columns(keep=_named_columns(options.template or entry.template)),
            **({**entry.dataset_options, **options.dataset_options} if entry.generated else {}),
        )
        problems = _first(entry, problems, options.limit)
        entry.check(problems)
        loaded[entry.name] = problems, report
    return loaded


def _named_columns(template: str) -> tuple[str, ...]:
    try:
        return templates.template(template).columns
    except ValueError as error:
        raise UsageError(f"--template: {error}") from error


def _first(entry: Benchmark, problems: Sequence[Example], limit: int) -> list[Example]:
    """Returns the first `limit` problems, each with all its parts or variants."""
    unit = entry.rule.unit if entry.rule else ""
    if not unit:
        return [problems[i] for i in range(min(limit or len(problems), len(problems)))]
    units = dict.fromkeys(problem.meta[unit] for problem in problems)
    wanted = set(list(units)[: limit or len(units)])
    return [problem for problem in problems if problem.meta[unit] in wanted]


# A path, or the address of a bucket as text.
_Path = pathlib.Path | str


def data_paths(text: str, chosen: Sequence[Benchmark]) -> dict[str, _Path]:
    """Maps each benchmark that needs data to its file or folder.

    Raises:
      UsageError: a benchmark without data; the message lists the places searched.
    """
    given, folder = _named_paths("data", text, chosen)
    for entry in chosen:
        if not entry.generated and entry.name not in given:
            given[entry.name] = _inside(folder, entry)
    return given


def _named_paths(
    flag: str, text: str, chosen: Sequence[Benchmark]
) -> tuple[dict[str, _Path], _Path | None]:
    """Parses a flag such as `DIR,aime24=FILE` into (benchmark → path, folder of all)."""
    given, folders = {}, []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, path = part.partition("=")
        if equals:
            given[name] = _local(path)
        else:
            folders.append(_local(part))
    names = [entry.name for entry in chosen]
    stray = [name for name in given if name not in names]
    if stray:
        raise UsageError(
            f"--{flag} names {', '.join(stray)}, which --benchmarks={','.join(names)} does not"
        )
    if len(folders) > 1:
        raise UsageError(f"--{flag} takes one folder, or name=path pairs: {text}")
    return given, folders[0] if folders else None


def _local(path: str) -> _Path:
    return path if is_bucket(path) else files.local(path)


def _inside(folder: _Path | None, entry: Benchmark) -> _Path:
    """Returns the benchmark's own folder or file, or its dataset's, in the folder of all."""
    name, stems = entry.name, dict.fromkeys((entry.name, entry.dataset))
    if folder is None:
        raise UsageError(f"--benchmarks={name} needs its file: --data=FOLDER or --data={name}=FILE")
    names = [f"{stem}{suffix}" for stem in stems for suffix in ("", *SUFFIXES)]
    if isinstance(folder, str):
        there = {path.split("/")[0] for path in Bucket(folder).entries()}
        found = [f"{folder.rstrip('/')}/{name}" for name in names if name in there]
    else:
        found = [path for name in names if (path := folder / name).exists()]
    if not found:
        raise UsageError(
            f"--data={folder} holds nothing for {name}: looked for a folder {name}/ with "
            f"test.jsonl and for {name}.jsonl, .parquet, .json, .csv; or give --data={name}=FILE"
        )
    return found[0]


def _image_files(chosen: Sequence[Benchmark], options: Options) -> dict[str, ImageFiles]:
    """Maps each benchmark to the location of its images."""
    paths = data_paths(options.data, chosen)
    folders, folder = _named_paths("image_dir", options.image_dir, chosen)
    shown = {}
    for entry in chosen:
        place = folders.get(entry.name, folder)
        shown[entry.name] = None if place is None else fetched.local(place)
        if place is not None and not shown[entry.name].is_dir():
            raise UsageError(f"--image_dir: no folder {place}")
    return {
        entry.name: ImageFiles(
            datasets.image_source(entry.dataset, paths.get(entry.name), "test"), shown[entry.name]
        )
        for entry in chosen
    }


def _preparer(options: Options, model: Model) -> ImagePreparer:
    config = fields.default_config()
    config.data.min_pixels, config.data.max_pixels = options.min_pixels, options.max_pixels
    config.data.blank_images = options.blank_images
    config.data.image_workers = options.workers
    return image_preparer(config, model)


def _system_prompt(entry: Benchmark, options: Options) -> str:
    given = entry.system_prompt if options.system_prompt is None else options.system_prompt
    return templates.SYSTEM_PROMPTS.get(given, given)


def _task(entry, problems, report, options, renderer, max_position) -> Task:
    digest = hashlib.sha256()
    found = []
    for start in range(0, len(problems), _AT_ONCE):  # all images would not fit into memory
        for outcome in _outcomes(entry, problems[start : start + _AT_ONCE], renderer):
            if isinstance(outcome, prompts.PromptRecord):
                digest.update("".join(image.sha for image in outcome.images).encode())
                outcome = dataclasses.replace(outcome, images=())
            found.append(outcome)
    found = _fitting(entry, found, max_position, options)
    found = _whole(entry, problems, found)
    refused = collections.defaultdict(list)
    for problem, outcome in zip(problems, found, strict=True):
        if isinstance(outcome, prompts.Refusal):
            refused[outcome.reason].append(name(problem))
    asked = [outcome for outcome in found if isinstance(outcome, prompts.PromptRecord)]
    _check_refusals(entry, found, asked, options)
    images = renderer.images and _image_facts(renderer.images.settings, digest.hexdigest()[:16])
    template = options.template or entry.template
    return Task(entry, report, template, renderer, asked, dict(refused), images)


def _image_facts(settings: ImageSettings, shown: str) -> dict[str, Any]:
    limits = settings.patching
    return {
        "min_pixels": limits.min_pixels,
        "max_pixels": limits.max_pixels,
        "blank": limits.blank,
        "settings": settings.hash,
        "shown": shown,
    }


def name(problem: Example) -> str:
    """Returns a problem's name in its dataset, or its index."""
    return str(problem.meta.get("id", problem.id))


def _outcomes(entry, problems, renderer) -> list[prompts.PromptRecord | prompts.Refusal]:
    """Returns each problem's prompt or refusal; prompts keep the problem as the dataset has it."""
    put = [dataclasses.replace(p, problem=entry.question(p)) for p in problems]
    return [
        dataclasses.replace(outcome, example=problem)
        if isinstance(outcome, prompts.PromptRecord)
        else outcome
        for problem, outcome in zip(
            problems, prompts.outcomes(put, renderer, max_length=_NO_LIMIT), strict=True
        )
    ]


def _fitting(entry, found, max_position: int, options: Options) -> list:
    """Refuses prompts that leave too little room for a response.

    Raises:
      UsageError: there are such prompts, and they must not be skipped.
    """
    length = options.protocol.max_response_length
    sizes = [len(o.tokens) if isinstance(o, prompts.PromptRecord) else 0 for o in found]
    if max(sizes, default=0) + length <= max_position:
        return found
    fit = [size for size in sizes if 0 < size <= max_position - length]
    if options.refusals == "stop" or not fit:
        room = max_position - max(sizes)
        what = "no response can follow it"
        if room >= 1:
            what = f"give --max_response_length={room} or less (the protocol then says so)"
        elif entry.images:
            what = "images can be made smaller with --max_pixels"
        raise UsageError(
            f"{entry.name}: its longest prompt has {max(sizes)} tokens, and the model holds "
            f"{max_position}: max_response_length={length} of protocol {options.protocol.name} "
            f"does not fit; {what}, or leave out and report the problems that are too long with "
            "--refusals=skip"
        )
    return [
        prompts.Refusal(outcome.prompt_id, "too_long", f"{size} tokens")
        if size + length > max_position
        else outcome
        for outcome, size in zip(found, sizes, strict=True)
    ]


def _whole(entry, problems, found) -> list:
    """Refuses the rest of a problem with a refused part, if figures need all parts."""
    if entry.rule is None or not entry.rule.whole:
        return found
    units = [problem.meta[entry.rule.unit] for problem in problems]
    broken = {u for u, o in zip(units, found, strict=True) if isinstance(o, prompts.Refusal)}
    return [
        prompts.Refusal(outcome.prompt_id, "incomplete", f"another part of {unit} is refused")
        if unit in broken and isinstance(outcome, prompts.PromptRecord)
        else outcome
        for unit, outcome in zip(units, found, strict=True)
    ]


def _check_refusals(entry, found, asked, options: Options) -> None:
    refusals = [outcome for outcome in found if isinstance(outcome, prompts.Refusal)]
    if not refusals or (asked and options.refusals == "skip"):
        return
    counts = collections.Counter(refusal.reason for refusal in refusals)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    examples = "; ".join(refusal.detail for refusal in refusals[:_SHOWN])
    remedy = "--image_dir says where images are"
    if asked:
        remedy += ", and --refusals=skip leaves these problems out and reports them"
    raise UsageError(
        f"{entry.name}: {len(refusals)} of {len(found)} problems cannot be asked ({reasons}), for "
        f"example: {examples}; {remedy}"
    )
