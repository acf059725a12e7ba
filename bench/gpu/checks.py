"""What must hold before a time means anything; `tests/gpu` asks the same.

Every check raises `CheckError`, or returns what it found for a record.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from bench.contest import relative_error
from bench.gpu.cases import MOLECULE, Call, Case, Output, cases
from bench.gpu.run import CheckError, Run, Section
from edt_kernels import offsets_from_lengths

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WAITS = "no wait for the device"
Found = dict[str, object]
HOLDS: Found = {"holds": True}
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest ||found - truth|| / ||truth|| of an output or gradient."""


def run(run: Run, section: Section) -> None:
    """All checks of all ops in the dtypes of goals; in float16 what is new, that it is correct."""
    section.each(
        {
            f"{name}: {case.name}, {dtype}": partial(check, case, run.device, DTYPES[dtype])
            for dtype in (("fp32",) if run.tiny else DTYPES)
            for name, check in CHECKS.items()
            for case in cases()
            if (check is not never_waits or run.on_gpu) and (check is correct or dtype != "fp16")
        }
    )
    if not run.on_gpu:
        section.add(WAITS, skipped="nothing is queued on a CPU, so nothing is waited for")


def correct(case: Case, device: torch.device | str, dtype: torch.dtype) -> Found:
    """Outputs and gradients against float64 on the CPU: the largest error, relative in L2."""
    wanted = Call(case.rounded(dtype), "cpu", torch.float64)()
    found = Call(case, device, dtype)()
    worst = 0.0
    for name, output in found.items():
        mine, truth = output.values.cpu(), wanted[name].values
        if mine.shape != truth.shape:
            raise CheckError(
                f"{case.name}: {name} has shape {tuple(mine.shape)}, the truth {tuple(truth.shape)}"
            )
        error, allowed = _error(mine, truth), TOLERANCE[dtype] if truth.is_floating_point() else 0
        if not error <= allowed:
            raise CheckError(f"{case.name}: {name} is off by {error:.3g}, allowed is {allowed:.3g}")
        worst = max(worst, error)
    return {"largest error": worst}


def repeats(case: Case, device: torch.device | str, dtype: torch.dtype) -> Found:
    """Two calls give the same bits."""
    call = Call(case, device, dtype)
    first = call()
    for name, output in call().items():
        _same_bits(f"{case.name}: {name}, called again,", output.values, first[name].values)
    return HOLDS


def batch_invariant(case: Case, device: torch.device | str, dtype: torch.dtype) -> Found:
    """Every molecule has the same bits alone, and in a batch in reverse."""
    whole = _by_molecule(Call(case, device, dtype)(), case)
    last = case.molecules - 1
    backwards = case.of(range(last, -1, -1))
    reverse = _by_molecule(Call(backwards, device, dtype)(), backwards)
    for m in range(case.molecules):
        alone = case.of([m])
        single = _by_molecule(Call(alone, device, dtype)(), alone)
        for name, parts in whole.items():
            _same_bits(f"{case.name}: {name} of molecule {m} alone", single[name][0], parts[m])
            among = reverse[name][last - m]
            _same_bits(f"{case.name}: {name} of molecule {m} among others", among, parts[m])
    return HOLDS


def never_waits(case: Case, device: torch.device | str, dtype: torch.dtype) -> Found:
    """Neither forward nor backward waits for the GPU."""
    call = Call(case, device, dtype)
    call()  # compiles what is compiled at the first call
    with no_waiting():
        call()
    return HOLDS


CHECKS = {
    "correct": correct,
    "the same again": repeats,
    "alone as in a batch": batch_invariant,
    WAITS: never_waits,
}


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host would wait for the GPU."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _error(found: Tensor, truth: Tensor) -> float:
    if not truth.is_floating_point():
        return relative_error(found, truth)
    found = found.double()
    finite = truth.isfinite()
    if not torch.equal(found[~finite].nan_to_num(7.0), truth[~finite].nan_to_num(7.0)):
        return torch.inf
    norm = float(truth[finite].norm())
    difference = float((found[finite] - truth[finite]).norm())
    return difference / norm if norm else difference


def _same_bits(what: str, found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape:
        raise CheckError(f"{what} has shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
    a, b = (x.contiguous().flatten().view(torch.uint8) for x in (found, wanted))
    if not torch.equal(a, b):
        raise CheckError(f"{what} has other bits, by {float((found - wanted).abs().max()):.3g}")


def _by_molecule(outputs: dict[str, Output], case: Case) -> dict[str, list[Tensor]]:
    """The rows of every molecule, of what has such."""
    cuts = case.offsets() | {MOLECULE: offsets_from_lengths(torch.ones(case.molecules).long())}
    found = {}
    for name, output in outputs.items():
        if output.cut is not None:
            bounds = cuts[output.cut].tolist()
            found[name] = [output.values[a:b] for a, b in pairwise(bounds)]
    return found
