"""The connector under torch.compile: whole, for sizes that change, with gradients."""

from __future__ import annotations

import time
from functools import partial

import torch
from torch import Tensor

import edt_kernels
from bench.gpu.checks import Found
from bench.gpu.graphs import distance
from bench.gpu.pipeline import Batch, Pipeline
from bench.gpu.run import CheckError, Run, Section
from edt_former.graph.encoder import GraphFeatures


def run(run: Run, section: Section) -> None:
    """By inductor; a trial uses a backend that writes no code."""
    what = f"the connector compiled by {run.backend}"
    section.each({what: partial(compiles, run.device, run.backend)})


def compiles(device: torch.device, backend: str) -> Found:
    """The connector, without a graph break and for sizes that change, forward and backward."""
    connector = Pipeline(layers=1).connector.to(device)
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
            error = distance(mine, eager)
            if not error <= 1e-4:
                raise CheckError(f"compiled, {len(lengths)} molecules are off by {error:.3g}")
            worst = max(worst, error)
    return {"largest difference": worst, "seconds of each batch": seconds}
