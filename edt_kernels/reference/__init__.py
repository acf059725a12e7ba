"""Every op in plain torch: the definition of correct, and the path where no kernel is loaded."""

from edt_kernels.reference.entropy import entropy, entropy_bwd
from edt_kernels.reference.entropy_patches import entropy_patches
from edt_kernels.reference.find_patches import find_patches
from edt_kernels.reference.linear_entropy import linear_entropy, linear_entropy_bwd

__all__ = [
    "entropy",
    "entropy_bwd",
    "entropy_patches",
    "find_patches",
    "linear_entropy",
    "linear_entropy_bwd",
]
