"""Captions without a model: that of the most similar known molecule, or of any."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rdkit import DataStructs
from rdkit.Chem import rdFingerprintGenerator
from tqdm import tqdm

from edt_former.chem import Molecule, rdkit_mol

RADIUS, BITS = 2, 2048


def nearest(
    molecules: Sequence[Molecule], known: Sequence[Molecule], *, progress: bool = False
) -> np.ndarray:
    """For every molecule the known one with the highest Tanimoto similarity, int64 [M].

    By Morgan fingerprints of radius 2 with 2048 bits; of several the first.

    Raises:
        ValueError: no molecule is known.

    >>> from edt_former.chem import read_molecules
    >>> nearest(read_molecules(["CCO"]), read_molecules(["c1ccccc1", "CCCO"])).tolist()
    [1]
    """
    if not known:
        raise ValueError("known must hold at least one molecule, got none")
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=RADIUS, fpSize=BITS)
    library, wanted = (
        [generator.GetFingerprint(rdkit_mol(m)) for m in group] for group in (known, molecules)
    )
    bar = tqdm(wanted, "nearest neighbours", unit="mol", disable=not progress)
    found = [np.argmax(DataStructs.BulkTanimotoSimilarity(one, library)) for one in bar]
    return np.array(found, dtype=np.int64)


def baselines(
    molecules: Sequence[Molecule],
    known: Sequence[Molecule],
    captions: Sequence[str],
    *,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, list[str]]:
    """What captions molecules get without a model.

    Args:
        molecules: to be described.
        known: with their captions.
        captions: one per known molecule.
        seed: of what is drawn.
        progress: shows a bar.

    Returns:
        "nearest neighbour" (see `nearest`) and "any caption", drawn from all.
    """
    drawn = np.random.default_rng(seed).integers(len(captions), size=len(molecules))
    near = nearest(molecules, known, progress=progress)
    return {
        "nearest neighbour": [captions[i] for i in near],
        "any caption": [captions[i] for i in drawn],
    }
