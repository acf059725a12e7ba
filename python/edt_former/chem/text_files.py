"""Text files that people keep molecules in, plain or compressed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DAMAGE = (csv.Error, EOFError, gzip.BadGzipFile, zlib.error, json.JSONDecodeError, RecursionError)


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOBase]:
    """A file to read, `.gz` decompressed; bytes that are no UTF-8 become replacement characters.

    Raises:
        ValueError: inside the `with`, that the file is damaged, with its name.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as file:
            yield file
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def single_backslashes(smiles: str) -> str:
    """A SMILES as it was before a table doubled its backslashes."""
    return smiles.replace("\\\\", "\\")
