"""From logits to patches in one pass against the steps one by one."""

from __future__ import annotations

import torch
from torch import Tensor

import edt_kernels
from bench import published
from bench.contest import OURS, Task, compiled
from bench.layouts import padded
from bench.peers import from_clamped_softmax, from_log_softmax, quantile_rule
from bench.workloads import rows

VOCABULARY = 38


def test_entropy_patches(contest, caveats, workload, dtype, backward):
    """The published rule on logits [N, 38]: entropies, and the patch of every atom.

    bf16 contenders cut by entropies of the float32 logits, as rounded ones tie.
    """
    offsets = workload.atom_offsets
    layout = padded(offsets, fill=torch.nan)
    logits = rows(int(offsets[-1]), VOCABULARY, dtype=dtype)

    def steps(entropy, cut):
        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            h = entropy(x.float() if x.dtype == torch.bfloat16 else x)
            return h.to(x.dtype), cut(h.detach())

        return run

    def by_padding(h: Tensor) -> Tensor:
        return layout.back(quantile_rule(layout.into(h)))

    def by_kernel(h: Tensor) -> Tensor:
        return edt_kernels.find_patches(h, offsets, rule="published").ids

    def by_loop(h: Tensor) -> Tensor:
        groups = published.group_ids(edt_kernels.ragged_split(h, offsets))
        return torch.tensor([i for ids in groups for i in ids])

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        h, patches = edt_kernels.entropy_patches(x, offsets, rule="published")
        return h, patches.ids

    task = Task.of(steps(from_log_softmax, by_padding), [logits], backward=backward)
    contenders = [
        task.contender(OURS, ours),
        task.contender("entropy, find_patches", steps(edt_kernels.entropy, by_kernel)),
        task.contender("log_softmax, padded cut", steps(from_log_softmax, by_padding)),
        task.contender(
            "published loop",
            steps(from_clamped_softmax, by_loop),
            caveat=caveats[published.group_ids],
        ),
    ]
    if workload.name == "C-S":
        fast = steps(compiled(from_log_softmax), by_padding)
        contenders.append(task.contender("compiled, padded cut", fast, optional=True))
    contest("entropy_patches", workload.name, task, contenders)
