"""Batches of training, 48 and 4 molecules: what a call costs, and what is left of it in a graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import edt_kernels
from bench.attention import operands
from bench.contest import WrongResultError, relative_error
from bench.gpu.clock import Step
from bench.gpu.pipeline import Batch, Pipeline
from bench.gpu.run import Run, Section
from bench.layouts import padded_heads
from bench.workloads import HEAD_WIDTH, HEADS, TRAIN_4, TRAIN_48, Workload, rows
from edt_kernels import _library

WIDTH = HEADS * HEAD_WIDTH
VOCABULARY = 38
OURS, ON_CPU = "ours", "ours on the CPU"
TOLERANCE = 3e-2  # of bfloat16, by another order of sums


def run(run: Run, section: Section) -> None:
    """Microseconds of a call from Python, and in a CUDA graph, where only kernels count."""
    work: dict[str, Callable[[], None]] = {}
    for whole in (TRAIN_48, TRAIN_4):
        workload = whole.first(2) if run.tiny else whole
        for name, steps in _ops(workload, run.device).items():
            what = f"{name}, {workload.name}"
            work[what] = partial(_op, run, section, what, steps)
        there = workload.to(run.device)
        work[f"backends, {workload.name}"] = partial(_backends, run, section, there)
    work["entropy to splice"] = partial(_path, run, section)
    section.all(work)


def _ops(workload: Workload, device: torch.device) -> dict[str, dict[str, Step]]:
    """By op, ours, ours on the CPU and maybe a peer; the numbers are the same on both devices."""
    found = _calls(workload, device)
    for name, steps in _calls(workload, torch.device("cpu")).items():
        found[name][ON_CPU] = steps[OURS]
    return found


def _calls(workload: Workload, device: torch.device) -> dict[str, dict[str, Step]]:
    atoms, queries = workload.atom_offsets, workload.query_offsets
    q, k, v = (x.to(device) for x in operands(queries, atoms, torch.bfloat16))
    logits = rows(int(atoms[-1]), VOCABULARY).to(device)
    x = rows(int(atoms[-1]), WIDTH, dtype=torch.bfloat16).to(device)
    patches = workload.patches.atom_offsets.to(device)
    rectangles = [padded_heads(o).into(x) for o, x in ((queries, q), (atoms, k), (atoms, v))]
    atoms, queries = atoms.to(device), queries.to(device)
    upstream = torch.ones_like(q)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]

    def trained() -> object:
        read = edt_kernels.ragged_attention(*leaves, queries, atoms)
        return torch.autograd.grad(read, leaves, upstream)

    return {
        "ragged_attention": {
            OURS: lambda: edt_kernels.ragged_attention(q, k, v, queries, atoms),
            "padded SDPA without a mask": lambda: F.scaled_dot_product_attention(*rectangles),
        },
        "ragged_attention, forward and backward": {OURS: trained},
        "entropy": {OURS: lambda: edt_kernels.entropy(logits)},
        "find_patches": {OURS: lambda: edt_kernels.find_patches(logits[:, 0].abs(), atoms)},
        "entropy_patches": {OURS: lambda: edt_kernels.entropy_patches(logits, atoms)},
        "segment_pool": {OURS: lambda: edt_kernels.segment_pool(x, patches)},
    }


def _op(run: Run, section: Section, what: str, steps: dict[str, Step]) -> None:
    """Ours against the CPU, and then the times."""
    timed = {name: step for name, step in steps.items() if name != ON_CPU}
    _agree(what, steps[OURS](), steps[ON_CPU]())
    _times(run, section, what, timed)


def _agree(what: str, found: object, wanted: object) -> None:
    for a, b in zip(_tensors(found), _tensors(wanted), strict=True):
        error = _difference(a.detach().cpu(), b.detach().cpu())
        if not error <= TOLERANCE:
            raise WrongResultError(f"{what} is off by {error:.3g}, allowed is {TOLERANCE}")


def _tensors(x: object) -> list[Tensor]:
    """All, of tuples of tensors and tuples."""
    if isinstance(x, Tensor):
        return [x]
    return [tensor for part in x or () for tensor in _tensors(part)]


def _times(run: Run, section: Section, what: str, steps: dict[str, Step]) -> None:
    found = {}
    for name, step in steps.items():
        found[f"{name}, a call, us"] = 1e6 * run.clock.called(step)
        found[f"{name}, in a graph, us"] = 1e6 * run.clock.replayed(step)
    section.add(what, **found)


def _backends(run: Run, section: Section, workload: Workload) -> None:
    """CUDA C++ beside Triton, where EDT_CUDA_NATIVE=1 has chosen the first."""
    served = edt_kernels.build_info()["cuda_ops"]
    if not served["ragged_attention"].startswith("native"):
        section.add(
            f"backends, {workload.name}",
            skipped="the CUDA C++ kernels are not loaded, EDT_CUDA_NATIVE=1 builds and loads them",
        )
        return
    atoms, queries = workload.atom_offsets, workload.query_offsets
    q, k, v = operands(queries, atoms, torch.bfloat16)
    out, lse = torch.ops.edt.ragged_attention(q, k, v, queries, atoms, False, None)
    logits = rows(int(atoms[-1]), VOCABULARY, device=atoms.device)
    capacity = len(workload.atoms) + len(logits) // 2
    calls = {
        "ragged_attention": (q, k, v, queries, atoms, False, None),
        "ragged_attention_bwd": (out, None, q, k, v, lse, queries, atoms, False, None),
        "entropy_patches": (logits, atoms, 1.0, 0, 0.75, 1, None, None, capacity),
    }
    for op, arguments in calls.items():
        native = partial(getattr(torch.ops.edt, op).default, *arguments)
        triton = partial(_library.LAUNCHERS[op](), *arguments)
        _agree(f"{op} of CUDA C++, beside Triton's,", native(), triton())
        steps = {"CUDA C++": native, "Triton": triton}
        _times(run, section, f"{op} by backend, {workload.name}", steps)


def _difference(a: Tensor, b: Tensor) -> float:
    finite = b.isfinite()
    return relative_error(a[finite], b[finite].double() if b.is_floating_point() else b[finite])


def _path(run: Run, section: Section) -> None:
    """The whole path of a small connector, one call after the other and in a graph."""
    pipeline = Pipeline().to(run.device).eval()
    lengths = TRAIN_48.atoms.tolist()[: 2 if run.tiny else None]
    batch = Batch.of(lengths, sum(lengths), run.device, torch.float32)

    def step() -> object:
        with torch.no_grad():
            return pipeline(batch)

    _times(run, section, f"entropy to splice, {len(lengths)} molecules", {OURS: step})
