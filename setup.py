"""Drives CMake for the native module; everything else about the package is in pyproject.toml."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
NATIVE = os.environ.get("EDT_NATIVE", "")  # 1: must build, 0: never, unset: where it can
CUDA = os.environ.get("EDT_CUDA_NATIVE") == "1"  # then the CUDA kernels, too, and they must


def torch_folder() -> Path | None:
    """The installed torch, found by path: importing it would cost seconds."""
    for kind in ("platlib", "purelib"):
        folder = Path(sysconfig.get_path(kind)) / "torch"
        if (folder / "version.py").exists():
            return folder
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def run(command: list) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        torch = torch_folder()
        if torch is None:
            raise CompileError("the native module needs torch's headers: install torch first")
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        # Kept, so that what has not changed is not compiled again, whoever builds: kernels know
        # neither Python nor torch. CMake refuses a folder that was moved, hence the name, and one
        # that is damaged.
        build = ROOT / "build" / f"cmake-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]}"
        known = build.exists()
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DTORCH_FOLDER={torch}"]
        python = sysconfig.get_path("include")
        configure += [f"-DPYTHON_INCLUDE={python}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}"]
        configure += [f"-DEDT_CUDA_NATIVE={'ON' if CUDA else 'OFF'}"]
        # The one of this environment: a build folder remembers one that may be gone.
        ninja = shutil.which("ninja")
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        try:
            try:
                run(configure)
            except subprocess.CalledProcessError:
                if not known:
                    raise
                shutil.rmtree(build)
                run(configure)
            run(["cmake", "--build", build])
        except (OSError, subprocess.CalledProcessError) as error:
            # What an optional extension may fail with.
            raise CompileError(f"CMake did not build the native module: {error}") from error


native = Extension("edt_kernels._C", [], py_limited_api=True, optional=NATIVE != "1" and not CUDA)
setup(
    ext_modules=[] if NATIVE == "0" else [native],
    cmdclass={"build_ext": CMakeBuild},
    options={} if NATIVE == "0" else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
