from __future__ import annotations

import gzip
from itertools import product
from pathlib import Path

import pytest
from rdkit import Chem

from edt_former.train.tiny import data

RINGS = ("c1ccccc1", "c1ccncc1", "c1ccsc1", "C1CCCC1", "C1CCCCC1", "C1CCNCC1", "C1CCOC1", "C1CCC1")
LINKS = ("C", "CC", "CCC", "CCCC", "CO", "CN", "CCO", "CCN", "COC", "CNC", "CSC", "CCSC", "NCCO")
ENDS = ("", "O", "N", "C(=O)O", "C(F)F")
CHAINS = tuple(
    "C" * n + link + end for n, link, end in product(range(1, 8), ("", "O", "N", "S"), ENDS)
)

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
NAPHTHALENE = "CCCc1ccc2ccccc2c1"
"""Shares its scaffold with naproxen, a held-out drug."""
BROKEN = "C1CC"


def two_rings() -> list[str]:
    """Molecules of two rings and a link, each with a scaffold of its own; 4 % are held out."""
    joined = (f"{a}{link}{b.replace('1', '2')}" for a, link, b in product(RINGS, LINKS, RINGS))
    unique = dict.fromkeys(Chem.CanonSmiles(smiles) for smiles in joined)
    return [s for s in unique if data._record(("drawn", s, 0.0))[1] is not None]


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of `SOURCES`, of simple molecules."""
    folder = tmp_path_factory.mktemp("corpora")
    rings = two_rings()
    assert len(rings) > 400
    rows = [
        rings[0::4],
        [*rings[1::4], ASPIRIN, BROKEN],
        [*rings[2::4], NAPHTHALENE],
        rings[3::4] + rings[:5],
        CHAINS,
    ]
    for name, smiles in zip(data.SOURCES, rows, strict=True):
        text = "".join(f"{s} name-{i}\n" for i, s in enumerate(smiles))
        opener = gzip.open if name.endswith(".gz") else open
        with opener(folder / name, "wt") as file:
            file.write(text)
    return folder


MADE = {"PIECES": 40, "PAIRS": 40, "SALTS": 120}


@pytest.fixture(scope="session")
def prepared(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` makes of it."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in MADE.items():
            patch.setattr(data, name, count)
        data.prepare(corpora, folder, seed=0, processes=1)
    return folder
