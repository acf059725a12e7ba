"""The small models that ship with the package."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from edt_former.model import MoleculeLM


def folder() -> Path:
    """Where the shipped models are."""
    return Path(str(files("edt_former.assets"))) / "tiny"


def connectors() -> list[str]:
    """Names of the shipped connectors, EDT-Former first.

    >>> connectors()[0]
    'edt_former'
    """
    found = (path.parent.name for path in folder().glob("*/manifest.json"))
    return sorted(found, key=lambda name: (name != "edt_former", name))


def manifest() -> dict[str, Any]:
    """How the shipped models were made, and how well they answer."""
    return json.loads((folder() / "manifest.json").read_text())


def load(connector: str = "edt_former") -> MoleculeLM:
    """A shipped model with its processor; see `connectors`.

    Raises:
        ValueError: no such connector.
        FileNotFoundError: the package was installed without its models.

    >>> load().answer("c1ccccc1", "How many aromatic rings does the molecule have?")
    ['aromatic rings: 1']
    """
    known = connectors()
    if not known:
        raise FileNotFoundError(f"the shipped models are not in {folder()}")
    if connector not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"connector must be one of {names}, got {connector!r}")
    return MoleculeLM.from_pretrained(folder() / connector)
