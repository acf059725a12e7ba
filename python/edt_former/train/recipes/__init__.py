"""Configurations that ship with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

SUFFIX = ".yaml"


def names() -> list[str]:
    """The recipes.

    >>> "captions_stage1" in names()
    True
    """
    return sorted(file.stem for file in _folder().glob(f"*{SUFFIX}"))


def path(name: str) -> Path:
    """The file of a recipe.

    Raises:
        ValueError: there is none of that name.

    >>> path("captions_stage1").name
    'captions_stage1.yaml'
    """
    if name not in names():
        raise ValueError(f"a recipe must be one of {', '.join(names())}, got {name!r}")
    return _folder() / f"{name}{SUFFIX}"


def _folder() -> Path:
    return Path(str(files("edt_former.train.recipes")))
