"""Well-known molecules that stay out of every training set, and the filter that keeps them out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.resources import files

from rdkit import Chem
from rdkit.Chem import rdMolDescriptors
from rdkit.Chem.MolStandardize import rdMolStandardize
from rdkit.Chem.Scaffolds import MurckoScaffold

_CHARGED = Chem.MolFromSmarts("[!+0]")
_NOT_HEAVY = re.compile(r"H\d*(?![a-z])|[+-].*")  # hydrogens and the charge of a formula
_FRAGMENTS = rdMolStandardize.LargestFragmentChooser(True)
_UNCHARGER = rdMolStandardize.Uncharger()


def heldout_molecules() -> list[tuple[str, str]]:
    """The shipped list of drugs, natural products and metabolites as ``(name, SMILES)``.

    No two entries share the first block of their InChIKey. Stereochemistry is partly omitted: a
    SMILES without it stands for every stereoisomer.

    Example:
        >>> dict(heldout_molecules())["Aspirin"]
        'CC(=O)Oc1ccccc1C(=O)O'
    """
    text = files("edt_former.assets").joinpath("heldout.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines()[1:])
    return [(name, smiles) for name, smiles in rows]


class HeldOut:
    """Finds the molecules that a training set must leave out.

    A molecule is compared by its parent: hydrogens (deuterium too) implicit, the largest organic
    fragment, charges neutralised by adding or removing protons. It is left out when the parent

    * has the first InChIKey block (connectivity, whatever the stereochemistry, isotopes and
      protonation) of a held-out molecule, or
    * has its scaffold, if that has two rings or more by RDKit's ring count. The scaffold is the
      Bemis-Murcko framework in RDKit's variant (``MurckoScaffold.GetScaffoldForMol``): ring systems
      and the linkers between them, with their atom and bond types and the atoms double-bonded to
      them, compared as canonical SMILES without stereochemistry.

    Instances can be pickled, so one filter serves the workers of a pool.

    Args:
        molecules: ``(name, SMILES)`` pairs to hold out, by default `heldout_molecules`.

    Attributes:
        blocks: name of the held-out molecule by first InChIKey block.
        scaffolds: name of the first held-out molecule by scaffold SMILES.

    Raises:
        ValueError: a SMILES cannot be read.

    Example:
        >>> aspirin, indole = ("Aspirin", "CC(=O)Oc1ccccc1C(=O)O"), ("Indole", "c1ccc2[nH]ccc2c1")
        >>> held_out = HeldOut([aspirin, indole])
        >>> held_out.excludes("[Na+].O=C([O-])c1ccccc1OC(C)=O")
        'is Aspirin'
        >>> held_out.excludes("CCc1c[nH]c2ccccc12")
        'shares the scaffold of Indole'
        >>> held_out.excludes("CCOC(C)=O") is None
        True
    """

    def __init__(self, molecules: Iterable[tuple[str, str]] | None = None) -> None:
        self.blocks: dict[str, str] = {}
        self.scaffolds: dict[str, str] = {}
        signatures = set()
        for name, smiles in heldout_molecules() if molecules is None else molecules:
            parent = _parent(_read(smiles))
            self.blocks.setdefault(_block(parent), name)
            signatures.add(_signature(parent))
            if scaffold := _scaffold(parent):
                self.scaffolds.setdefault(scaffold, name)
        self._signatures = frozenset(signatures)

    def excludes(self, molecule: Chem.Mol | str) -> str | None:
        """Why ``molecule`` must be left out, or None when a model may be trained on it.

        Args:
            molecule: sanitised RDKit molecule, or SMILES.

        Returns:
            ``"is NAME"``, ``"shares the scaffold of NAME"`` or None.

        Raises:
            TypeError: ``molecule`` is neither a molecule nor a string.
            ValueError: the SMILES cannot be read.
        """
        parent = _parent(_read(molecule))
        # An InChIKey costs more than all else here: the signature spares nearly every one of them.
        if _signature(parent) in self._signatures and (name := self.blocks.get(_block(parent))):
            return f"is {name}"
        if name := self.scaffolds.get(_scaffold(parent)):
            return f"shares the scaffold of {name}"
        return None


def _read(molecule: Chem.Mol | str) -> Chem.Mol:
    if isinstance(molecule, Chem.Mol):
        return molecule
    if not isinstance(molecule, str):
        raise TypeError(
            f"molecule must be an RDKit Mol or a SMILES string, got {type(molecule).__name__}"
        )
    mol = Chem.MolFromSmiles(molecule)
    if mol is None:
        raise ValueError(f"molecule must be a SMILES that RDKit can read, got {molecule!r}")
    return mol


def _parent(mol: Chem.Mol) -> Chem.Mol:
    if mol.GetNumAtoms() > mol.GetNumHeavyAtoms():
        mol = Chem.RemoveAllHs(mol)
    if len(Chem.GetMolFrags(mol)) > 1:
        mol = _FRAGMENTS.choose(mol)
    return _neutral(mol)


def _neutral(mol: Chem.Mol) -> Chem.Mol:
    return _UNCHARGER.uncharge(mol) if mol.HasSubstructMatch(_CHARGED) else mol


def _signature(mol: Chem.Mol) -> tuple[str, int]:
    """Heavy-atom formula and number of bonds: equal whenever the first InChIKey blocks are."""
    return _NOT_HEAVY.sub("", rdMolDescriptors.CalcMolFormula(mol)), mol.GetNumBonds()


def _block(mol: Chem.Mol) -> str:
    return Chem.MolToInchiKey(mol)[:14]


def _scaffold(mol: Chem.Mol) -> str:
    """Scaffold SMILES, or the empty string below two rings (a scaffold keeps every ring)."""
    if rdMolDescriptors.CalcNumRings(mol) < 2:
        return ""
    # Without its oxygen an aromatic N-oxide is left as [nH+].
    scaffold = _neutral(MurckoScaffold.GetScaffoldForMol(mol))
    return Chem.MolToSmiles(scaffold, isomericSmiles=False)
