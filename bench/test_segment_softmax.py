"""Softmax over the atoms of a molecule against scatter recipes, padding and nested tensors."""

from __future__ import annotations

import torch
from torch import Tensor

import edt_kernels
from bench.contest import OURS, Task, compiled
from bench.layouts import nested, padded
from bench.peers import torch_scatter
from bench.workloads import HEADS, rows


def by_scatter(ids: Tensor, segments: int):
    """The recipe of graph libraries: maximum, exponential, sum, gather."""

    def run(x: Tensor) -> Tensor:
        index = ids.unsqueeze(1).expand_as(x)
        top = x.detach().new_zeros(segments, x.shape[1])
        top = top.scatter_reduce(0, index, x.detach(), "amax", include_self=False)
        weight = (x - top.index_select(0, ids)).exp()
        total = x.new_zeros(segments, x.shape[1]).index_add(0, ids, weight)
        return weight / total.index_select(0, ids)

    return run


def test_segment_softmax(contest, workload, dtype, backward):
    offsets, count = workload.atom_offsets, len(workload.atoms)
    ids = torch.arange(count).repeat_interleave(workload.atoms)
    scatter_softmax = torch_scatter("scatter_softmax", dim_size=count)
    x = rows(len(ids), HEADS, dtype=dtype)
    task = Task.of(by_scatter(ids, count), [x], backward=backward)
    dense = padded(offsets, fill=-torch.inf)
    contenders = [
        task.contender(OURS, lambda x: edt_kernels.segment_softmax(x, offsets)),
        task.contender("scatter recipe", by_scatter(ids, count)),
        task.contender("padded", lambda x: x.softmax(1), inputs=[dense], outputs=[padded(offsets)]),
        task.contender(
            "nested",
            lambda x: torch.softmax(x, dim=1),
            inputs=[nested(offsets)],
            outputs=[nested(offsets)],
            optional=True,
        ),
        task.contender(
            "torch-scatter",
            lambda x: scatter_softmax(x, ids, 0),
            optional=True,
        ),
    ]
    if workload.name == "C-S":
        fast = compiled(by_scatter(ids, count))
        contenders.append(task.contender("compiled", fast, optional=True))
    contest("segment_softmax", workload.name, task, contenders)
