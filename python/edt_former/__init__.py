"""Molecules for frozen language models: encoders, connectors, prompts.

>>> import edt_former
>>> model = edt_former.load("edt_former")
>>> model.answer("c1ccccc1", "How many aromatic rings does the molecule have?")
['aromatic rings: 1']
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edt_former.config import MoleculeConfig
    from edt_former.model import MoleculeLM
    from edt_former.processor import MoleculeProcessor
    from edt_former.shipped import load

__all__ = ["MoleculeConfig", "MoleculeLM", "MoleculeProcessor", "load"]

_HOMES = {
    "MoleculeConfig": "config",
    "MoleculeLM": "model",
    "MoleculeProcessor": "processor",
    "load": "shipped",
}


def __getattr__(name: str) -> object:
    """Import on first use (PEP 562): connectors alone need neither transformers nor RDKit."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
