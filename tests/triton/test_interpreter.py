"""Every kernel under Triton's interpreter: numbers and edge cases, without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("interpreted")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("file", sorted(FOLDER.glob("test_*.py")), ids=lambda file: file.stem)
def test_interpreted(file):
    """In a process of its own: Triton reads TRITON_INTERPRET when it is first imported."""
    options = ["-q", "-c", os.devnull, "--import-mode=importlib", f"--confcutdir={FOLDER}"]
    command = [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", file]
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
