"""What a module hands to an op under autocast, which torch's own layers cast by themselves."""

from __future__ import annotations

import torch
from torch import Tensor

_CAST = (torch.float32, torch.bfloat16, torch.float16)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype that autocast multiplies in, or as they are where it is off."""
    device = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x is not None and x.dtype in _CAST else x for x in tensors)
