"""A molecule as arrays, or the reason why not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from rdkit import Chem
from tqdm import tqdm

from edt_former.chem.features import (
    ATOM_FEATURE_SIZES,
    FEATURES_ID,
    PRETRAIN_FEATURES_ID,
    atom_features,
    bond_directions,
    bond_features,
    pretrain_features,
)
from edt_former.chem.rdkit_log import parse_error, quiet

MAX_ATOMS = 4096


@dataclass(frozen=True, eq=False)
class Molecule:
    """A molecule whose atoms stand in the order of its canonical SMILES.

    One entry per heavy atom. A hydrogen that RDKit keeps (an isotope, a hydride, molecular
    hydrogen) is an atom like any other.

    Attributes:
        smiles: canonical isomeric SMILES without atom-map numbers.
        atom_features: int64 [n, 9], see `edt_former.chem.features`.
        bond_index: int64 [2, 2E], both directions of every bond, row 0 the source and row 1 the
            target, sorted by target, then by source.
        bond_features: int64 [2E, 3].
        order: int64 [n], `order[i]` is the caller's index of atom i: the index in the `Mol` that
            was given, or in `Chem.MolFromSmiles` of the SMILES that was given.

    >>> ethanol = read_molecule("OCC")
    >>> ethanol.smiles, ethanol.elements.tolist(), ethanol.order.tolist()
    ('CCO', [6, 6, 8], [2, 1, 0])
    """

    smiles: str
    atom_features: np.ndarray
    bond_index: np.ndarray
    bond_features: np.ndarray
    order: np.ndarray

    @property
    def num_atoms(self) -> int:
        """Number of atoms n."""
        return len(self.atom_features)

    @property
    def elements(self) -> np.ndarray:
        """Atomic numbers, int64 [n]; 0 for a wildcard."""
        return (self.atom_features[:, 0] + 1) % ATOM_FEATURE_SIZES[0]

    def features(self, scheme: str) -> tuple[np.ndarray, np.ndarray]:
        """Features of the atoms [n, F] and of the bonds [2E, G] by a scheme, int64.

        Args:
            scheme: `FEATURES_ID` gives the stored ones, `PRETRAIN_FEATURES_ID` those of
                `edt_former.chem.features.pretrain_features`.

        Raises:
            ValueError: an unknown scheme; directions of bonds are wanted of a molecule that has
                double bonds with a side and no SMILES.

        >>> [x.tolist() for x in read_molecule("C=O").features(PRETRAIN_FEATURES_ID)]
        [[[5, 0], [7, 0]], [[1, 0], [1, 0]]]
        """
        if scheme == FEATURES_ID:
            return self.atom_features, self.bond_features
        if scheme != PRETRAIN_FEATURES_ID:
            known = f"{FEATURES_ID!r} or {PRETRAIN_FEATURES_ID!r}"
            raise ValueError(f"scheme must be {known}, got {scheme!r}")
        directions = np.zeros(len(self.bond_features), dtype=np.int64)
        if "/" in self.smiles or "\\" in self.smiles:
            directions = bond_directions(rdkit_mol(self))
        elif not self.smiles and self.bond_features[:, 1].any():
            raise ValueError(
                f"features {scheme!r} of a double bond with a side need a molecule's SMILES, "
                "got graph data without one"
            )
        return pretrain_features(self.atom_features, self.bond_features, directions)


@dataclass(frozen=True)
class Invalid:
    """What could not be read, and why."""

    source: str
    reason: str


def read_molecule(source: str | Chem.Mol, *, max_atoms: int = MAX_ATOMS) -> Molecule | Invalid:
    """Reads a SMILES string or an RDKit `Mol`; what is unreadable gives an `Invalid`.

    Nothing is raised for bad chemistry. The `Mol` is left as it is. White space around a SMILES
    is ignored. Atom-map numbers are dropped. Explicit hydrogens are folded into their heavy atoms
    wherever RDKit would fold them.

    >>> read_molecule("C1CC")
    Invalid(source='C1CC', reason='unclosed ring')
    >>> read_molecule("CC(C)(C)(C)C").reason
    'Explicit valence for atom # 1 C, 5, is greater than permitted'
    """
    try:
        with quiet():
            mol, order = _parse(source)
            return _canonical(mol, order, max_atoms)
    except (ValueError, RuntimeError) as error:
        return Invalid(_describe(source), str(error))


def read_as_written(smiles: str, *, max_atoms: int = MAX_ATOMS) -> Molecule | Invalid:
    """Reads a SMILES string and leaves its atoms where they stand.

    `smiles` of the result is the string that was given and `order` counts up, so everything that
    depends on the order of the atoms depends on how the string was written.

    >>> read_as_written("OCC").smiles, read_as_written("OCC").elements.tolist()
    ('OCC', [8, 6, 6])
    """
    if not isinstance(smiles, str):
        reason = f"must be a SMILES string, got {type(smiles).__name__}"
        return Invalid(_describe(smiles), reason)
    try:
        with quiet():
            mol, order = _parse(smiles)
        _check_size(mol, max_atoms)
    except (ValueError, RuntimeError) as error:
        return Invalid(smiles, str(error))
    return Molecule(smiles.split()[0], atom_features(mol), *bond_features(mol), order)


def read_molecules(
    sources: Iterable[str | Chem.Mol], *, progress: bool = False, max_atoms: int = MAX_ATOMS
) -> list[Molecule | Invalid]:
    """`read_molecule` for each source, in the same order; `progress` shows a bar.

    >>> [type(item).__name__ for item in read_molecules(["CCO", "nonsense"])]
    ['Molecule', 'Invalid']
    """
    bar = tqdm(sources, desc="reading molecules", unit="mol", disable=not progress)
    return [read_molecule(source, max_atoms=max_atoms) for source in bar]


def read_selfies(source: str, *, max_atoms: int = MAX_ATOMS) -> Molecule | Invalid:
    """Reads a SELFIES string (arXiv:1905.13741); needs the `selfies` package.

    `order` refers to the atoms of the SMILES that `selfies` decodes to.

    Raises:
        ImportError: `selfies` is not installed.

    >>> read_selfies("[O][C][C]").smiles  # doctest: +SKIP
    'CCO'
    """
    try:
        import selfies
    except ImportError as error:
        message = "reading SELFIES needs the selfies package: pip install selfies"
        raise ImportError(message) from error
    if not isinstance(source, str):
        return Invalid(_describe(source), f"must be a SELFIES string, got {type(source).__name__}")
    try:
        smiles = selfies.decoder(source.strip())
    except selfies.DecoderError as error:
        return Invalid(source, " ".join(str(error).split()))
    molecule = read_molecule(smiles, max_atoms=max_atoms)
    return molecule if isinstance(molecule, Molecule) else Invalid(source, molecule.reason)


def rdkit_mol(molecule: Molecule) -> Chem.Mol:
    """The RDKit molecule whose atom i is atom i of `molecule`.

    >>> [atom.GetSymbol() for atom in rdkit_mol(read_molecule("OCC")).GetAtoms()]
    ['C', 'C', 'O']
    """
    with quiet():
        return Chem.MolFromSmiles(molecule.smiles)


def _parse(source: str | Chem.Mol) -> tuple[Chem.Mol, np.ndarray]:
    """A sanitised molecule without explicit hydrogens, and the caller's index of each atom."""
    if isinstance(source, Chem.Mol):
        return _fold_hydrogens(source)
    if not isinstance(source, str):
        raise ValueError(f"must be a SMILES string or an RDKit Mol, got {type(source).__name__}")
    text = source.strip()
    if not text:
        raise ValueError("empty SMILES")
    _, space, rest = text.partition(" ")
    if len(text.split()) > 1 and not (space and rest.lstrip().startswith("|")):
        raise ValueError("white space inside the SMILES")
    if not text.isascii() or "\0" in text:
        raise ValueError("a SMILES holds ASCII characters only")
    mol = Chem.MolFromSmiles(text)
    if mol is None:
        raise ValueError(parse_error(text))
    return mol, np.arange(mol.GetNumAtoms())


