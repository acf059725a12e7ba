"""Graphs: packed batches and the encoders that read them."""

from edt_former.graph.batch import GraphBatch

__all__ = ["GraphBatch"]
