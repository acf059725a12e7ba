"""Ragged kernels that let a frozen language model read molecules.

A batch is packed: `values [N, ...]` with `offsets [B + 1]`, no padding inside. Every function is
differentiable where its docstring says so, runs under `torch.compile(fullgraph=True)`, and gives a
molecule the same bits alone or in any batch.
"""

from importlib.metadata import version

from edt_kernels import _native
from edt_kernels._native import build_info
from edt_kernels.ops.entropy import entropy

_native.load()  # after the schemas: native code only adds implementations

__version__ = version("edt-kernels")
__all__ = ["build_info", "entropy"]
