"""Every op in plain torch: the definition of correct, and the path where no kernel is loaded."""

from edt_kernels.reference.entropy import entropy, entropy_bwd
from edt_kernels.reference.entropy_patches import entropy_patches
from edt_kernels.reference.find_patches import find_patches
from edt_kernels.reference.insert import insert, insert_bwd
from edt_kernels.reference.instance_lora import (
    instance_lora,
    instance_lora_bwd,
    instance_lora_many,
)
from edt_kernels.reference.linear_entropy import linear_entropy, linear_entropy_bwd
from edt_kernels.reference.ragged_cat import ragged_cat, ragged_cat_bwd
from edt_kernels.reference.segment_pool import (
    segment_extreme,
    segment_extreme_bwd,
    segment_pool,
    segment_pool_bwd,
    segment_pool_weight_bwd,
    sort_ids,
)
from edt_kernels.reference.segment_softmax import segment_softmax, segment_softmax_bwd
from edt_kernels.reference.splice import splice, splice_bwd

__all__ = [
    "entropy",
    "entropy_bwd",
    "entropy_patches",
    "find_patches",
    "insert",
    "insert_bwd",
    "instance_lora",
    "instance_lora_bwd",
    "instance_lora_many",
    "linear_entropy",
    "linear_entropy_bwd",
    "ragged_cat",
    "ragged_cat_bwd",
    "segment_extreme",
    "segment_extreme_bwd",
    "segment_pool",
    "segment_pool_bwd",
    "segment_pool_weight_bwd",
    "segment_softmax",
    "segment_softmax_bwd",
    "sort_ids",
    "splice",
    "splice_bwd",
]
