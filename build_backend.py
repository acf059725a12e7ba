"""Setuptools' build backend, asking for torch only where the environment has none.

The native module uses torch's headers through the stable ABI, so the torch that the package will
run with serves the build too; an isolated build would otherwise download a second one.
"""

import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (a PEP 517 backend is a namespace)


def _torch_requirement():
    site_packages = (Path(sysconfig.get_path(kind)) for kind in ("platlib", "purelib"))
    if any((path / "torch" / "version.py").exists() for path in site_packages):
        return []
    lines = Path(__file__).with_name("pyproject.toml").read_text().splitlines()
    return [line.strip(' ",') for line in lines if line.strip().startswith('"torch>=')]


def get_requires_for_build_wheel(config_settings=None):
    """Setuptools' own requirements, and torch where it is missing."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    """Setuptools' own requirements, and torch where it is missing."""
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()
