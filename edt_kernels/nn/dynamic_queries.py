"""Queries of a molecule: learned anchors, and one for every patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edt_kernels.nn._autocast import autocast
from edt_kernels.ops.find_patches import Patches
from edt_kernels.ops.ragged_cat import ragged_cat
from edt_kernels.ops.segment_pool import segment_pool


class DynamicQueries(nn.Module):
    """Packed queries [anchors; one per patch] of every molecule, as in EDT-Former.

    The query of a patch is Linear(pooled atoms of the patch), arXiv:2602.02742; a molecule has
    `num_anchors` queries and as many more as it has patches.

    Args:
        num_anchors: A, learned queries that every molecule gets.
        width: of the queries.
        in_width: of the atoms.
        reduce: "mean", "sum", "max" or "min" of a patch's atoms.

    Example:
        >>> import torch, edt_kernels
        >>> from edt_kernels.nn import DynamicQueries
        >>> offsets = torch.tensor([0, 4, 7])
        >>> surprise = torch.tensor([0.0, 2.0, 1.0, 3.0, 0.0, 0.0, 1.0])
        >>> patches = edt_kernels.find_patches(surprise, offsets)
        >>> patches.patch_offsets
        tensor([0, 3, 5])
        >>> queries, q_offsets = DynamicQueries(2, 16, in_width=6)(torch.randn(7, 6), patches)
        >>> queries[: q_offsets[-1]].shape, q_offsets
        (torch.Size([9, 16]), tensor([0, 5, 9]))
    """

    def __init__(
        self,
        num_anchors: int,
        width: int,
        in_width: int,
        *,
        reduce: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.reduce = reduce
        self.anchors = nn.Parameter(torch.empty(num_anchors, width, device=device, dtype=dtype))
        self.project = nn.Linear(in_width, width, device=device, dtype=dtype)
        for weight in (self.anchors, self.project.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, values: Tensor, patches: Patches) -> tuple[Tensor, Tensor]:
        """The queries of every molecule.

        Args:
            values: [N, in_width], atoms.
            patches: of these atoms, at capacity or trimmed.

        Returns:
            `(queries [T, width], offsets [B + 1])`, T = B A plus the number (or capacity) of
            patches; rows beyond the last offset are 0.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: shapes, devices or contents do not fit.
        """
        pooled = segment_pool(values, patches.atom_offsets, order=patches.order, reduce=self.reduce)
        parts = autocast(self.anchors, self.project(pooled))
        return ragged_cat(parts, [None, patches.patch_offsets])
