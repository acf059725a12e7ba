"""Text files that people keep molecules in, plain or compressed."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SMILES_COLUMNS = ("smiles", "canonical_smiles", "isomeric_smiles", "canonicalsmiles", "mol", "drug")
"""Columns that hold SMILES, in any case."""

LONGEST_CELL = 2**24
_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_DAMAGE = (csv.Error, EOFError, gzip.BadGzipFile, zlib.error, json.JSONDecodeError, RecursionError)


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOBase]:
    """A file to read, `.gz` decompressed, in UTF-8 or, with its mark in front, UTF-16.

    Bytes that are neither become replacement characters.

    Raises:
        ValueError: inside the `with`, that the file is damaged, with its name.
    """
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rb") as file:
            encoding = "utf-16" if file.read(2) in _BOMS else "utf-8-sig"
        with opener(path, "rt", encoding=encoding, errors="replace", newline="") as file:
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


def table_rows(file: io.TextIOBase, delimiter: str) -> Iterator[list[str]]:
    """The rows of a table; between tabs quotes stand for themselves."""
    csv.field_size_limit(LONGEST_CELL)
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    return csv.reader(file, delimiter=delimiter, quoting=quoting)


def suffix_of(path: Path) -> str:
    """The suffix that says what a file holds, in small letters: that before `.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == ".gz" else suffix


def comma_or_semicolon(path: Path) -> str:
    """Between the cells of a `.csv`: semicolons are written where commas mark decimals."""
    with open_text(path) as file:
        header = file.readline()
    return max(",;", key=header.count)


def single_backslashes(smiles: str) -> str:
    """A SMILES as it was before a table doubled its backslashes."""
    return smiles.replace("\\\\", "\\")
