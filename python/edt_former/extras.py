"""Packages that only some features need, imported when those are used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def need(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Imports `module`, or says what lacks it and how to get it.

    Args:
        module: the name to import.
        extra: of this package, that installs it.
        purpose: what needs it, the beginning of the error.

    Raises:
        ImportError: it is not installed.

    >>> need("json", extra="train", purpose="reading").__name__
    'json'
    >>> need("no_such_module", extra="train", purpose="reading tables")
    Traceback (most recent call last):
    ...
    ImportError: reading tables needs no_such_module: pip install 'edt-kernels[train]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        message = f"{purpose} needs {error.name}: pip install 'edt-kernels[{extra}]'"
        raise ImportError(message) from error
