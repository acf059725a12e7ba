"""Ragged attention at screening size, against what torch has for it on a GPU."""

from __future__ import annotations

from functools import partial

import torch

import edt_kernels
from bench.attention import (
    exact,
    flops,
    nested_attention,
    operands,
    padded_attention,
    static_attention,
)
from bench.contest import OURS, Task, Work
from bench.gpu.contests import BACKWARD, FORWARD, goal_of_ratio, goal_of_time, play
from bench.gpu.peers import EFFICIENT, VARLEN, compiled_attention, efficient, varlen
from bench.gpu.run import Run, Section
from bench.workloads import SCREEN_LARGE, SCREEN_SMALL, SLOTS, Workload, drug_like

GOALS = {
    ("W-S", FORWARD): (275, {VARLEN: 2.5, EFFICIENT: 1.3}),
    ("W-S", BACKWARD): (470, {VARLEN: 5.0}),
    ("W-L", FORWARD): (860, {}),
    ("W-L", BACKWARD): (1580, {}),
}
"""Of bfloat16: microseconds at most, and times as fast as a peer at least."""


def run(run: Run, section: Section) -> None:
    """W-S and W-L in bfloat16 and float32, and molecules of many sizes."""
    ragged = drug_like("W-S ragged", SCREEN_SMALL.atoms.shape[0])
    work = {
        f"{workload.name}, {dtype}": partial(_contest, run, section, workload, dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for workload in (SCREEN_SMALL, SCREEN_LARGE)
    }
    work["W-S ragged"] = partial(_contest, run, section, ragged, torch.bfloat16)
    section.all(work)


def _contest(run: Run, section: Section, workload: Workload, dtype: torch.dtype) -> None:
    workload = (workload.first(2) if run.tiny else workload).to(run.device)
    q_offsets, k_offsets = workload.query_offsets, workload.atom_offsets
    inputs = operands(q_offsets, k_offsets, dtype)
    task = Task.of(lambda *x: exact(q_offsets, k_offsets)(*x)[0], inputs, backward=True)
    contenders = [
        task.contender(
            OURS, lambda q, k, v: edt_kernels.ragged_attention(q, k, v, q_offsets, k_offsets)
        ),
        varlen(task, workload),
        efficient(task, workload),
        padded_attention(task, "padded SDPA", q_offsets, k_offsets),
        padded_attention(task, "padded 96 SDPA", q_offsets, k_offsets, slots=SLOTS),
        nested_attention(task, q_offsets, k_offsets),
        static_attention(workload, dtype, backward=True),
    ]
    if (workload.name, dtype) == ("W-S", torch.bfloat16):  # it takes long to compile
        contenders.append(compiled_attention(task, q_offsets, k_offsets, backend=run.backend))
    forward = Work(
        sum(x.nbytes for x in inputs) + inputs[0].nbytes,
        flops(q_offsets, k_offsets, backward=False),
    )
    both = task.work(flops=flops(q_offsets, k_offsets, backward=True))
    backward = Work(both.bytes - forward.bytes, both.flops - forward.flops)
    modes = {FORWARD: forward, BACKWARD: backward}
    found = play(
        run, section, "ragged_attention", workload.name, contenders, dtype=dtype, modes=modes
    )
    if dtype == torch.bfloat16:
        for mode, outcome in found.items():
            microseconds, peers = GOALS.get((workload.name, mode), (None, {}))
            if microseconds is not None:
                goal_of_time(section, outcome, microseconds)
            for peer, least in peers.items():
                goal_of_ratio(section, outcome, peer, least)
