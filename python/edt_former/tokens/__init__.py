"""How a molecule is cut: the next-atom predictor, and patches from entropies or fragments."""

from edt_former.tokens.patches import PatchOptions, pack_patches, unpack_patches
from edt_former.tokens.predictor import NextAtomPredictor
from edt_former.tokens.published import PublishedPatchOptions

__all__ = [
    "NextAtomPredictor",
    "PatchOptions",
    "PublishedPatchOptions",
    "pack_patches",
    "unpack_patches",
]
