"""The build: asks for torch only where there is none, and goes on without a compiler."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def backend():
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_torch_is_required_where_it_is_missing(backend, monkeypatch, tmp_path):
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda _: str(tmp_path))
    wanted = backend._torch_requirement()
    assert len(wanted) == 1 and wanted[0].startswith("torch>=")
    assert f'"{wanted[0]}"' in (ROOT / "pyproject.toml").read_text()


def test_torch_that_is_there_serves_the_build(backend, monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").touch()
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda _: str(tmp_path))
    assert backend._torch_requirement() == []


def test_the_backend_is_setuptools_otherwise(backend):
    hooks = ("build_wheel", "build_editable", "build_sdist", "get_requires_for_build_sdist")
    assert all(callable(getattr(backend, hook)) for hook in hooks)


def build(folder: Path, native: str, cuda: str = "") -> subprocess.CompletedProcess:
    """`build_ext` on a machine whose only programs are in `folder`: without CMake, if not there."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    for package in ("edt_kernels", "python/edt_former"):
        (folder / package).mkdir(parents=True, exist_ok=True)
        (folder / package / "__init__.py").touch()
    environment = {**os.environ, "PATH": str(folder), "EDT_NATIVE": native}
    environment["EDT_CUDA_NATIVE"] = cuda
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_without_a_compiler_the_build_goes_on_and_says_so(tmp_path):
    result = build(tmp_path, "")
    assert result.returncode == 0, result.stderr
    assert "CMake did not build the native module" in result.stderr


def test_a_native_build_that_was_asked_for_must_succeed(tmp_path):
    result = build(tmp_path, "1")
    assert result.returncode != 0
    assert "CMake did not build the native module" in result.stderr


def test_cuda_kernels_that_were_asked_for_must_be_built(tmp_path):
    result = build(tmp_path, "", cuda="1")
    assert result.returncode != 0
    assert "CMake did not build the native module" in result.stderr


def test_no_native_build_where_none_is_wanted(tmp_path):
    result = build(tmp_path, "0")
    assert result.returncode == 0 and "CMake" not in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="CMake is a shell script here")
def test_a_damaged_build_folder_is_made_anew_and_a_good_one_is_kept(tmp_path):
    cmake = tmp_path / "cmake"
    cmake.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --build ]; then exit 0; fi\n'
        'if [ -e "$4/damaged" ]; then exit 1; fi\n'
        '/bin/mkdir -p "$4"\n'
    )
    cmake.chmod(0o755)
    assert build(tmp_path, "1").returncode == 0
    (folder,) = (tmp_path / "build").glob("cmake-*")
    (folder / "object").touch()
    assert build(tmp_path, "1").returncode == 0 and (folder / "object").exists()
    (folder / "damaged").touch()
    assert build(tmp_path, "1").returncode == 0 and not list(folder.iterdir())
