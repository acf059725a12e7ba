"""Memory that training keeps: buffers that are not given back, activations that are not held."""

from __future__ import annotations

import ctypes
from functools import cache, partial

from torch import nn
from torch.utils.checkpoint import checkpoint

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


@cache
def keep_memory() -> None:
    """Let glibc reuse large buffers: given back to the system, every step pays their page faults,
    a third to two thirds of its time at the sizes of a small model."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 1 << 28)


def checkpoint_layers(model: nn.Module) -> int:
    """Every layer that can be is computed again in the backward pass instead of being kept.

    Those are transformers' layers, and those of the query transformer. Never reentrant: a frozen
    layer's input may need no gradient while its output does.

    Returns:
        How many layers.

    >>> from edt_former.connectors import QueryTransformer
    >>> sizes = {"width": 8, "layers": 2, "heads": 2, "ffn": 16, "key_width": 4}
    >>> checkpoint_layers(QueryTransformer(**sizes))
    2
    """
    layers = [m for m in model.modules() if hasattr(type(m), "gradient_checkpointing")]
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return len(layers)
