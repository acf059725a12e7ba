"""Every op on a GPU: what `python -m bench.gpu` checks before it times anything."""

from __future__ import annotations

import pytest

from bench.gpu import checks
from bench.gpu.cases import cases

CASES = {case.name: case for case in cases()}


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(device, name, dtype):
    checks.correct(CASES[name], device, checks.DTYPES[dtype])


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_again(device, name, dtype):
    checks.repeats(CASES[name], device, checks.DTYPES[dtype])


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_a_molecule_has_the_same_bits_in_every_batch(device, name, dtype):
    checks.batch_invariant(CASES[name], device, checks.DTYPES[dtype])


@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_for_the_device(device, name):
    checks.never_waits(CASES[name], device, checks.DTYPES["fp32"])
