from __future__ import annotations

import pytest
import torch

from edt_kernels import testing


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
