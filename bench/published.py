"""The loops of the published program, written anew, and whether they are as fast as it was.

EDT-Former (arXiv:2602.02742) cuts and pools molecule by molecule in Python. These functions do the
same steps in the same order; a ratio to them means something only where their time lies within a
factor of 1.3 of the published program's recorded time, scaled to this machine by the rate of its
matrix product. The record is found by the environment variable EDT_SHARED.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bench.contest import interleave
from bench.machine import PRODUCT_SIDE
from bench.workloads import ENCODER_WIDTH
from edt_former.chem import brics_fragments, read_molecule

FACTOR = 1.3


def group_ids(entropies: Sequence[Tensor], q: float = 0.75) -> list[list[int]]:
    """The patch of every atom; a new one opens after an atom that rises above the q-quantile."""
    groups = []
    for entropy in entropies:
        threshold = torch.quantile(entropy, q)
        ids, current, before = [], 0, False
        for i in range(len(entropy)):
            ids.append(current)
            now = bool(entropy[i] > threshold)
            if now and not before:
                current += 1
            before = now
        groups.append(ids)
    return groups


def pool_by_patch(
    nodes: Tensor, mask: Tensor, *sources: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Means of the nodes of every patch, source after source, padded [B, G, D], and their mask.

    Args:
        nodes: [B, L, D], per molecule a graph token, its atoms, an end token, padding.
        mask: [B, L], True where a node is.
        sources: the patch of every atom, molecule by molecule.
    """
    pooled = []
    for b in range(nodes.shape[0]):
        atoms = int(mask[b].sum().item()) - 2
        x = nodes[b, 1 : 1 + atoms]
        parts = []
        for source in sources:
            ids = torch.tensor(source[b], dtype=torch.long)[:atoms]
            groups, place = torch.unique(ids, return_inverse=True)
            total = x.new_zeros(len(groups), x.shape[1]).index_add_(0, place, x)
            count = torch.bincount(place, minlength=len(groups)).clamp(min=1)
            parts.append(total / count.unsqueeze(1).to(x.dtype))
        pooled.append(torch.cat(parts))
    most = max(len(x) for x in pooled)
    out = nodes.new_zeros(len(pooled), most, nodes.shape[2])
    real = torch.zeros(len(pooled), most, dtype=torch.bool)
    for b, x in enumerate(pooled):
        out[b, : len(x)] = x
        real[b, : len(x)] = True
    return out, real


def caveat(function: Callable) -> str:
    """Why `group_ids` or `pool_by_patch` is no baseline here, "" where it is one."""
    record = _record()
    if record is None:
        return "not comparable: EDT_SHARED does not lead to the published program's times"
    molecules = [read_molecule(drug["smiles"]) for drug in record["drugs"]]
    stages = {name.strip(): stage["median_s"] for name, stage in record["stages"].items()}
    generator = torch.Generator().manual_seed(0)
    entropies = [torch.rand(m.num_atoms, generator=generator) for m in molecules]
    if function is group_ids:
        # The record has the whole grouping and the part of it that is no loop.
        whole = next(s for name, s in stages.items() if name.startswith("group_ids_by_entropy ("))
        recorded = whole - stages["of which GPT-2 forward + entropy"]
        arguments = (entropies,)
    else:
        recorded = stages["pool_by_patch (unimol nodes only)"]
        lengths = torch.tensor([m.num_atoms + 2 for m in molecules])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
        nodes = torch.randn(*mask.shape, ENCODER_WIDTH, generator=generator)
        fragments = [brics_fragments(m).tolist() for m in molecules]
        arguments = (nodes, mask, fragments, group_ids(entropies))
    square = torch.randn(2, PRODUCT_SIDE, PRODUCT_SIDE, generator=generator)
    steps = {"loop": lambda: function(*arguments), "product": lambda: square[0] @ square[1]}
    measured, product = map(statistics.median, interleave(steps, budget=1.0).values())
    rate = 2 * PRODUCT_SIDE**3 / product
    return judge(measured, recorded * record["machine"]["sgemm_gflops_2048"] * 1e9 / rate)


def judge(measured: float, expected: float) -> str:
    """ "" where two times lie within `FACTOR` of each other."""
    if expected / FACTOR <= measured <= expected * FACTOR:
        return ""
    return (
        f"not comparable: {1e3 * measured:.2f} ms where the published program is expected to take "
        f"{1e3 * expected:.2f} ms on this machine"
    )


@cache
def _record() -> dict | None:
    folder = os.environ.get("EDT_SHARED")
    file = Path(folder, "oracles", "timing.json") if folder else None
    return json.loads(file.read_text()) if file and file.exists() else None
