"""Whole paths on a GPU: in a CUDA graph, compiled, in bulk."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import bulk, compiling, graphs
from bench.gpu.checks import no_waiting
from bench.workloads import TRAIN_4


@pytest.mark.parametrize("dtype", graphs.TOLERANCE, ids=str)
def test_entropy_to_splice_in_a_graph(device, dtype):
    graphs.replayed(device, dtype)


def test_entropy_to_splice_waits_for_nothing(device):
    graphs.path_never_waits(device)


def test_the_connector_compiled(device):
    compiling.compiles(device, "inductor")


@torch.no_grad()
def test_molecules_in_bulk_wait_for_nothing(device):
    graph, longest = bulk.chains(TRAIN_4.to(device)), int(TRAIN_4.atoms.max())
    model = bulk.Embedder(torch.float32, layers=1).to(device).eval()
    wanted = model(graph, longest)
    with no_waiting():
        found = model(graph, longest)
    assert torch.equal(found.offsets, wanted.offsets)


def test_a_wait_is_an_error(device):
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        torch.ones(1, device=device).item()
