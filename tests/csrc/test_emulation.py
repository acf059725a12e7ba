"""The emulated GPU itself: it computes what the hardware would, and finds mistakes."""

from __future__ import annotations

import ctypes

import pytest
import torch

from edt_kernels import ragged_attention

SUCCESS, INVALID, FAILED = 0, 1, 719


@pytest.fixture(scope="module")
def launch(library):
    loaded = ctypes.CDLL(str(library))

    def run(name: str, *, shared: int = 2048, seed: int = 0) -> tuple[int, list[int], str]:
        out = (ctypes.c_int * 64)()
        loaded.edt_emulated_order(seed)
        error = loaded.edt_fault(FAULTS.index(name), out, shared)
        return error, list(out), loaded.edt_emulated_failure().decode()

    loaded.edt_emulated_failure.restype = ctypes.c_char_p
    return run


FAULTS = (
    *("no_barrier", "half_a_barrier", "half_a_shuffle", "two_places"),
    *("no_wait", "not_aligned", "matrix_not_aligned", "uninitialised"),
)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("half_a_barrier", "threads wait at a barrier or shuffle that others"),
        ("half_a_shuffle", "threads wait at a barrier or shuffle that others"),
        ("two_places", "lanes of a warp meet at different places"),
        ("no_wait", "a thread ended before its copies were waited for"),
        ("not_aligned", "the source of an asynchronous copy is not aligned"),
        ("matrix_not_aligned", "a row of a matrix in shared memory is not aligned"),
    ],
)
def test_a_fault_fails_the_launch(launch, fault, message):
    error, _, told = launch(fault)
    assert error == FAILED and message in told


def test_a_missing_barrier_shows_in_another_order(launch):
    found = {tuple(launch("no_barrier", seed=seed)[1]) for seed in range(5)}
    assert len(found) > 1


def test_shared_memory_begins_full_of_nan(launch):
    error, out, _ = launch("uninitialised")
    assert error == SUCCESS and set(out) == {-1}


def test_more_shared_memory_than_was_asked_for_is_refused(launch):
    assert launch("uninitialised", shared=49 << 10)[0] == INVALID


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("order")
def test_numbers_are_read_and_rounded_as_torch_does(dtype):
    """With one key the output is its value; with two equal ones their mean, rounded once."""
    every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite() & (every.abs() < 3e4)]
    one = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    v = torch.stack([every, one]).unsqueeze(1)
    q = torch.zeros(1, 1, len(every), dtype=dtype)
    k = torch.zeros_like(v)
    offsets = torch.tensor([0, 1])
    assert torch.equal(ragged_attention(q, k[:1], v[:1], offsets, offsets), v[:1])
    mean = (v.float().sum(0) / 2).to(dtype)
    assert torch.equal(ragged_attention(q, k, v, offsets, torch.tensor([0, 2]))[0], mean)
