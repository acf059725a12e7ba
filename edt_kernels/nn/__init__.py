"""Modules that own parameters and call one op each: drop-ins for packed batches."""

from edt_kernels.nn.cross_attention import CrossAttention
from edt_kernels.nn.dynamic_queries import DynamicQueries
from edt_kernels.nn.instance_lora import InstanceLoRA
from edt_kernels.nn.segment_pool import SegmentPool
from edt_kernels.nn.splice import Splice

__all__ = ["CrossAttention", "DynamicQueries", "InstanceLoRA", "SegmentPool", "Splice"]
