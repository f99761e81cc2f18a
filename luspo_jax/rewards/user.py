"""A user's reward: a function named by `module:function` or `path/file.py:function`."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pathlib
import sys

from luspo_jax.rewards.record import Sample, Verdict, Verifier

_LONGEST = 2_000  # characters of a prediction or a detail
# A user's function may take these by name, besides the response and the answer.
OFFERED = ("length", "max_length", "meta")


def is_user_reward(name: str) -> bool:
    """Whether a reward's name refers to a user's function."""
    return isinstance(name, str) and ":" in name


def load_function(name: str):
    """Imports `module:f` or `file.py:f` and returns (module, the function or other callable).

    Raises:
      ValueError: no such module, file or function, or its import fails.
    """
    place, _, attribute = name.rpartition(":")
    module = _load_file(place) if place.endswith(".py") else _load_module(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"reward {name!r}: {place} has no function {attribute!r}")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"reward {name!r} is an async function: name one that returns a number")
    return module, function


def _load_module(place: str):
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"reward module {place!r} {_failure(error)}; a module must be installed or on "
            "PYTHONPATH, a file is named path/to/file.py:function"
        ) from error


def _failure(error: BaseException) -> str:
    """Explains in one line why a module cannot be imported."""
    said = " ".join(str(error).split())[:300]
    return f"cannot be imported ({type(error).__name__}: {said})"


def _load_file(place: str):
    path = pathlib.Path(place).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"reward file {place!r} does not exist")
    module_name = f"luspo_user_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ValueError(f"reward file {place!r} {_failure(error)}") from error
    return module


def _accepted(name: str, function) -> tuple[str, ...]:
    """Returns the names a function takes besides response and answer.

    Raises:
      ValueError: it cannot be called with these.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return ()
    parameters = signature.parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    accepted = tuple(known for known in OFFERED if everything or known in parameters)
    try:
        signature.bind("", "", **dict.fromkeys(accepted))
    except TypeError as error:
        raise ValueError(
            f"reward {name!r} takes {signature} and is called with (response, answer), and with "
            f"{', '.join(OFFERED)} where it has arguments of these names: {error}"
        ) from error
    return accepted


def sources(function, module) -> bytes:
    """Returns the source text that defines a function: its own file and its module's."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not (inspect.isroutine(function) or inspect.isclass(function)):
        function = type(function)  # an instance with `__call__`
    files = [getattr(module, "__file__", None)]
    with contextlib.suppress(TypeError):  # built in
        files.insert(0, inspect.getsourcefile(function))
    paths = dict.fromkeys(pathlib.Path(file).resolve() for file in files if file)
    return b"".join(path.read_bytes() for path in paths)


def check(sample: Sample, *, function, accepted: tuple[str, ...]) -> Verdict:
    """Returns the function's own Verdict, or its number as one."""
    extra = {name: getattr(sample, name) for name in accepted}
    result = function(sample.response, sample.answer, **extra)
    if not isinstance(result, Verdict):
        return Verdict(float(result))
    texts = {"prediction": result.prediction, "detail": result.detail}
    texts = {name: None if text is None else str(text)[:_LONGEST] for name, text in texts.items()}
    return dataclasses.replace(result, value=float(result.value), **texts)


def user_reward(function: str) -> Verifier:
    """Returns the verifier around `f(response, answer, **names it takes) -> number or Verdict`.

    `function` names f: `module:function` or `path/file.py:function`. The verifier's version is the
    first digits of its source files' sha256.
    """
    module, loaded = load_function(function)
    digest = hashlib.sha256(sources(loaded, module)).hexdigest()[:12]
    accepted = _accepted(function, loaded)
    bound = functools.partial(check, function=loaded, accepted=accepted)
    return Verifier(function, digest, bound, isolated=True)
