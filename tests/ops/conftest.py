from __future__ import annotations

import warnings

import pytest
import torch

from edt_kernels import _library, _native, reference, testing


@pytest.fixture(scope="module", params=["native", "reference"])
def backend(request):
    """Runs every test of a module twice: on the native kernels, and on the references."""
    if request.param == "native":
        if not _native.loaded:
            pytest.skip("the native kernels are not built")
        yield request.param
        return
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.library._scoped_library("edt", "IMPL") as library,
        warnings.catch_warnings(),
    ):
        patch.setattr(_native, "loaded", False)
        warnings.simplefilter("ignore")  # overriding is the purpose
        for name in set(_library.NAMES) & set(reference.__all__):
            library.impl(name, getattr(reference, name), "CPU", allow_override=True)
        yield request.param


@pytest.fixture
def poisoned():
    """Fresh allocations hold NaN: what is not written shows."""
    with testing.poisoned():
        yield


@pytest.fixture
def threads():
    """`threads(n)` sets the number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
