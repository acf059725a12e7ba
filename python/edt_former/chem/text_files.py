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


def smiles_lines(file: io.TextIOBase) -> Iterator[tuple[str, str]]:
    """(SMILES, name) of every line that has one, but of a title, which begins with "SMILES"."""
    first = True
    for line in file:
        smiles, _, name = line.strip().replace("\t", " ").partition(" ")
        if smiles and not (first and smiles.lower() == "smiles"):
            yield single_backslashes(smiles), name.strip()
        first = first and not smiles


def comma_or_semicolon(path: Path) -> str:
    """Between the cells of a `.csv`: semicolons are written where commas mark decimals."""
    with open_text(path) as file:
        header = file.readline()
    return max(",;", key=header.count)


def single_backslashes(smiles: str) -> str:
    """A SMILES as it was before a table doubled its backslashes."""
    return smiles.replace("\\\\", "\\")
