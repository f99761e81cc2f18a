"""The rules of the house that a tool can check."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import metadata

import pytest
from packaging.requirements import Requirement

from experiments import house_map

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = sorted(
    p
    for folder in ("luspo_jax", "luspo", "experiments", "configs")
    for p in (ROOT / folder).rglob("*.py")
)


def _tool(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_imports_point_one_way():
    ran = _tool("-c", "from importlinter.cli import lint_imports_command as c; c()")
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]


@pytest.mark.parametrize("command", [("check",), ("format", "--check")])
def test_ruff(command):
    ran = _tool("-m", "ruff", *command, ".")
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]


def test_only_sharding_says_partition_spec():
    users = [p.name for p in SOURCES if "PartitionSpec" in p.read_text()]
    assert set(users) <= {"sharding.py"}


def test_files_stay_readable():
    long = [str(p) for p in SOURCES if p.read_text().count("\n") > 500]
    assert not long


def test_the_map_in_the_documents_is_the_library():
    text = house_map.PAGE.read_text(encoding="utf-8")
    assert house_map.with_map(text, house_map.house_map()) == text, (
        "python -m experiments.house_map"
    )


def test_every_package_and_module_says_what_it_is():
    tree = house_map.house_map()
    assert not re.findall(r"^  \S+/?$", tree, re.MULTILINE)


def test_the_layers_are_told_as_they_are_checked():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = contract["contracts"][0]["layers"]
    assert "\n".join(layers) in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_hall_is_small():
    """Names at the top of the library, its layers, and the loop, which reads on one screen."""
    library = ROOT / "luspo_jax"
    names = [
        p.name for p in library.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()
    ]
    assert len(names) - ("__init__.py" in names) <= 18
    assert (library / "train.py").read_text().count("\n") <= 220


def _parameters(function):
    a = function.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return len([x for x in named if x.arg not in ("self", "cls")])


def test_functions_take_few_arguments():
    counts = [
        _parameters(node)
        for path in (ROOT / "luspo_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]
    assert max(counts) <= 8
    assert sum(count > 7 for count in counts) <= 18


@pytest.mark.parametrize("name", ["ConfigError", "ImageError"])
def test_an_error_is_one_class(name):
    defined = [p for p in SOURCES if f"class {name}(" in p.read_text()]
    assert len(defined) == 1


def test_importing_reaches_no_network_and_starts_no_device():
    """Importing the package must not initialise jax's backends."""
    code = (
        "import luspo_jax.train, luspo_jax.run.build, jax; "
        "from jax._src import xla_bridge; assert not xla_bridge._backends, 'a backend was started'"
    )
    ran = _tool("-c", code)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_nothing_names_a_machine():
    """No file that is committed carries an absolute path of the machine it was written on."""
    pattern = re.compile(r"/(?:work|home|root|Users)/[a-z]")
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.toml", "*.ipynb"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    named = [f for f in tracked if (ROOT / f).is_file() and pattern.search((ROOT / f).read_text())]
    assert not named


def test_extras_that_are_asked_for_are_named_as_their_packages_name_them():
    """pip warns of any other spelling, and installs nothing for it."""
    (listed,) = (
        node.value.elts
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "INSTALL_REQUIRES"
    )
    needs = [Requirement(entry.value) for entry in listed]
    assert "antlr4-python3-runtime" in {need.name for need in needs}
    for need in needs:
        if need.extras and (need.marker is None or need.marker.evaluate()):
            assert need.extras <= set(metadata(need.name).get_all("Provides-Extra")), need


def _public(body, prefix=""):
    """Yields (name, node) of public classes and functions, also inside of classes and branches."""
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _public(node.body, prefix)
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{prefix}{node.name}.")


def test_every_public_name_has_a_docstring():
    missing = []
    for folder in ("luspo_jax", "luspo", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = ast.parse(path.read_text(encoding="utf-8"))
            names = [("the module", module), *_public(module.body)]
            if path.name.startswith("_") and path.name not in ("__init__.py", "__main__.py"):
                continue
            place = path.relative_to(ROOT)
            missing += [f"{place}: {name}" for name, n in names if not ast.get_docstring(n)]
    assert not missing


def test_the_readme_is_for_a_newcomer():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    commands = re.findall(r"^```\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    assert commands[0].startswith("pip install -e . && python -m experiments.train ")
    assert commands[1] == "pip install -e '.[test]' && pytest"
