"""Triton's interpreter serves CPU tensors: set TRITON_INTERPRET=1 before Triton is imported.

`tests/triton/test_interpreter.py` runs every file here in a process of its own.
"""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
import torch

from edt_kernels import _library, _native, testing

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _interpreted():
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.library._scoped_library("edt", "IMPL") as library,
        warnings.catch_warnings(),
        np.errstate(all="ignore"),  # the interpreter computes with numpy
    ):
        patch.setattr(_native, "loaded", False)
        warnings.simplefilter("ignore")  # overriding is the purpose
        for name, launcher in _library.LAUNCHERS.items():
            library.impl(name, launcher(), "CPU", allow_override=True)
        yield


@pytest.fixture(autouse=True)
def _poisoned():
    """Fresh memory holds NaN and the largest integers: what is not written shows."""
    with testing.poisoned():
        yield


@pytest.fixture
def within_budget():
    """`within_budget(found, peer, truth)`: tensors that err at most twice as much as torch's."""

    def check(found, peer, truth):
        for ours, theirs, exact in zip(found, peer, truth, strict=True):
            largest = exact.nan_to_num(0, 0, 0).abs().max() if exact.numel() else torch.zeros(())
            # The interpreter cuts digits off where it makes bfloat16, in the output and again in
            # the gradient that is made from it: two units instead of half of one.
            share = 2 if ours.dtype == torch.bfloat16 else 0.5
            unit = share * torch.finfo(ours.dtype).eps * largest
            testing.assert_within_budget(ours, theirs, exact, eps=unit.item())

    return check
