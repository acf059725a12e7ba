"""The connector of published size, ragged and on padded rectangles, over one batch of molecules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.workloads import (
    ANCHORS,
    ENCODER_WIDTH,
    FEED_FORWARD,
    HEAD_WIDTH,
    HEADS,
    LAYERS,
    Workload,
    rows,
)
from edt_former.connectors import EDTFormer, QFormer
from edt_former.connectors.padded import padded_read
from edt_former.graph.encoder import GraphFeatures
from edt_kernels import Patches

WIDTH = HEADS * HEAD_WIDTH
SIZE = {
    "width": WIDTH,
    "layers": LAYERS,
    "heads": HEADS,
    "ffn": FEED_FORWARD,
    "cross_attention_freq": 1,
    "encoder_width": ENCODER_WIDTH,
    "llm_width": WIDTH,
    "num_queries": ANCHORS,
    "dropout": 0.0,
}


@dataclass(frozen=True)
class Batch:
    """Atom features of a workload's molecules, and their patches."""

    features: GraphFeatures
    patches: dict[str, Patches]

    @classmethod
    def of(cls, workload: Workload, dtype: torch.dtype) -> Batch:
        """Random features, the same in every dtype up to its rounding."""
        device = workload.atoms.device
        atoms = rows(int(workload.atom_offsets[-1]), ENCODER_WIDTH, dtype=dtype, device=device)
        features = GraphFeatures(atoms, workload.atom_offsets)
        return cls(features, {"entropy": workload.patches})

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        values, offsets = self.features.values.to(device), self.features.offsets.to(device)
        patches = {
            source: Patches(*(x if x is None else x.to(device) for x in found))
            for source, found in self.patches.items()
        }
        return Batch(GraphFeatures(values, offsets), patches)


def build(dtype: torch.dtype, **changed: object) -> tuple[EDTFormer, QFormer]:
    """EDT-Former's connector, and the static Q-Former that shares its weights; no dropout.

    They are of `SIZE`, less what is `changed`.
    """
    torch.manual_seed(0)
    size = {**SIZE, **changed}
    dynamic, static = EDTFormer(size).to(dtype), QFormer(size).to(dtype)
    shared = dynamic.state_dict(keep_vars=True)
    static.load_state_dict({name: shared[name] for name in static.state_dict()}, assign=True)
    return dynamic, static


def ragged(connector: QFormer, batch: Batch) -> Tensor:
    """Tokens [Tq, width] of the language model."""
    return connector(batch.features, batch.patches).values


def padded(connector: QFormer, batch: Batch, slots: int | None) -> Tensor:
    """Tokens [B, slots, width]; slots None pads to the longest molecule."""
    queries = connector.queries(batch.features, batch.patches)
    hidden = padded_read(connector, queries, connector.keys(batch.features), slots=slots)
    return connector.llm_proj(hidden)


def flops(workload: Workload) -> float:
    """Of a forward over the tokens that exist; a backward has twice as many."""
    queries, keys = float(workload.queries.sum()), float(workload.atoms.sum() + len(workload.atoms))
    square = WIDTH * WIDTH
    own = 4 * queries * square + 2 * float(workload.queries.square().sum()) * WIDTH
    read = 2 * queries * square + 2 * keys * ENCODER_WIDTH * WIDTH
    read += 2 * float((workload.queries * (workload.atoms + 1)).sum()) * WIDTH
    layer = own + read + 2 * queries * WIDTH * FEED_FORWARD
    dynamic = float(workload.queries.sum()) - ANCHORS * len(workload.atoms)
    return 2 * (LAYERS * layer + queries * square + dynamic * ENCODER_WIDTH * WIDTH)
