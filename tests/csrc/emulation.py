"""The CUDA kernels on a CPU: compiled for it, and put in the place of its own kernels.

`pytest -p tests.csrc.emulation tests/ops/test_ragged_attention.py` runs any test on them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from edt_kernels import _native

ROOT = Path(__file__).parents[2]
OPS = ("entropy_patches", "ragged_attention", "ragged_attention_bwd")
BUILT = "EDT_EMULATED"  # environment variable: the library, where it is built already
KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def build(folder: Path) -> Path:
    """The library of all kernels and launchers."""
    target = folder / "emulated.so"
    torch_folder = Path(torch.__file__).parent
    folders = ROOT / "csrc/cuda", ROOT / "tests/csrc"
    sources = [file for folder in folders for file in sorted(folder.glob("*.c[up]*"))]
    sources = [file for file in sources if file.suffix in (".cu", ".cpp") and file.stem != "module"]
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wl,-Bsymbolic"]
    flags += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    flags += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += ["-include", str(ROOT / "tests/csrc/registered.h"), f"-I{ROOT / 'tests/csrc'}"]
    flags += ["-isystem", str(torch_folder / "include")]
    link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ldl"]
    command = [compiler(), *flags, "-x", "c++", *map(str, sources), "-o", str(target), *link]
    subprocess.run(command, check=True)
    return target


def call(name: str, *arguments: object) -> object:
    """An op on the emulated kernels, with CPU tensors."""
    return getattr(torch.ops.edt, name).default.redispatch(KEYS, *arguments)


@contextlib.contextmanager
def installed(library: Path) -> Iterator[Callable[[int], None]]:
    """CPU tensors are served by the emulated kernels; yields what seeds the order of threads."""
    torch.ops.load_library(library)
    order = ctypes.CDLL(str(library)).edt_emulated_order
    order.argtypes = [ctypes.c_uint32]
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.library._scoped_library("edt", "IMPL") as scoped,
        warnings.catch_warnings(),
    ):
        patch.setattr(_native, "loaded", False)
        warnings.simplefilter("ignore")  # overriding is the purpose
        for name in OPS:
            scoped.impl(name, partial(call, name), "CPU", allow_override=True)
        yield order


_stack = contextlib.ExitStack()


def pytest_configure() -> None:
    """As a plugin: in the place of the CPU's kernels for the whole run."""
    folder = _stack.enter_context(tempfile.TemporaryDirectory())
    _stack.enter_context(installed(Path(os.environ.get(BUILT) or build(Path(folder)))))


def pytest_unconfigure() -> None:
    _stack.close()
