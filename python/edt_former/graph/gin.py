"""Graph isomorphism network with bond features, in the shape of MoleculeSTM's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edt_kernels
from edt_former.graph.batch import GraphBatch, scheme_of
from edt_former.graph.encoder import GraphEncoder, GraphFeatures, register_encoder

ATOM_TABLES = (119, 4, 12, 12, 10, 6, 6, 2, 2)
BOND_TABLES = (5, 6, 2)


@register_encoder("gin")
class GIN(GraphEncoder):
    """GIN of MoleculeSTM (arXiv:2212.10789), with OGB's atom and bond features.

    h_0 is the sum of the atom embeddings; layer l computes

        h_(l+1) = BN_l(MLP_l((1 + eps_l) h + sum_(j->i) ReLU(h_j + bond_l(j->i))))

    with a ReLU after all but the last. Parameter names are the published ones
    (`molecule_node_model.gnns.{l}...`), so MoleculeSTM's weights load.

    Args:
        layers: number of layers.
        width: length of an atom's vector.
        atom_tables: number of entries per atom feature.
        bond_tables: number of entries per bond feature.
        dropout: after every layer, in training.

    Example:
        >>> from edt_former.graph import GIN, GraphBatch
        >>> GIN(layers=2, width=16)(GraphBatch.pack([])).values.shape
        torch.Size([0, 16])
    """

    def __init__(
        self,
        layers: int = 5,
        width: int = 300,
        atom_tables: Sequence[int] = ATOM_TABLES,
        bond_tables: Sequence[int] = BOND_TABLES,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.width = width
        self.features = scheme_of(len(atom_tables), len(bond_tables))
        self.config = {
            "name": "gin",
            "layers": layers,
            "width": width,
            "atom_tables": list(atom_tables),
            "bond_tables": list(bond_tables),
            "dropout": dropout,
        }
        self.molecule_node_model = _NodeModel(layers, width, atom_tables, bond_tables, dropout)

    @property
    def widths(self) -> tuple[int, int]:
        """Features per atom and per bond."""
        return len(self.config["atom_tables"]), len(self.config["bond_tables"])

    def forward(self, batch: GraphBatch) -> GraphFeatures:
        """The last layer's atom features [N, width]."""
        return self.levels(batch)[-1]

    def levels(self, batch: GraphBatch) -> list[GraphFeatures]:
        """Features of every level: the atom embedding, then each layer's; `layers + 1` in all."""
        self.check_features(batch)
        return [GraphFeatures(h, batch.offsets) for h in self.molecule_node_model(batch)]


class _NodeModel(nn.Module):
    def __init__(
        self,
        layers: int,
        width: int,
        atom_tables: Sequence[int],
        bond_tables: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.atom_encoder = nn.Module()
        self.atom_encoder.atom_embedding_list = _tables(atom_tables, width)
        self.gnns = nn.ModuleList(_Layer(width, bond_tables) for _ in range(layers))
        self.batch_norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: GraphBatch) -> list[Tensor]:
        h = embed(self.atom_encoder.atom_embedding_list, batch.atom_features)
        levels = [h]
        for layer, norm in zip(self.gnns, self.batch_norms, strict=True):
            h = norm(layer(h, batch))
            h = self.dropout(h if layer is self.gnns[-1] else F.relu(h))
            levels.append(h)
        return levels


class _Layer(nn.Module):
    def __init__(self, width: int, bond_tables: Sequence[int]) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.BatchNorm1d(2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, width),
        )
        self.bond_encoder = nn.Module()
        self.bond_encoder.bond_embedding_list = _tables(bond_tables, width)

    def forward(self, h: Tensor, batch: GraphBatch) -> Tensor:
        bonds = embed(self.bond_encoder.bond_embedding_list, batch.bond_features)
        messages = F.relu(h.index_select(0, batch.bond_index[0]) + bonds)
        received = edt_kernels.segment_pool(messages, batch.bond_offsets, reduce="sum")
        return self.mlp((1 + self.eps) * h + received)


def table(size: int, width: int) -> nn.Embedding:
    """An embedding of `size` entries, initialised as the published encoders are."""
    embedding = nn.Embedding(size, width)
    nn.init.xavier_uniform_(embedding.weight)
    return embedding


def _tables(sizes: Sequence[int], width: int) -> nn.ModuleList:
    return nn.ModuleList(table(size, width) for size in sizes)


def embed(tables: Iterable[nn.Embedding], features: Tensor) -> Tensor:
    """Sum over the columns of `features` [N, F] of each column's embedding."""
    return sum(table(column) for table, column in zip(tables, features.unbind(1), strict=True))
