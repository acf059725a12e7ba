from __future__ import annotations

import pytest

from tests.csrc import emulation


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler to build the emulated kernels with")
    return emulation.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def order(library):
    """The emulated CUDA kernels serve CPU tensors; `order(n)` seeds the order of threads."""
    with emulation.installed(library) as seed:
        yield seed
