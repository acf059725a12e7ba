"""Pooling of patches against torch's reductions and the published loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import edt_kernels
from bench import published
from bench.contest import OURS, Contender, Layout, Task, compiled
from bench.layouts import padded
from bench.peers import by_scatter_reduce, by_segment_reduce, mean_by_index_add, torch_scatter
from bench.workloads import ENCODER_WIDTH, MANY_PATCHES, SMALL, WORKLOADS, Workload, rows


@pytest.mark.parametrize(
    "workload", [*WORKLOADS, MANY_PATCHES], ids=lambda workload: workload.name.replace(" ", "-")
)
def test_mean(contest, caveats, workload, dtype, backward):
    offsets, ids = workload.patches.atom_offsets, workload.patch_ids
    counts = offsets.diff()
    segment_csr = torch_scatter("segment_csr", reduce="mean")
    x = rows(len(ids), ENCODER_WIDTH, dtype=dtype)
    by_index_add = mean_by_index_add(ids, counts)
    task = Task.of(by_index_add, [x], backward=backward)
    contenders = [
        task.contender(OURS, lambda x: edt_kernels.segment_pool(x, offsets, reduce="mean")),
        task.contender("index_add", by_index_add),
        task.contender("scatter_reduce", by_scatter_reduce(ids, len(counts), "mean")),
        task.contender("segment_reduce", by_segment_reduce(offsets, "mean")),
        task.contender(
            "torch-scatter",
            lambda x: segment_csr(x, offsets),
            optional=True,
        ),
    ]
    goals = {}
    if workload is MANY_PATCHES and not backward:
        goals = {"index_add": 2.0, "torch-scatter": 10.0}
    if workload is SMALL:
        contenders.append(
            task.contender("compiled", compiled(mean_by_index_add(ids, counts)), optional=True)
        )
        contenders.append(loop(task, workload, caveats[published.pool_by_patch]))
        if backward:
            goals = {"published loop": 100.0}
    contest(
        "segment_pool",
        f"{workload.name} mean",
        task,
        contenders,
        work=task.work(reread=False),
        goals=goals,
    )


def test_max(contest, dtype, backward):
    """Entries of a molecule's column differ, and from 0: torch divides gradients among equals."""
    offsets, ids = SMALL.patches.atom_offsets, SMALL.patch_ids
    dense = padded(SMALL.atom_offsets, fill=torch.inf)
    x = dense.into(rows(len(ids), ENCODER_WIDTH))
    x = (1 + dense.back(x.argsort(1).argsort(1))).to(dtype)
    segment_csr = torch_scatter("segment_csr", reduce="max")
    by_amax = by_scatter_reduce(ids, len(offsets) - 1, "amax")
    task = Task.of(by_amax, [x], backward=backward)
    contest(
        "segment_pool",
        f"{SMALL.name} max",
        task,
        [
            task.contender(OURS, lambda x: edt_kernels.segment_pool(x, offsets, reduce="max")),
            task.contender("scatter_reduce", by_amax),
            task.contender("segment_reduce", by_segment_reduce(offsets, "max")),
            task.contender(
                "torch-scatter",
                lambda x: segment_csr(x, offsets),
                optional=True,
            ),
        ],
        work=task.work(reread=False),
    )


def test_by_id(contest, workload, dtype, backward):
    """Rows that name their patch and stand in any order within the batch."""
    order = torch.randperm(len(workload.patch_ids), generator=torch.Generator().manual_seed(3))
    ids, counts = workload.patch_ids[order], workload.patches.atom_offsets.diff()
    scatter = torch_scatter("scatter", dim_size=len(counts), reduce="mean")
    x = rows(len(ids), ENCODER_WIDTH, dtype=dtype)
    by_index_add = mean_by_index_add(ids, counts)
    task = Task.of(by_index_add, [x], backward=backward)
    contest(
        "pool_by_id",
        f"{workload.name} mean",
        task,
        [
            task.contender(OURS, lambda x: edt_kernels.pool_by_id(x, ids, len(counts))),
            task.contender("index_add", by_index_add),
            task.contender("scatter_reduce", by_scatter_reduce(ids, len(counts), "mean")),
            task.contender(
                "torch-scatter",
                lambda x: scatter(x, ids, 0),
                optional=True,
            ),
        ],
        work=task.work(reread=False),
    )


def loop(task: Task, workload: Workload, caveat: str) -> Contender:
    """The published loop, handed its padded nodes: a token, the atoms, a token."""
    dense = padded(workload.atom_offsets)

    def into(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(dense.into(x), (0, 0, 1, 1))

    nodes = Layout(into, lambda x: dense.back(x[:, 1:-1]))
    mask = torch.arange(int(workload.atoms.max()) + 2) < workload.atoms.unsqueeze(1) + 2
    patches = workload.patches.ids.split(workload.atoms.tolist())
    groups = [ids.tolist() for ids in patches]
    return task.contender(
        "published loop",
        lambda x: published.pool_by_patch(x, mask, groups)[0],
        inputs=[nodes],
        outputs=[padded(workload.patches.patch_offsets)],
        caveat=caveat,
    )
