"""The small models that ship with the package."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edt_former.model import MoleculeLM
    from edt_former.tokens import NextAtomPredictor

ENCODERS = {"2d": "edt_former", "3d": "edt_former_3d", "both": "edt_former_both"}
"""EDT-Former on each graph encoder: bonds, the places of atoms in space, the two blended."""


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


def encoder_of(connector: str) -> str:
    """What the graph encoder of a shipped connector reads, a key of `ENCODERS`.

    >>> encoder_of("edt_former_3d"), encoder_of("qformer_32")
    ('3d', '2d')
    """
    return next((encoder for encoder, name in ENCODERS.items() if name == connector), "2d")


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
    from edt_former.model import MoleculeLM

    known = connectors()
    if not known:
        raise _missing()
    if connector not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"connector must be one of {names}, got {connector!r}")
    return MoleculeLM.from_pretrained(folder() / connector)


def predictor() -> NextAtomPredictor:
    """The shipped next-atom predictor, read without transformers.

    Raises:
        FileNotFoundError: the package was installed without its models.

    >>> predictor().positions
    512
    """
    from edt_former.language.frozen import load_part
    from edt_former.tokens import NextAtomPredictor

    if not connectors():
        raise _missing()
    return load_part(NextAtomPredictor, folder() / "predictor").eval().requires_grad_(False)


def _missing() -> FileNotFoundError:
    return FileNotFoundError(f"the shipped models are not in {folder()}")
