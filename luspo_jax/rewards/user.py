"""A user's own reward: a function named by `module:function` or `path/file.py:function`."""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import pathlib
import sys

from luspo_jax.rewards.record import Sample, Verdict, Verifier

# Beside the response and the answer, a user's function may ask for these by name.
OFFERED = ("length", "max_length", "meta")


def is_user_reward(name: str) -> bool:
    """Whether a reward's name points to a user's function."""
    return ":" in name


def load_function(name: str):
    """The function that `module:function` or `file.py:function` names.

    Raises:
      ValueError: there is no such module, file or function.
    """
    place, _, attribute = name.rpartition(":")
    module = _load_file(place) if place.endswith(".py") else _load_module(place)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"reward {name!r}: {place} has no function {attribute!r}")
    return function


def _load_module(place: str):
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reward module {place!r} cannot be imported ({error}); install it, put its folder on "
            "PYTHONPATH, or name a file: path/to/file.py:function"
        ) from error


def _load_file(place: str):
    path = pathlib.Path(place).resolve()
    if not path.is_file():
        raise ValueError(f"reward file {place!r} does not exist")
    module_name = f"luspo_user_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def _accepted(function) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return OFFERED
    return tuple(name for name in OFFERED if name in parameters)


def check(sample: Sample, *, function, accepted: tuple[str, ...]) -> Verdict:
    """The function's own Verdict, or its number as one."""
    extra = {name: getattr(sample, name) for name in accepted}
    result = function(sample.response, sample.answer, **extra)
    return result if isinstance(result, Verdict) else Verdict(float(result))


def user_reward(function: str) -> Verifier:
    """The verifier around `f(response, answer, **what it asks for) -> number or Verdict`.

    `function` names f: `module:function` or `path/file.py:function`. The verifier's version is the
    first digits of its source file's sha256.
    """
    loaded = load_function(function)
    source = inspect.getsourcefile(inspect.unwrap(loaded))
    digest = hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest()[:12]
    bound = functools.partial(check, function=loaded, accepted=_accepted(loaded))
    return Verifier(function, digest, bound, isolated=True)