def _fold_hydrogens(mol: Chem.Mol) -> tuple[Chem.Mol, np.ndarray]:
    mol = Chem.Mol(mol)
    for atom in mol.GetAtoms():
        atom.SetIntProp("_callerIndex", atom.GetIdx())
    mol = Chem.RemoveHs(mol)
    order = [atom.GetIntProp("_callerIndex") for atom in mol.GetAtoms()]
    return mol, np.array(order, dtype=np.int64)


def _canonical(mol: Chem.Mol, order: np.ndarray, max_atoms: int) -> Molecule:
    _check_size(mol, max_atoms)
    for atom in mol.GetAtoms():
        if atom.GetAtomMapNum():
            atom.SetAtomMapNum(0)
    smiles = Chem.MolToSmiles(mol)
    order = order[_output_order(mol)]

    # Tags of chirality depend on the order of atoms, so the features are those of the canonical
    # SMILES itself, whatever the molecule was written as.
    twin = Chem.MolFromSmiles(smiles)
    if twin is None:
        raise ValueError(f"RDKit writes the molecule as {smiles} but cannot read that")
    if twin.GetNumAtoms() < mol.GetNumAtoms():
        # A hydrogen that only marked the side of a double bond goes when the mark does.
        twin, kept = _fold_hydrogens(Chem.MolFromSmiles(smiles, _KEEP_HYDROGENS))
        return _canonical(twin, order[kept], max_atoms)
    return Molecule(smiles, atom_features(twin), *bond_features(twin), order)


def _check_size(mol: Chem.Mol, max_atoms: int) -> None:
    if mol.GetNumAtoms() > max_atoms:
        raise ValueError(f"{mol.GetNumAtoms()} atoms, more than max_atoms={max_atoms}")


_KEEP_HYDROGENS = Chem.SmilesParserParams()
_KEEP_HYDROGENS.removeHs = False


def _output_order(mol: Chem.Mol) -> np.ndarray:
    written = mol.GetPropsAsDict(includePrivate=True, includeComputed=True)
    return np.array(list(written["_smilesAtomOutputOrder"]), dtype=np.int64)


def _describe(source: object) -> str:
    if isinstance(source, str):
        return source
    if isinstance(source, Chem.Mol):
        try:
            return Chem.MolToSmiles(source)
        except (ValueError, RuntimeError):
            return "Mol"
    return repr(source)
