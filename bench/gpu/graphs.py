"""The whole path in a CUDA graph, and the connector compiled: both as good as eager."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

import edt_kernels
from bench.gpu.checks import Found, no_waiting
from bench.gpu.pipeline import Batch, Pipeline
from bench.gpu.run import CheckError, Run, Section
from edt_former.graph.encoder import GraphFeatures

# The same number of molecules at one capacity: full, sparse, with empty ones.
LENGTHS = ([30, 8, 45, 17], [1, 2, 60, 3], [0, 64, 0, 36], [25, 25, 25, 25])
CAPACITY = 100
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def run(run: Run, section: Section) -> None:
    """Capture and compilation, and that the path waits for nothing."""
    checks = {}
    if run.on_gpu:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            checks[f"entropy to splice in a graph, {name}"] = partial(replayed, run.device, dtype)
        checks["entropy to splice waits for nothing"] = partial(path_never_waits, run.device)
    else:
        section.add("entropy to splice in a graph", skipped="a CPU captures no graphs")
        section.add("entropy to splice waits for nothing", skipped="a CPU queues nothing")
    backend = "aot_eager" if run.tiny else "inductor"
    checks[f"the connector compiled by {backend}"] = partial(compiles, run.device, backend)
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
        error = _distance(prompt, wanted)
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


def compiles(device: torch.device, backend: str) -> Found:
    """The connector, without a graph break and for sizes that change, forward and backward."""
    connector = Pipeline().connector.to(device)
    weights = list(connector.parameters())
    torch._dynamo.reset()

    def tokens(atoms: Tensor, offsets: Tensor, patches: object) -> Tensor:
        return connector(GraphFeatures(atoms, offsets), {"entropy": patches}).values

    compiled = torch.compile(tokens, fullgraph=True, dynamic=True, backend=backend)
    seconds, worst = [], 0.0
    for lengths in ([30, 8, 45, 17], [5, 60, 9], [12, 3, 33, 20, 41]):
        batch = Batch.of(lengths, sum(lengths), device, torch.float32)
        _, patches = edt_kernels.entropy_patches(batch.logits, batch.offsets)
        start = time.perf_counter()
        found = compiled(batch.atoms, batch.offsets, patches)
        grads = torch.autograd.grad(found.square().sum(), weights)
        seconds.append(time.perf_counter() - start)
        wanted = tokens(batch.atoms, batch.offsets, patches)
        wanted_grads = torch.autograd.grad(wanted.square().sum(), weights)
        pairs = zip((found, *grads), (wanted, *wanted_grads), strict=True)
        for mine, eager in pairs:
            error = _distance(mine, eager)
            if not error <= 1e-4:
                raise CheckError(f"compiled, {len(lengths)} molecules are off by {error:.3g}")
            worst = max(worst, error)
    return {"largest difference": worst, "seconds of each batch": seconds}


def _distance(found: Tensor, wanted: Tensor) -> float:
    norm = float(wanted.double().norm())
    difference = float((found.double() - wanted.double()).norm())
    return difference / norm if norm else difference
