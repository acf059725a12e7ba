"""Anchors and dynamic queries molecule by molecule against torch.cat and index_copy."""

from __future__ import annotations

import torch
from torch import Tensor

import edt_kernels
from bench.contest import OURS, Task
from bench.workloads import ANCHORS, HEAD_WIDTH, HEADS, rows

WIDTH = HEADS * HEAD_WIDTH


def test_ragged_cat(contest, workload, dtype, backward):
    offsets = workload.patches.patch_offsets
    inputs = [
        rows(ANCHORS, WIDTH, dtype=dtype),
        rows(int(offsets[-1]), WIDTH, dtype=dtype, seed=2),
    ]
    counts = offsets.diff().tolist()

    def by_cat(anchors: Tensor, dynamic: Tensor) -> Tensor:
        parts = [part for own in dynamic.split(counts) for part in (anchors, own)]
        return torch.cat(parts)

    task = Task.of(by_cat, inputs, backward=backward)
    # The peers get every row's place for nothing.
    source = by_cat(torch.arange(ANCHORS), ANCHORS + torch.arange(int(offsets[-1])))
    from_anchors = (source < ANCHORS).nonzero().squeeze(1)
    from_dynamic = (source >= ANCHORS).nonzero().squeeze(1)

    def by_index_copy(anchors: Tensor, dynamic: Tensor) -> Tensor:
        out = anchors.new_zeros(len(source), WIDTH)
        out = out.index_copy_(0, from_anchors, anchors.repeat(len(counts), 1))
        return out.index_copy_(0, from_dynamic, dynamic)

    def by_gather(anchors: Tensor, dynamic: Tensor) -> Tensor:
        return torch.cat([anchors, dynamic]).index_select(0, source)

    contest(
        "ragged_cat",
        workload.name,
        task,
        [
            task.contender(OURS, lambda a, d: edt_kernels.ragged_cat([a, d], [None, offsets])[0]),
            task.contender("cat of parts", by_cat),
            task.contender("index_copy", by_index_copy),
            task.contender("cat, index_select", by_gather),
        ],
        work=task.work(reread=False),
    )
