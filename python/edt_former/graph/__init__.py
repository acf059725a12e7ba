"""Graphs: packed batches and the encoders that read them."""

from edt_former.graph.batch import GraphBatch, MotifFeatures
from edt_former.graph.blending import Blended
from edt_former.graph.encoder import GraphEncoder, GraphFeatures, make_encoder, register_encoder
from edt_former.graph.gin import GIN
from edt_former.graph.plain import Graph, read_graph
from edt_former.graph.pretrain_gnn import PretrainGNN
from edt_former.graph.unimol import UniMol

__all__ = [
    "GIN",
    "Blended",
    "Graph",
    "GraphBatch",
    "GraphEncoder",
    "GraphFeatures",
    "MotifFeatures",
    "PretrainGNN",
    "UniMol",
    "make_encoder",
    "read_graph",
    "register_encoder",
]
