"""Uncertainty of an atom from its surroundings, whatever the order of the atoms."""

from __future__ import annotations

import torch
from torch import Tensor

ELEMENTS = 119


def node_entropies(elements: Tensor, bond_index: Tensor, *, radius: int = 2) -> Tensor:
    """Entropy [N] in nats of the elements within `radius` bonds of every atom, itself included.

    H_i = - sum_z p_i(z) ln p_i(z), p_i the shares of the elements z. It needs no predictor and
    does not depend on how the atoms are numbered.

    Args:
        elements: int64 [N], atomic numbers, 0 for a wildcard.
        bond_index: int64 [2, E], bonds in both directions.
        radius: in bonds.

    Example:
        >>> water_like = torch.tensor([6, 8, 6]), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> node_entropies(*water_like, radius=1).exp()
        tensor([2.0000, 1.8899, 2.0000])
    """
    n = len(elements)
    atom = torch.arange(n, device=elements.device)
    near = torch.stack([atom, atom])
    source, target = bond_index
    for _ in range(radius):
        # Pairs (i, j) whose j has a bond to k give (i, k).
        order = target.argsort(stable=True)
        degree = torch.bincount(target, minlength=n)
        first = degree.cumsum(0) - degree
        count = degree[near[1]]
        pair = torch.arange(near.shape[1], device=elements.device).repeat_interleave(count)
        place = torch.arange(len(pair), device=elements.device) - (count.cumsum(0) - count)[pair]
        further = source[order[first[near[1][pair]] + place]]
        near = torch.cat([near, torch.stack([near[0][pair], further])], 1).unique(dim=1)
    kinds, amount = (near[0] * ELEMENTS + elements[near[1]]).unique(return_counts=True)
    owner = kinds // ELEMENTS
    share = amount / torch.bincount(near[0], minlength=n)[owner]
    return torch.zeros(n, device=elements.device).index_add(0, owner, -share * share.log())
