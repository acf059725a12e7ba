"""Where the atoms of the recipe's molecules lie in space: made in chunks, kept as packed arrays."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from edt_former.chem import Conformer, ConformerOptions, ConformerPool, Invalid
from edt_former.graph.batch import GraphBatch
from edt_former.train.tiny.data import MoleculeTable, gather_ranges

CONFORMERS = 16_384
"""Molecules that get one, the first of the shuffled training split: two cores make about 16 a
second."""

CHUNK = 512
TIMEOUT = 10.0
"""Seconds for one molecule."""


@dataclass(frozen=True)
class PlacedTable(MoleculeTable):
    """Molecules of a table that have a conformer.

    Attributes:
        coordinates: float32 [N, 3] in angstrom.
    """

    coordinates: np.ndarray

    def batch(self, rows: np.ndarray) -> GraphBatch:
        """The molecules of `rows` with their coordinates."""
        atoms, _ = gather_ranges(self.offsets, rows)
        places = torch.from_numpy(self.coordinates[atoms])
        return replace(super().batch(rows), coordinates=places)


def place(
    table: MoleculeTable, folder: Path, count: int, *, seed: int, processes: int
) -> tuple[PlacedTable, dict[str, int]]:
    """The first `count` molecules with a conformer each, and why others of them have none.

    `folder` gets a file per chunk of molecules; a run that was stopped goes on after the last.

    Returns:
        The table, and how often each reason left a molecule out.

    Raises:
        ValueError: no molecule has a conformer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = min(count, len(table))
    starts = range(0, count, CHUNK)
    files = [folder / f"{start:06d}.npz" for start in starts]
    missing = [pair for pair in zip(starts, files, strict=True) if not pair[1].exists()]
    options = ConformerOptions(seed=seed, timeout=TIMEOUT)
    with ConformerPool(options, workers=processes) as pool:
        for start, file in tqdm(missing, desc="conformers", unit=f"{CHUNK} mol"):
            rows = np.arange(start, min(start + CHUNK, count))
            _write(file, rows, pool.make(table.molecules(rows)))
    rows, coordinates, reasons = map(np.concatenate, zip(*map(_read, files), strict=True))
    counted = dict(Counter(reasons.tolist()))
    if not len(rows):
        raise ValueError(f"some molecule must have a conformer, got {counted}")
    placed = PlacedTable(**vars(table.take(rows)), coordinates=coordinates)
    return placed, counted


def _write(file: Path, rows: np.ndarray, found: Sequence[Conformer | Invalid]) -> None:
    made = [not isinstance(item, Invalid) for item in found]
    coordinates = [item.coordinates for item in found if not isinstance(item, Invalid)]
    partial = file.with_suffix(".partial.npz")
    np.savez(
        partial,
        rows=rows[made],
        coordinates=np.concatenate([np.zeros((0, 3), np.float32), *coordinates]),
        reasons=np.array([item.reason for item in found if isinstance(item, Invalid)], dtype=str),
    )
    os.replace(partial, file)


def _read(file: Path) -> tuple[np.ndarray, ...]:
    with np.load(file) as chunk:
        return chunk["rows"], chunk["coordinates"], chunk["reasons"]
