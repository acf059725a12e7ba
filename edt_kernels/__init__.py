"""Ragged kernels that let a frozen language model read molecules.

A batch is packed: `values [N, ...]` with `offsets [B + 1]`, no padding inside. Every function is
differentiable where its docstring says so, runs under `torch.compile(fullgraph=True)`, and gives a
molecule the same bits alone or in any batch.
"""

from importlib.metadata import version

from edt_kernels import _native
from edt_kernels._native import build_info
from edt_kernels.ops.entropy import entropy
from edt_kernels.ops.entropy_patches import entropy_patches
from edt_kernels.ops.find_patches import Patches, find_patches
from edt_kernels.ops.linear_entropy import linear_entropy

_native.load()  # after the schemas: native code only adds implementations

__version__ = version("edt-kernels")
__all__ = ["Patches", "build_info", "entropy", "entropy_patches", "find_patches", "linear_entropy"]
