"""Ragged attention over the size of molecules: as many atoms in all, in more or fewer molecules."""

from __future__ import annotations

import pytest

import edt_kernels
from bench.attention import (
    exact,
    flops,
    nested_attention,
    operands,
    padded_attention,
    single_molecules,
)
from bench.contest import OURS, Task
from bench.workloads import drug_like

SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
ATOMS = 6144


@pytest.mark.parametrize("size", SIZES)
def test_size(contest, size, dtype):
    workload = drug_like(f"{size} atoms", ATOMS // size, size)
    q_offsets, k_offsets = workload.query_offsets, workload.atom_offsets
    inputs = operands(q_offsets, k_offsets, dtype)
    task = Task.of(lambda *x: exact(q_offsets, k_offsets)(*x)[0], inputs, backward=False)
    outcome = contest(
        "ragged_attention over size",
        workload.name,
        task,
        [
            task.contender(
                OURS, lambda q, k, v: edt_kernels.ragged_attention(q, k, v, q_offsets, k_offsets)
            ),
            padded_attention(task, "padded", q_offsets, k_offsets),
            nested_attention(task, q_offsets, k_offsets),
            single_molecules(task, q_offsets, k_offsets),
        ],
        work=task.work(flops=flops(q_offsets, k_offsets, backward=False)),
        budget=1.0,
    )
    outcome.extra["atoms per molecule"] = size
