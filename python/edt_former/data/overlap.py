"""Molecules that two sets share, whatever their stereochemistry, isotopes and protonation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rdkit import Chem

from edt_former.chem import Invalid, Molecule, rdkit_mol, read_molecule, read_selfies
from edt_former.chem.rdkit_log import quiet
from edt_former.data.format import Part, part_paths, read_manifest
from edt_former.data.raw import Columns, read_rows

SELFIES = "selfies:"


def connectivity(molecule: Molecule) -> str:
    """The first block of the InChIKey, "" where InChI gives none.

    >>> connectivity(read_molecule("C[C@H](N)C(=O)O")) == connectivity(read_molecule("CC(N)C(O)=O"))
    True
    """
    with quiet():
        return Chem.MolToInchiKey(rdkit_mol(molecule))[:14]


def read_source(source: str) -> Molecule | Invalid:
    """A molecule of a raw row: SMILES, or SELFIES behind "selfies:"."""
    if source.startswith(SELFIES):
        return read_selfies(source.removeprefix(SELFIES))
    return read_molecule(source)


def blocks_of(path: Path | str, columns: Columns | None = None) -> Iterator[str]:
    """The first InChIKey block of every readable molecule of a raw file or of prepared data.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(path)
    if path.is_dir():
        for part in part_paths(path, read_manifest(path)["parts"]):
            yield from filter(None, Part(part).blocks())
        return
    for row in read_rows(path, columns):
        for source in row.molecules:
            molecule = read_source(source)
            if isinstance(molecule, Molecule) and (block := connectivity(molecule)):
                yield block


@dataclass(frozen=True)
class Overlap:
    """How many molecules of a test set are in a training set.

    Attributes:
        test: the name of the test set.
        molecules: distinct ones that it has.
        shared: of them, how many the training set has too.
    """

    test: str
    molecules: int
    shared: int

    @property
    def share(self) -> float:
        """Of the test set's molecules; 0 where it has none."""
        return self.shared / self.molecules if self.molecules else 0.0

    def __str__(self) -> str:
        return f"{self.shared} of the {self.molecules} molecules of {self.test} ({self.share:.1%})"


def find_overlaps(blocks: Iterable[str], tests: Iterable[Path | str]) -> list[Overlap]:
    """What a training set, by its molecules' blocks, shares with every test set.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "test.smi")
    ...     _ = path.write_text("CCO ethanol\\nc1ccccc1 benzene\\n")
    ...     print(*find_overlaps([connectivity(read_molecule("OCC"))], [path]))
    1 of the 2 molecules of test.smi (50.0%)
    """
    known = set(blocks)
    found = []
    for test in tests:
        wanted = set(blocks_of(test))
        found.append(Overlap(Path(test).name, len(wanted), len(wanted & known)))
    return found


def excluded_blocks(files: Iterable[Path | str]) -> dict[str, str]:
    """The blocks of all molecules of `files`, with the name of the file that has each."""
    return {block: Path(file).name for file in files for block in blocks_of(file)}
