"""Which molecule a row of a packed batch belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def molecule_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """The molecule [rows] of every row, by `offsets` [B + 1]; a tail row counts to the last one.

    The number of rows is given, so that nothing is read from the device.

    Example:
        >>> import torch
        >>> molecule_of_rows(torch.tensor([0, 2, 2, 3]), 4).tolist()
        [0, 0, 2, 2]
    """
    index = torch.arange(rows, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:], index, right=True).clamp_(max=offsets.shape[0] - 2)
