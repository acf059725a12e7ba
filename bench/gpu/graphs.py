"""The whole path in a CUDA graph: what eager calls give, and nothing is waited for."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.gpu.checks import Found, no_waiting
from bench.gpu.pipeline import Batch, Pipeline
from bench.gpu.run import CheckError, Run, Section

# The same number of molecules at one capacity: full, sparse, with empty ones.
LENGTHS = ([30, 8, 45, 17], [1, 2, 60, 3], [0, 64, 0, 36], [25, 25, 25, 25])
CAPACITY = 100
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def run(run: Run, section: Section) -> None:
    """Capture in both dtypes, and that the path waits for nothing."""
    if not run.on_gpu:
        section.add("entropy to splice in a graph", skipped="a CPU captures no graphs")
        section.add("entropy to splice waits for nothing", skipped="a CPU queues nothing")
        return
    checks = {
        f"entropy to splice in a graph, {name}": partial(replayed, run.device, dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    checks["entropy to splice waits for nothing"] = partial(path_never_waits, run.device)
    section.each(checks)


@torch.no_grad()
def replayed(device: torch.device, dtype: torch.dtype) -> Found:
    """A graph captured for one batch gives for others of its capacity what eager calls give."""
    pipeline = Pipeline().to(device, dtype).eval()
    held = Batch.of(LENGTHS[0], CAPACITY, device, dtype)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            pipeline(held)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = pipeline(held)

    worst, equal = 0.0, True
    for lengths in (*LENGTHS[1:], LENGTHS[0]):
        batch = Batch.of(lengths, CAPACITY, device, dtype)
        for kept, new in zip(held, batch, strict=True):
            kept.copy_(new)
        graph.replay()
        prompt, *exact = (x.clone() for x in outputs)
        wanted, *wanted_exact = pipeline(batch)
        for mine, eager in zip(exact, wanted_exact, strict=True):
            if not torch.equal(mine, eager):
                raise CheckError(f"a replay with {lengths} atoms has other offsets or patches")
        error = distance(prompt, wanted)
        if not error <= TOLERANCE[dtype]:
            raise CheckError(f"a replay with {lengths} atoms is off by {error:.3g}")
        worst, equal = max(worst, error), equal and torch.equal(prompt, wanted)
    return {"largest difference": worst, "the same bits": equal}


@torch.no_grad()
def path_never_waits(device: torch.device) -> Found:
    """Entropy to splice, without a wait."""
    pipeline = Pipeline().to(device).eval()
    batch = Batch.of(LENGTHS[0], CAPACITY, device, torch.float32)
    pipeline(batch)
    with no_waiting():
        pipeline(batch)
    return {"holds": True}


def distance(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    found, wanted = found.detach().double(), wanted.detach().double()
    norm, difference = float(wanted.norm()), float((found - wanted).norm())
    return difference / norm if norm else difference
