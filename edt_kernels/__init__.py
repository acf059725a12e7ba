"""Ragged kernels that let a frozen language model read molecules.

A batch is packed: `values [N, ...]` with `offsets [B + 1]`, no padding inside. Ops are
differentiable where their docstring says so, run under `torch.compile(fullgraph=True)`, and give a
molecule the same bits alone or in any batch.
"""

from importlib.metadata import version

from edt_kernels import _native
from edt_kernels import nn as nn
from edt_kernels._native import build_info
from edt_kernels._warmup import warmup
from edt_kernels.borders import (
    from_nested,
    offsets_from_batch,
    offsets_from_lengths,
    pad,
    ragged_split,
    to_nested,
    unpad,
)
from edt_kernels.ops.entropy import entropy
from edt_kernels.ops.entropy_patches import entropy_patches
from edt_kernels.ops.find_patches import Patches, find_patches
from edt_kernels.ops.insert import Inserted, insert
from edt_kernels.ops.instance_lora import instance_lora, instance_lora_many
from edt_kernels.ops.linear_entropy import linear_entropy
from edt_kernels.ops.ragged_attention import ragged_attention
from edt_kernels.ops.ragged_cat import ragged_cat
from edt_kernels.ops.segment_pool import pool_by_id, segment_pool
from edt_kernels.ops.segment_softmax import segment_softmax
from edt_kernels.ops.splice import splice

_native.load()  # after the schemas: native code only adds implementations

__version__ = version("edt-kernels")
__all__ = [
    "Inserted",
    "Patches",
    "build_info",
    "entropy",
    "entropy_patches",
    "find_patches",
    "from_nested",
    "insert",
    "instance_lora",
    "instance_lora_many",
    "linear_entropy",
    "offsets_from_batch",
    "offsets_from_lengths",
    "pad",
    "pool_by_id",
    "ragged_attention",
    "ragged_cat",
    "ragged_split",
    "segment_pool",
    "segment_softmax",
    "splice",
    "to_nested",
    "unpad",
    "warmup",
]
