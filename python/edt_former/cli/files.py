"""Files that commands read and write: what can be refused is refused before anything is lost."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

MOLECULE_FILES = (".smi", ".txt", ".csv", ".tsv", ".sdf", ".gz")
"""What a file of molecules ends with; no SMILES does."""


def writable(option: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """Check that `path` can be written, before there is something to write.

    Raises:
        ValueError: it has none of the suffixes, its folder is missing or closed, or it is a folder.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} must end in {' or '.join(suffixes)}, got {path}")
    if path.is_dir():
        raise ValueError(f"{option} must be a file, got the folder {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{option} must be in a folder that exists, got {path}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} cannot be written: {path}")


def molecule_rows(path: Path, out: Path | None) -> Iterator[tuple[str, str]]:
    """(name, SMILES) of each row of a file, checked to have one; `out` is where results will go.

    Raises:
        ValueError: the file has no rows, or is `out`.
    """
    from edt_former.chem import read_file

    rows = read_file(path)
    if out is not None:
        if out.resolve() == path.resolve():
            raise ValueError(f"--out must be another file than the one that is read, got {out}")
        writable("--out", out)
    # Before `out` is opened: what it holds outlives a file that cannot be read.
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path} has no rows")
    return chain([first], rows)


@dataclass
class Tally:
    """What went through `write_rows`: the first rows, and counts."""

    shown: list[Any] = field(default_factory=list)
    total: int = 0
    failed: int = 0

    def summary(self, done: str) -> str:
        """How many rows there were, and how many of them are `done`."""
        more = self.total - len(self.shown)
        counts = f"{self.total} rows, {self.total - self.failed} {done}, {self.failed} not {done}"
        return f"{counts}; {more} of them not shown" if more else counts


def _is_plain(out: Path) -> bool:
    """A file, there or to be: no pipe, no device."""
    return out.is_file() or not out.exists()


def write_rows(
    source: Path,
    rows: Iterable[Any],
    out: Path | None,
    header: Sequence[str],
    cells: Callable[[Any], Sequence[object]],
    *,
    keep: int,
) -> Tally:
    """Write one CSV line per row, as rows come, with a progress bar on a terminal.

    They are in `<out>.partial` until all are written, and stay there where the run is stopped.

    Args:
        source: of the rows, for the error.
        rows: have a `reason`, "" where all went well.
        out: the CSV; None writes nothing.
        header: of the CSV.
        cells: of a row.
        keep: how many rows to return.

    Raises:
        ValueError: no row went well.
    """
    from tqdm import tqdm

    tally, reason = Tally(), ""
    with ExitStack() as stack:
        writer = None
        if out is not None:
            out = out.resolve()  # a link goes on leading there
            partial = out.with_name(f"{out.name}.partial") if _is_plain(out) else out
            file = stack.enter_context(partial.open("w", newline="", encoding="utf-8"))
            writer = csv.writer(file)
            writer.writerow(header)
        for row in tqdm(rows, desc="molecules", unit="mol", disable=not sys.stderr.isatty()):
            tally.total += 1
            if row.reason:
                tally.failed += 1
                reason = reason or row.reason
            if len(tally.shown) < keep:
                tally.shown.append(row)
            if writer is not None:
                writer.writerow(cells(row))
    if out is not None and partial != out:
        os.replace(partial, out)
    if tally.total == tally.failed:
        raise ValueError(f"{source} has no valid molecule in {tally.total} rows: {reason}")
    return tally
