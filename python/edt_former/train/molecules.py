"""Rows with one molecule each as packed graphs with their patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edt_former.chem import motif_features
from edt_former.connectors import Connector
from edt_former.data import PreparedData, Row
from edt_former.graph import GraphBatch, GraphEncoder
from edt_former.processor import PatchSets, find_patch_sets
from edt_former.tokens import NextAtomPredictor, pack_patches
from edt_former.train.parts import module_hash


class MoleculeBatch:
    """Rows become what a graph encoder and a connector read.

    Args:
        graph_encoder: what it reads is kept.
        connector: likewise.
        predictor: finds patches of entropies where the rows do not hold them.
        data: all rows that will come; None where they hold no patches.
    """

    def __init__(
        self,
        graph_encoder: GraphEncoder,
        connector: Connector,
        predictor: NextAtomPredictor | None,
        *data: PreparedData | None,
    ) -> None:
        self.features, self.spatial = graph_encoder.features, graph_encoder.needs_coordinates
        self.options, hashed = connector.patch_options, module_hash(predictor)
        self.reads_motifs = connector.reads_motifs
        sets = [one for one in data if one is not None]
        self.stored = bool(sets) and all(one.has_patches(self.options, hashed) for one in sets)
        self.predictor = None if self.stored else predictor

    def __call__(self, rows: Sequence[Row]) -> tuple[GraphBatch, PatchSets]:
        """The molecules of rows and their patches.

        Raises:
            ValueError: the graph encoder reads coordinates and a row has none.
        """
        prepared = [row.molecules[0] for row in rows]
        molecules, places = [item.molecule for item in prepared], None
        if self.spatial:
            places = [item.coordinates for item in prepared]
            if any(place is None for place in places):
                raise ValueError(
                    "the graph encoder reads coordinates, the data have none: prepare them with "
                    "--conformers"
                )
        motifs = motif_features(molecules) if self.reads_motifs else None
        graph = GraphBatch.pack(molecules, places, features=self.features, motifs=motifs)
        if not self.stored:
            return graph, find_patch_sets(molecules, graph, self.options, self.predictor)
        sets = {
            source: pack_patches(
                [torch.from_numpy(item.patches[source].astype("int64")) for item in prepared]
            )
            for source in self.options.sources
        }
        return graph, PatchSets(sets)
