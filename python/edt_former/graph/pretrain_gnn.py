"""The graph encoders of pretrain-gnns: GIN, GCN and GraphSAGE on two features per atom and bond."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

import edt_kernels
from edt_former.graph.batch import PRETRAIN, GraphBatch
from edt_former.graph.encoder import GraphEncoder, GraphFeatures, register_encoder
from edt_former.graph.gin import embed, table

ATOM_TABLES = (120, 3)
BOND_TABLES = (6, 3)
SELF_LOOP = 4


@register_encoder("pretrain_gnn")
class PretrainGNN(GraphEncoder):
    """The encoders of "Strategies for Pre-training Graph Neural Networks" (arXiv:1905.12265).

    h_0 is the sum of the embeddings of an atom's element and chirality. With e(j, i) the sum of the
    embeddings of a bond's type and direction, in every layer anew, and N(i) the neighbours of atom
    i *and i itself*, layer l computes

        "gin"        MLP_l(sum_(j in N(i)) h_j + e(j, i))
        "gcn"        sum_(j in N(i)) (W_l h_j + b_l + e(j, i)) / sqrt(|N(j)| |N(i)|)
        "graphsage"  x / |x| of x = mean_(j in N(i)) W_l h_j + b_l + e(j, i)

    then BatchNorm, and a ReLU after all but the last. Parameter names are the published ones
    (`x_embedding1`, `gnns.{l}...`, `batch_norms.{l}...`), so the published files load:
    `encoder.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))`.

    The bond of an atom with itself has type 4 and direction 0, a row of its own in the published
    tables. GraphCL's GIN was trained so too, but MolCA (arXiv:2310.12798) runs it with loops that
    are single bonds: `self_loop=0` does as MolCA does. Element 119 and bond type 5 are what hides
    an atom or a bond in pre-training.

    Args:
        layer: "gin", "gcn" or "graphsage".
        layers: number of layers.
        width: length of an atom's vector.
        atom_tables: number of elements and of chiralities.
        bond_tables: number of bond types and of directions.
        self_loop: bond type of an atom with itself.
        dropout: after every layer, in training.
        features: the scheme of features, there for the config: no other can be read.

    Raises:
        ValueError: an unknown layer, another scheme of features, or `self_loop` outside its table.

    Example:
        >>> from edt_former.chem import read_molecules
        >>> encoder = PretrainGNN("gcn", layers=2, width=16)
        >>> batch = GraphBatch.pack(read_molecules(["CO"]), features=encoder.features)
        >>> encoder(batch).values.shape
        torch.Size([2, 16])
    """

    features = PRETRAIN

    def __init__(
        self,
        layer: str = "gin",
        layers: int = 5,
        width: int = 300,
        atom_tables: Sequence[int] = ATOM_TABLES,
        bond_tables: Sequence[int] = BOND_TABLES,
        self_loop: int = SELF_LOOP,
        dropout: float = 0.0,
        features: str = PRETRAIN,
    ) -> None:
        super().__init__()
        if layer not in _LAYERS:
            known = ", ".join(map(repr, _LAYERS))
            raise ValueError(f"layer must be one of {known}, got {layer!r}")
        if features != PRETRAIN:
            raise ValueError(f"features must be {PRETRAIN!r}, got {features!r}")
        if not 0 <= self_loop < bond_tables[0]:
            raise ValueError(
                f"self_loop must be a bond type, 0 to {bond_tables[0] - 1}, got {self_loop}"
            )
        self.width = width
        self.config = {
            "name": "pretrain_gnn",
            "layer": layer,
            "layers": layers,
            "width": width,
            "atom_tables": list(atom_tables),
            "bond_tables": list(bond_tables),
            "self_loop": self_loop,
            "dropout": dropout,
            "features": features,
        }
        self.x_embedding1, self.x_embedding2 = (table(size, width) for size in atom_tables)
        self.gnns = nn.ModuleList(
            _LAYERS[layer](width, bond_tables, self_loop) for _ in range(layers)
        )
        self.batch_norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: GraphBatch) -> GraphFeatures:
        """The last layer's atom features [N, width]."""
        return self.levels(batch)[-1]

    def levels(self, batch: GraphBatch) -> list[GraphFeatures]:
        """Features of every level: the atom embedding, then each layer's; `layers + 1` in all."""
        self.check_features(batch)
        h = embed((self.x_embedding1, self.x_embedding2), batch.atom_features)
        levels = [h]
        for layer, norm in zip(self.gnns, self.batch_norms, strict=True):
            h = norm(layer(h, batch))
            h = self.dropout(h if layer is self.gnns[-1] else F.relu(h))
            levels.append(h)
        return [GraphFeatures(h, batch.offsets) for h in levels]


class _Layer(nn.Module):
    def __init__(self, width: int, bond_tables: Sequence[int], self_loop: int) -> None:
        super().__init__()
        self.edge_embedding1, self.edge_embedding2 = (table(size, width) for size in bond_tables)
        self.self_loop = self_loop

    def edges(self, batch: GraphBatch) -> tuple[Tensor, Tensor]:
        """Embeddings of the bonds [E2, width], and of an atom's bond with itself [width]."""
        bonds = embed((self.edge_embedding1, self.edge_embedding2), batch.bond_features)
        return bonds, self.edge_embedding1.weight[self.self_loop] + self.edge_embedding2.weight[0]


class _GINLayer(_Layer):
    def __init__(self, width: int, bond_tables: Sequence[int], self_loop: int) -> None:
        super().__init__(width, bond_tables, self_loop)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, h: Tensor, batch: GraphBatch) -> Tensor:
        bonds, loop = self.edges(batch)
        messages = h.index_select(0, batch.bond_index[0]) + bonds
        received = edt_kernels.segment_pool(messages, batch.bond_offsets, reduce="sum")
        return self.mlp(received + h + loop)


class _GCNLayer(_Layer):
    def __init__(self, width: int, bond_tables: Sequence[int], self_loop: int) -> None:
        super().__init__(width, bond_tables, self_loop)
        self.linear = nn.Linear(width, width)

    def forward(self, h: Tensor, batch: GraphBatch) -> Tensor:
        x, (bonds, loop) = self.linear(h), self.edges(batch)
        scale = _neighbours(batch).to(x.dtype).rsqrt()
        messages = x.index_select(0, batch.bond_index[0]) + bonds
        received = edt_kernels.segment_pool(
            messages, batch.bond_offsets, weight=scale[batch.bond_index[0]], reduce="sum"
        )
        return (received + (x + loop) * scale[:, None]) * scale[:, None]


class _GraphSAGELayer(_Layer):
    def __init__(self, width: int, bond_tables: Sequence[int], self_loop: int) -> None:
        super().__init__(width, bond_tables, self_loop)
        self.linear = nn.Linear(width, width)

    def forward(self, h: Tensor, batch: GraphBatch) -> Tensor:
        x, (bonds, loop) = self.linear(h), self.edges(batch)
        messages = x.index_select(0, batch.bond_index[0]) + bonds
        received = edt_kernels.segment_pool(messages, batch.bond_offsets, reduce="sum")
        return F.normalize((received + x + loop) / _neighbours(batch)[:, None], dim=-1)


_LAYERS = {"gin": _GINLayer, "gcn": _GCNLayer, "graphsage": _GraphSAGELayer}


def _neighbours(batch: GraphBatch) -> Tensor:
    """|N(i)| [N]: the bonds of every atom, and one with itself."""
    return batch.bond_offsets.diff() + 1
