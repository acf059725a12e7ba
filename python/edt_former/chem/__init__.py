"""Chemistry: from SMILES to arrays, fragments, groups, conformers. The home of RDKit."""

from edt_former.chem.conformers import (
    Conformer,
    ConformerOptions,
    ConformerPool,
    make_conformer,
    make_conformers,
)
from edt_former.chem.features import (
    ATOM_FEATURE_SIZES,
    BOND_FEATURE_SIZES,
    FEATURES_ID,
    PRETRAIN_ATOM_SIZES,
    PRETRAIN_BOND_SIZES,
    PRETRAIN_FEATURES_ID,
)
from edt_former.chem.fragments import FUNCTIONAL_GROUPS, brics_fragments, functional_groups
from edt_former.chem.graph_data import check_graph_data
from edt_former.chem.molecule import (
    MAX_ATOMS,
    Invalid,
    Molecule,
    rdkit_mol,
    read_as_written,
    read_molecule,
    read_molecules,
    read_selfies,
)
from edt_former.chem.molecule_file import read_file
from edt_former.chem.motifs import MOTIF_WIDTH, Motifs, find_motifs, motif_features

__all__ = [
    "ATOM_FEATURE_SIZES",
    "BOND_FEATURE_SIZES",
    "FEATURES_ID",
    "FUNCTIONAL_GROUPS",
    "MAX_ATOMS",
    "MOTIF_WIDTH",
    "PRETRAIN_ATOM_SIZES",
    "PRETRAIN_BOND_SIZES",
    "PRETRAIN_FEATURES_ID",
    "Conformer",
    "ConformerOptions",
    "ConformerPool",
    "Invalid",
    "Molecule",
    "Motifs",
    "brics_fragments",
    "check_graph_data",
    "find_motifs",
    "functional_groups",
    "make_conformer",
    "make_conformers",
    "motif_features",
    "rdkit_mol",
    "read_as_written",
    "read_file",
    "read_molecule",
    "read_molecules",
    "read_selfies",
]
