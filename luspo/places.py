"""Where the launchers and the shipped configurations are: in a checkout, or inside this package."""

import ast
import pathlib

# In a wheel `experiments` and `configs` lie in this folder of the package, and not beside it:
# setup.py says why.
_SHIPPED = "checkout"


def root() -> pathlib.Path:
    """Returns the folder with `experiments` and `configs`: of the wheel, or the checkout's root."""
    here = pathlib.Path(__file__).resolve().parent
    shipped = here / _SHIPPED
    return shipped if shipped.is_dir() else here.parent


def configs(under: str = "configs") -> dict[str, pathlib.Path]:
    """Returns name → file of the shipped configurations, or of the sweeps in configs/sweeps."""
    files = sorted((root() / under).glob("*.py"))
    return {file.stem: file for file in files if file.stem != "__init__"}


def about(file: pathlib.Path) -> str:
    """Returns the first line of a file's docstring; nothing in the file is run."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]
