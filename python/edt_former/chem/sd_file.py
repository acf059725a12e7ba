"""SD files: structures and their properties, as databases and drawing programs write them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from rdkit import Chem

from edt_former.chem.rdkit_log import quiet
from edt_former.chem.text_files import open_text

_END = "$$$$"


@dataclass(frozen=True)
class StructureRecord:
    """A record of an SD file.

    Attributes:
        name: its title line.
        smiles: of the structure, "" where RDKit cannot read that. It may break the rules of
            valence: whoever reads the SMILES says how.
        properties: as text, by name.
    """

    name: str
    smiles: str
    properties: Mapping[str, str] = field(default_factory=dict)

    def first_of(self, names: Iterable[str]) -> str:
        """The first property of these lower-case names that is not empty; "" without one."""
        return next((self._lower[name] for name in names if self._lower.get(name)), "")

    @cached_property
    def _lower(self) -> dict[str, str]:
        return {name.lower(): value.strip() for name, value in self.properties.items()}


def read_structures(path: Path) -> Iterator[StructureRecord]:
    """Every record of an SD file; the places of atoms tell stereochemistry and are then dropped.

    Raises:
        ValueError: the file is damaged.
    """
    with open_text(path) as file:
        lines: list[str] = []
        for line in file:
            if line.startswith(_END):
                yield _read(lines)
                lines = []
            else:
                lines.append(line)
        if any(map(str.strip, lines)):
            yield _read(lines)


def _read(lines: list[str]) -> StructureRecord:
    name = lines[0].strip() if lines else ""
    text = "".join((*lines, "\n" if lines and not lines[-1].endswith("\n") else "", _END, "\n"))
    supplier = Chem.SDMolSupplier()
    with quiet():
        for as_it_stands in (False, True):
            supplier.SetData(text, sanitize=not as_it_stands, removeHs=not as_it_stands)
            mol = next(iter(supplier), None)
            if mol is not None:
                properties = {key: mol.GetProp(key) for key in mol.GetPropNames()}
                return StructureRecord(name, Chem.MolToSmiles(mol), properties)
    return StructureRecord(name, "")
