"""From flags to tasks: which problems, asked how, judged by what, from which files."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments.command import UsageError
from luspo_jax import datasets, prompts
from luspo_jax.benchmarks import Benchmark, Protocol
from luspo_jax.datasets import Example, Report

_NO_LIMIT = 1 << 30  # tokens: a prompt that is too long is refused later, never dropped
_SUFFIXES = (".jsonl", ".parquet", ".json", ".csv")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say of an evaluation.

    Attributes:
      protocol: how to sample, the number of responses included.
      data: a folder, or name=path pairs joined by commas.
      cache_dir: where built datasets are kept; empty for the user's cache.
      limit: only the first so many problems; 0 for all.
      seed: of the sampling noise.
      template, system_prompt, enable_thinking: as in `prompts.Renderer`; an empty template is
        the benchmark's.
      dtype: of weights, activations and cache.
      num_slots: responses decoded together.
      tensor: devices that share one copy of the weights.
      save_every: problems between two saves; 0 for as many as fill the slots four times.
      workers, timeout_s: of the scorer.
      step: which checkpoint of a run.
    """

    protocol: Protocol
    data: str = ""
    cache_dir: str = ""
    limit: int = 0
    seed: int = 0
    template: str = ""
    system_prompt: str = ""
    enable_thinking: bool | None = None
    dtype: str = "float32"
    num_slots: int = 64
    tensor: int = 1
    save_every: int = 0
    workers: int = 2
    timeout_s: float = 10.0
    step: str = "latest"


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark as it is asked."""

    benchmark: Benchmark
    report: Report
    template: str
    template_hash: str
    prompts: list[prompts.PromptRecord]

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return max(len(prompt.tokens) for prompt in self.prompts)


def tasks(chosen: Sequence[Benchmark], options: Options, tokenizer: Any) -> list[Task]:
    """The chosen benchmarks' problems as token prompts.

    Raises:
      UsageError, DataError: a file or a template that cannot be used, by name.
    """
    found = examples(chosen, options)
    return [_task(entry, *found[entry.name], options, tokenizer) for entry in chosen]


def examples(
    chosen: Sequence[Benchmark], options: Options
) -> dict[str, tuple[list[Example], Report]]:
    """Benchmark → its problems, as many as the limit says, and where they are from."""
    paths = data_paths(options.data, chosen)
    loaded = {}
    for entry in chosen:
        problems, report = datasets.load(
            entry.dataset, paths.get(entry.name), "test", data_dir=options.cache_dir or None
        )
        count = min(options.limit or len(problems), len(problems))
        loaded[entry.name] = [problems[i] for i in range(count)], report
    return loaded


def data_paths(text: str, chosen: Sequence[Benchmark]) -> dict[str, pathlib.Path]:
    """Benchmark → file or folder, of those that need one.

    Raises:
      UsageError: a benchmark without data; the message says what was looked for.
    """
    given, folders = {}, []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, path = part.partition("=")
        if equals:
            given[name] = pathlib.Path(path)
        else:
            folders.append(pathlib.Path(part))
    names = [entry.name for entry in chosen]
    stray = [name for name in given if name not in names]
    if stray:
        raise UsageError(
            f"--data names {', '.join(stray)}, which --benchmarks={','.join(names)} does not"
        )
    if len(folders) > 1:
        raise UsageError("--data takes one folder, or name=path pairs: " + text)
    for entry in chosen:
        if not entry.generated and entry.name not in given:
            given[entry.name] = _inside(folders[0] if folders else None, entry.name)
    return given


def _inside(folder: pathlib.Path | None, name: str) -> pathlib.Path:
    """The benchmark's own folder or file in the folder of all."""
    if folder is None:
        raise UsageError(f"--benchmarks={name} needs its file: --data=FOLDER or --data={name}=FILE")
    candidates = [folder / name, *(folder / f"{name}{suffix}" for suffix in _SUFFIXES)]
    found = [path for path in candidates if path.exists()]
    if not found:
        raise UsageError(
            f"--data={folder} holds nothing for {name}: looked for a folder {name}/ with "
            f"test.jsonl and for {name}.jsonl, .parquet, .json, .csv; or give --data={name}=FILE"
        )
    return found[0]


def _task(entry, problems, report, options, tokenizer) -> Task:
    template = options.template or entry.template
    try:
        renderer = prompts.Renderer(
            tokenizer,
            template,
            options.system_prompt,
            enable_thinking=options.enable_thinking,
        )
    except ValueError as error:
        raise UsageError(f"{entry.name}: {error} (flag --template)") from error
    records, _ = prompts.encode(problems, renderer, max_length=_NO_LIMIT)
    return Task(entry, report, template, renderer.hash, records)
