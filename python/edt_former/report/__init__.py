"""What a run shows: measurements, tables, pictures.

>>> import edt_former
>>> from edt_former.chem import read_molecules
>>> from edt_former.report import patch_molecules
>>> molecules = read_molecules(["CC(=O)Oc1ccccc1C(=O)O"])
>>> (aspirin,) = patch_molecules(molecules, edt_former.load().predictor)
>>> svg, figure = aspirin.svg(), aspirin.curve()
"""

from edt_former.report.drawing import draw_patches, draw_patches_png
from edt_former.report.entropy_curve import entropy_curve
from edt_former.report.patches import PatchedMolecule, patch_molecules

__all__ = [
    "PatchedMolecule",
    "draw_patches",
    "draw_patches_png",
    "entropy_curve",
    "patch_molecules",
]
