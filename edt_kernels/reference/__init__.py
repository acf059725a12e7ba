"""Every op in plain torch: the definition of correct, and the path where no kernel is loaded."""

from edt_kernels.reference.entropy import entropy, entropy_bwd

__all__ = ["entropy", "entropy_bwd"]
