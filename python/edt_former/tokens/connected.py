"""Patches as connected pieces of the molecule."""

from __future__ import annotations

import torch
from torch import Tensor


def split_components(patches: Tensor, bond_index: Tensor) -> Tensor:
    """Cuts every patch into the connected components of its own bonds.

    Args:
        patches: int64 [N], the patch of every atom of a batch; no two molecules share one.
        bond_index: int64 [2, E], bonds in both directions, indices into N.

    Returns:
        int64 [N], the first atom of every atom's component: ascending where pieces follow their
        first atoms.

    Example:
        >>> ends_and_middle = torch.tensor([0, 1, 0])
        >>> split_components(ends_and_middle, torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])).tolist()
        [0, 1, 2]
    """
    source, target = bond_index[:, patches[bond_index[0]] == patches[bond_index[1]]]
    first = torch.arange(len(patches), device=patches.device)
    while True:
        nearer = first.scatter_reduce(0, target, first[source], "amin")
        nearer = nearer[nearer]
        if torch.equal(nearer, first):
            return first
        first = nearer


def connected_patches(patches: Tensor, bond_index: Tensor) -> Tensor:
    """Whether [P] each patch is one connected piece; arguments as of `split_components`.

    Patches follow ascending ids; every id stands for one patch.

    Example:
        >>> bonds = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> connected_patches(torch.tensor([0, 1, 0]), bonds).tolist()
        [False, True]
    """
    pieces = split_components(patches, bond_index)
    names, rank = patches.unique(return_inverse=True)
    heads = pieces == torch.arange(len(patches), device=patches.device)
    return torch.bincount(rank[heads], minlength=len(names)) == 1
