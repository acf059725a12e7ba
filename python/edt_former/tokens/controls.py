"""Controls: patches that are like those of a molecule in number or size, and in nothing else."""

from __future__ import annotations

import hashlib

import numpy as np

CONTROLS = ("random", "shuffled")


def control_patches(ids: np.ndarray, control: str, *, seed: int, molecule: bytes) -> np.ndarray:
    """Patch ids [n] of a control.

    * "random": as many patches, cut at random places of the order of the atoms;
    * "shuffled": patches of the same sizes, each of random atoms.

    Chance depends on `seed` and the molecule alone, not on the batch.

    Args:
        ids: int64 [n], from 0, every patch has an atom.
        control: of `CONTROLS`.
        seed: of all molecules.
        molecule: what tells it from others, such as its canonical SMILES.

    Example:
        >>> ids = np.array([0, 0, 0, 1, 2, 2])
        >>> shuffled = control_patches(ids, "shuffled", seed=0, molecule=b"CCCOCC")
        >>> np.bincount(shuffled).tolist(), len(shuffled)
        ([3, 1, 2], 6)
    """
    digest = hashlib.blake2b(molecule, digest_size=8, key=seed.to_bytes(8, "big")).digest()
    chance = np.random.default_rng(int.from_bytes(digest, "big"))
    if control == "shuffled" or len(ids) == 0:
        return chance.permutation(ids)
    opens = np.zeros(len(ids), dtype=np.int64)
    opens[1 + chance.permutation(len(ids) - 1)[: ids.max()]] = 1
    return opens.cumsum()
