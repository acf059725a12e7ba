"""Triton kernels of the ops for GPUs; imported by the first call that needs one.

Every module holds the kernels of one op, launchers with the signatures of the raw ops, and
`configurations(device, dtype)`: calls that together launch every kernel as it ships, the sizes of
most use last.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from edt_kernels.triton.launch import Configuration

MODULES = (
    "entropy",
    "entropy_patches",
    "find_patches",
    "insert",
    "instance_lora",
    "linear_entropy",
    "ragged_attention",
    "ragged_cat",
    "segment_pool",
    "segment_softmax",
    "sort_ids",
    "splice",
)


def configurations(device: torch.device | str, dtype: torch.dtype) -> Iterator[Configuration]:
    """The configurations of every module for numbers of one dtype; imports Triton.

    On "meta" they can be recorded (`launch.record`), on a GPU they run on next to nothing.
    """
    for name in MODULES:
        module = importlib.import_module(f"edt_kernels.triton.{name}")
        yield from module.configurations(torch.device(device), dtype)
