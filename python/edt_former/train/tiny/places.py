"""Conformers of the recipe's molecules, made chunk by chunk."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from edt_former.chem import ConformerOptions, ConformerPool, Invalid
from edt_former.train.tiny.data import MoleculeTable

CHUNK = 512
TIMEOUT = 10.0


@dataclass(frozen=True)
class Places:
    """Where the atoms of some molecules of a table are.

    Attributes:
        rows: int64 [M], the molecules that have a conformer, rows of the table.
        coordinates: float32 [N, 3], their atoms in the table's order.
        reasons: how often each reason left a molecule out.
    """

    rows: np.ndarray
    coordinates: np.ndarray
    reasons: dict[str, int]


def make_places(
    table: MoleculeTable, folder: Path, count: int, *, seed: int, processes: int
) -> Places:
    """Conformers of the first `count` molecules; those without one are left out.

    `folder` gets a file per chunk; a run that was stopped goes on after the last of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, min(count, len(table)), CHUNK)
    files = [folder / f"{start:06d}.npz" for start in starts]
    missing = [(s, f) for s, f in zip(starts, files, strict=True) if not f.exists()]
    options = ConformerOptions(seed=seed, timeout=TIMEOUT)
    with ConformerPool(options, workers=processes) as pool:
        for start, file in tqdm(missing, desc="conformers", unit=f"{CHUNK} mol"):
            rows = np.arange(start, min(start + CHUNK, count, len(table)))
            _write(file, rows, pool.make(table.molecules(rows)))
    return _read(files)


def _write(file: Path, rows: np.ndarray, found: list) -> None:
    made = np.array([not isinstance(item, Invalid) for item in found])
    coordinates = [item.coordinates for item in found if not isinstance(item, Invalid)]
    partial = file.with_suffix(".partial.npz")
    np.savez(
        partial,
        rows=rows[made],
        coordinates=np.concatenate([np.zeros((0, 3), np.float32), *coordinates]),
        reasons=np.array([item.reason for item in found if isinstance(item, Invalid)], dtype=str),
    )
    os.replace(partial, file)


def _read(files: list[Path]) -> Places:
    parts = []
    for file in files:
        with np.load(file) as part:
            parts.append({name: part[name] for name in part.files})
    return Places(
        np.concatenate([part["rows"] for part in parts]),
        np.concatenate([part["coordinates"] for part in parts]),
        dict(Counter(str(reason) for part in parts for reason in part["reasons"])),
    )
