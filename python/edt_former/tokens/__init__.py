"""How a molecule is cut: the next-atom predictor, and patches from entropies or fragments."""

from edt_former.tokens.connected import connected_patches, split_components
from edt_former.tokens.controls import control_patches
from edt_former.tokens.cutting import (
    alter_entropy_patches,
    cut_by_entropy,
    cut_molecules,
    cut_on_device,
)
from edt_former.tokens.finer import finer_patches
from edt_former.tokens.node_entropy import node_entropies
from edt_former.tokens.patches import PatchOptions, pack_patches, unpack_patches
from edt_former.tokens.predictor import NextAtomPredictor
from edt_former.tokens.published import PublishedPatchOptions

__all__ = [
    "NextAtomPredictor",
    "PatchOptions",
    "PublishedPatchOptions",
    "alter_entropy_patches",
    "connected_patches",
    "control_patches",
    "cut_by_entropy",
    "cut_molecules",
    "cut_on_device",
    "finer_patches",
    "node_entropies",
    "pack_patches",
    "split_components",
    "unpack_patches",
]
