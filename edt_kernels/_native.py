"""Loads the native CPU kernels, and says which backends are active and why."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path

import torch

ISA_NAMES = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
loaded = False
_failure: str | None = None
_library: ctypes.CDLL | None = None
_isa: str | None = None


def load() -> None:
    """Load `edt_kernels._C` once; where it is missing, say so and go on with the references."""
    global loaded, _failure, _library, _isa
    if os.environ.get("EDT_NATIVE") == "0":
        _failure = "EDT_NATIVE=0 asks for the reference path"
        return
    try:
        module = importlib.import_module("edt_kernels._C")
    except ImportError as error:
        _failure = f"edt_kernels._C cannot be loaded: {error}"
        warnings.warn(
            f"edt_kernels runs on its slower torch reference path ({_failure}). "
            "Install a C++ compiler and run `EDT_NATIVE=1 pip install -e .` to see what fails.",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    library = ctypes.CDLL(module.__file__)
    library.edt_sources.restype = library.edt_cpu_isa.restype = ctypes.c_char_p
    sources = Path(__file__).parents[1] / "csrc"
    if sources.is_dir() and library.edt_sources().decode() != _hash(sources):
        raise RuntimeError(f"{module.__file__} is not built from {sources}: run pip install -e .")
    _isa = library.edt_cpu_isa().decode()
    wanted = os.environ.get("EDT_CPU_ISA")
    if wanted and wanted != _isa:
        raise RuntimeError(
            f"EDT_CPU_ISA must name a level that this machine has, of {', '.join(ISA_NAMES)}; "
            f"got {wanted!r}, the best here is {_isa!r}"
        )
    library.edt_poison.argtypes = [ctypes.c_bool]
    loaded, _library = True, library


def poison(on: bool) -> None:
    """Whether native kernels fill fresh memory with NaN, for tests."""
    if _library is not None:
        _library.edt_poison(on)


def _hash(sources: Path) -> str:
    """Of the files that the native module is built from, as CMakeLists.txt computes it."""
    files = [*sources.glob("*.cpp"), *sources.glob("*.h"), *sources.glob("cpu/*")]
    names = sorted(files, key=lambda file: file.relative_to(sources).as_posix())
    digests = (hashlib.sha256(file.read_bytes()).hexdigest() for file in names)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def build_info() -> dict[str, object]:
    """What serves the ops in this process, and why.

    Returns:
        A dict with `native` (are the CPU kernels loaded), `reason` (why not, or None), `file` (from
        where, or None), `cpu_isa` (the instruction set in use, or None), `torch` (its version),
        `ops` (per op the backend that serves CPU tensors: "native" or "reference"), `triton` (its
        version, or None where it is not installed) and `cuda_ops` (per op the backend that serves
        CUDA tensors: "triton" or "reference"). An op that has a Triton kernel is served by it
        wherever Triton is installed, which is not imported before.

    Example:
        >>> import edt_kernels
        >>> sorted(edt_kernels.build_info())
        ['cpu_isa', 'cuda_ops', 'file', 'native', 'ops', 'reason', 'torch', 'triton']
    """
    from edt_kernels import _library

    def served(name: str, device: str, kernel: str) -> str:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"edt::{name}", device)
        return kernel if has_kernel else "reference"

    return {
        "native": _failure is None,
        "reason": _failure,
        "file": getattr(sys.modules.get("edt_kernels._C"), "__file__", None),
        "cpu_isa": _isa,
        "torch": torch.__version__,
        "ops": {name: served(name, "CPU", "native") for name in _library.NAMES},
        "triton": metadata.version("triton") if _library.has_triton() else None,
        "cuda_ops": {name: served(name, "CUDA", "triton") for name in _library.NAMES},
    }
