"""A property head on the tokens of a connector: numbers or classes, without a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edt_kernels
from edt_former.connectors import Connector, make_connector
from edt_former.data import PreparedData, Row
from edt_former.graph import GraphBatch, GraphEncoder
from edt_former.language.frozen import (
    CONFIG,
    WEIGHTS,
    load_part,
    load_strictly,
    read_json,
    read_weights,
    write_json,
    write_weights,
)
from edt_former.language.manifest import FrozenPart, Manifest
from edt_former.processor import PatchSets, pack_with_patches, read_all
from edt_former.tokens import NextAtomPredictor
from edt_former.train.molecules import MoleculeBatch
from edt_former.train.parts import GRAPH_ENCODER, PREDICTOR, read_graph_encoder, read_predictor
from edt_former.train.ranks import global_share

CONNECTOR, HEAD = "connector", "head"
REGRESSION, CLASSIFICATION = "regression", "classification"


@dataclass(frozen=True)
class HeadOptions:
    """What a property head predicts, and how.

    Attributes:
        kind: "regression" or "classification".
        targets: what is predicted.
        token_width: of the connector's tokens.
        width: of the hidden layer.
        dropout: of the mean token, in training.
        mean: of every target, which a regression is shifted by.
        scale: its standard deviation; both 0 and 1 for classes.
    """

    kind: str
    targets: tuple[str, ...]
    token_width: int
    width: int
    dropout: float
    mean: tuple[float, ...]
    scale: tuple[float, ...]


class PropertyModel(nn.Module):
    """Graph encoder, connector, and an MLP on the mean of a molecule's tokens.

    Args:
        graph_encoder: frozen by the caller, or not.
        connector: any; its tokens are read as a language model would.
        options: of the head.
        parts: the frozen parts, for the manifest.
        predictor: of the next atom, where patches come from entropies.
    """

    def __init__(
        self,
        graph_encoder: GraphEncoder,
        connector: Connector,
        options: HeadOptions,
        parts: Mapping[str, FrozenPart],
        predictor: NextAtomPredictor | None = None,
    ) -> None:
        super().__init__()
        self.graph_encoder, self.connector = graph_encoder, connector
        self.options, self.parts = options, dict(parts)
        self.predictor = predictor
        self.head = nn.Sequential(
            nn.LayerNorm(options.token_width),
            nn.Dropout(options.dropout),
            nn.Linear(options.token_width, options.width),
            nn.GELU(),
            nn.Linear(options.width, len(options.targets)),
        )

    def scores(self, graph: GraphBatch, patches: PatchSets) -> Tensor:
        """[B, targets]: standardised values, or logits of "yes"."""
        device = next(self.head.parameters()).device
        features = self.connector.read_graph(self.graph_encoder, graph.to(device))
        tokens = self.connector(features, dict(patches.to(device)))
        return self.head(edt_kernels.segment_pool(tokens.values, tokens.offsets).float())

    def forward(self, graph: GraphBatch, patches: PatchSets, targets: Tensor) -> dict[str, Tensor]:
        """ "loss": the mean over known targets [B, targets] of squared error or cross-entropy."""
        known = ~targets.isnan()
        scores = self.scores(graph, patches)
        true = self._standard(targets).where(known, 0.0)
        if self.options.kind == REGRESSION:
            each = F.mse_loss(scores, true, reduction="none")
        else:
            each = F.binary_cross_entropy_with_logits(scores, true, reduction="none")
        count = int(known.sum())
        mean = (each * known).sum() / max(count, 1)
        return {"loss": mean * global_share(count)}

    @torch.no_grad()
    def predict(self, graph: GraphBatch, patches: PatchSets) -> Tensor:
        """[B, targets]: values in their own units, or probabilities of "yes"."""
        scores = self.scores(graph, patches)
        if self.options.kind == CLASSIFICATION:
            return scores.sigmoid()
        return scores * scores.new_tensor(self.options.scale) + scores.new_tensor(self.options.mean)

    def predict_molecules(self, molecules: Any) -> Tensor:
        """`predict` of molecules [B, targets], by the names of `options.targets`.

        Args:
            molecules: as of `MoleculeLM.embed_molecules`.

        Raises:
            ValueError: a molecule cannot be read, or the graph encoder reads coordinates.
        """
        if self.graph_encoder.needs_coordinates:
            raise ValueError(
                "predict_molecules makes no conformers: use predict with prepared data"
            )
        features = self.graph_encoder.features
        read = read_all(molecules, options=self.connector.patch_options, features=features)
        device = next(self.head.parameters()).device
        packed = pack_with_patches(
            read, self.connector, self.predictor, device=device, features=features
        )
        return self.predict(*packed)

    def _standard(self, targets: Tensor) -> Tensor:
        if self.options.kind == CLASSIFICATION:
            return targets
        mean, scale = (targets.new_tensor(x) for x in (self.options.mean, self.options.scale))
        return (targets - mean) / scale

    def save_pretrained(
        self, folder: Path | str, *, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Writes `connector/`, `head/`, and a manifest of the frozen parts."""
        folder = Path(folder)
        state = self.state_dict() if state_dict is None else state_dict
        configs = {CONNECTOR: self.connector.config, HEAD: asdict(self.options)}
        for name, config in configs.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_json(folder / name / CONFIG, config)
            inside = {n.partition(".")[2]: x for n, x in state.items() if n.startswith(f"{name}.")}
            write_weights(folder / name / WEIGHTS, inside, None)
        Manifest(folder.resolve(), self.parts).write()

    def read_trained(self, folder: Path) -> dict[str, Tensor]:
        """What `save_pretrained` wrote, by the names of this model's state."""
        return {f"{p}.{n}": x for p in (CONNECTOR, HEAD) for n, x in read_weights(folder / p)}

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> PropertyModel:
        """Reads what `save_pretrained` wrote, with its frozen parts; in eval mode.

        Raises:
            FileNotFoundError: a file or a part is missing.
            ValueError: weights do not fit.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        encoder = read_graph_encoder(manifest.folder(GRAPH_ENCODER)).freeze()
        connector = load_part(make_connector, folder / CONNECTOR)
        content = read_json(folder / HEAD / CONFIG)
        lists = ("targets", "mean", "scale")
        options = HeadOptions(**{n: tuple(v) if n in lists else v for n, v in content.items()})
        predictor = None
        if connector.patch_options.needs_predictor:
            predictor = read_predictor(manifest.folder(PREDICTOR))
        model = cls(encoder, connector, options, manifest.parts, predictor)
        load_strictly(model.head, dict(read_weights(folder / HEAD)), source=folder / HEAD)
        return model.eval().requires_grad_(False)


def standardisation(kind: str, data: PreparedData) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every target over the rows that know it.

    Raises:
        ValueError: classes that are not 0 and 1.
    """
    values = np.array([data[i].targets for i in range(len(data))])
    if kind == CLASSIFICATION:
        for name, column in zip(data.target_names(), values.T, strict=True):
            odd = column[~np.isnan(column) & (column != 0) & (column != 1)]
            if len(odd):
                raise ValueError(f"{name} must be 0 or 1 for classification, got {odd[0]:g}")
        return (0.0,) * values.shape[1], (1.0,) * values.shape[1]
    mean, scale = np.nanmean(values, 0), np.nanstd(values, 0)
    return tuple(mean.tolist()), tuple(np.where(scale > 0, scale, 1.0).tolist())


class PropertyBatch:
    """Rows with one molecule and targets become a batch of a `PropertyModel`."""

    def __init__(self, molecules: MoleculeBatch) -> None:
        self.molecules = molecules

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The arguments of `PropertyModel.forward`."""
        graph, patches = self.molecules(rows)
        targets = torch.tensor([row.targets for row in rows], dtype=torch.float32)
        return {"graph": graph, "patches": patches, "targets": targets}
