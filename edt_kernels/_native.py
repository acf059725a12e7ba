"""Loads the native kernels, and says which backends are active and why."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

ISA_NAMES = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
CUDA_OPS = ("entropy_patches", "ragged_attention", "ragged_attention_bwd")
"""What `edt_kernels._C_cuda` has kernels for."""
SOURCES = Path(__file__).parents[1] / "csrc"

cuda_asked = os.environ.get("EDT_CUDA_NATIVE") == "1"
loaded = False
_failure: str | None = None
_library: ctypes.CDLL | None = None
_isa: str | None = None


def load() -> None:
    """Load the native modules once.

    Without `edt_kernels._C` this says so and goes on with the references; the CUDA kernels are
    loaded where EDT_CUDA_NATIVE=1 asks for them, and then they must be there.
    """
    global loaded, _failure, _library, _isa
    if cuda_asked:
        _load_cuda()
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
    _check_sources(module, library.edt_sources(), ("*.cpp", "*.h", "cpu/*"))
    _isa = library.edt_cpu_isa().decode()
    wanted = os.environ.get("EDT_CPU_ISA")
    if wanted and wanted != _isa:
        raise RuntimeError(
            f"EDT_CPU_ISA must name a level that this machine has, of {', '.join(ISA_NAMES)}; "
            f"got {wanted!r}, the best here is {_isa!r}"
        )
    library.edt_poison.argtypes = [ctypes.c_bool]
    loaded, _library = True, library


def _load_cuda() -> None:
    try:
        module = importlib.import_module("edt_kernels._C_cuda")
    except ImportError as error:
        raise RuntimeError(
            f"EDT_CUDA_NATIVE=1 asks for the CUDA C++ kernels, which cannot be loaded ({error}): "
            "build them with `EDT_CUDA_NATIVE=1 pip install -e .`, which needs nvcc and a torch "
            "for CUDA, or unset EDT_CUDA_NATIVE"
        ) from error
    library = ctypes.CDLL(module.__file__)
    library.edt_cuda_sources.restype = ctypes.c_char_p
    _check_sources(module, library.edt_cuda_sources(), ("check.h", "cuda/*"))


def poison(on: bool) -> None:
    """Whether native kernels fill fresh memory with NaN, for tests."""
    if _library is not None:
        _library.edt_poison(on)


def _check_sources(module: ModuleType, built_from: bytes, patterns: Iterable[str]) -> None:
    """RuntimeError where a module in a checkout is older than its sources."""
    if SOURCES.is_dir() and built_from.decode() != _hash(SOURCES, patterns):
        raise RuntimeError(f"{module.__file__} is not built from {SOURCES}: run pip install -e .")


def _hash(sources: Path, patterns: Iterable[str]) -> str:
    """Of the files that a native module is built from, as CMakeLists.txt computes it."""
    files = [file for pattern in patterns for file in sources.glob(pattern)]
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
        CUDA tensors: "native, unmeasured", "triton" or "reference"). An op that has a Triton kernel
        is served by it wherever Triton is installed, which is not imported before.

    Example:
        >>> import edt_kernels
        >>> sorted(edt_kernels.build_info())
        ['cpu_isa', 'cuda_ops', 'file', 'native', 'ops', 'reason', 'torch', 'triton']
    """
    from edt_kernels import _library

    def registered(name: str, device: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"edt::{name}", device)

    def cuda_backend(name: str) -> str:
        if cuda_asked and name in CUDA_OPS:
            return "native, unmeasured"
        return "triton" if registered(name, "CUDA") else "reference"

    return {
        "native": _failure is None,
        "reason": _failure,
        "file": getattr(sys.modules.get("edt_kernels._C"), "__file__", None),
        "cpu_isa": _isa,
        "torch": torch.__version__,
        "ops": {
            name: "native" if registered(name, "CPU") else "reference" for name in _library.NAMES
        },
        "triton": metadata.version("triton") if _library.has_triton() else None,
        "cuda_ops": {name: cuda_backend(name) for name in _library.NAMES},
    }
