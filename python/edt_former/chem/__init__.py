"""Chemistry: from SMILES to arrays, fragments and functional groups. The home of RDKit."""

from edt_former.chem.features import ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES, FEATURES_ID
from edt_former.chem.fragments import FUNCTIONAL_GROUPS, brics_fragments, functional_groups
from edt_former.chem.graph_data import check_graph_data
from edt_former.chem.molecule import (
    MAX_ATOMS,
    Invalid,
    Molecule,
    rdkit_mol,
    read_as_written,
    read_file,
    read_molecule,
    read_molecules,
    read_selfies,
)

__all__ = [
    "ATOM_FEATURE_SIZES",
    "BOND_FEATURE_SIZES",
    "FEATURES_ID",
    "FUNCTIONAL_GROUPS",
    "MAX_ATOMS",
    "Invalid",
    "Molecule",
    "brics_fragments",
    "check_graph_data",
    "functional_groups",
    "rdkit_mol",
    "read_as_written",
    "read_file",
    "read_molecule",
    "read_molecules",
    "read_selfies",
]
