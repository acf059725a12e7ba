"""Blending: the 2D and the 3D view of a molecule attend to themselves and to one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

import edt_kernels
from edt_former.graph.batch import GraphBatch, owners
from edt_former.graph.encoder import (
    GraphEncoder,
    GraphFeatures,
    make_encoder,
    register_encoder,
)

if TYPE_CHECKING:
    from typing import Self

FLAT, SPATIAL = "moleculestm", "unimol"


@register_encoder("blended")
class Blended(GraphEncoder):
    """A 2D and a 3D encoder, blended as in Mol-LLaMA (arXiv:2502.13449) and EDT-Former.

    The 2D view is [mean of the atoms, atoms] of one encoder, the 3D view [CLS], atoms, [SEP] of
    Uni-Mol. Each passes a LayerNorm and a Linear; then every block updates the two with four
    residual attention units: 2D reads itself, 3D reads itself, 2D reads 3D, 3D reads the new 2D.
    The features are per molecule all rows of the 2D view, then all of the 3D view; `views` says
    where the atoms are in each. Nothing is padded. Parameter names are the published ones
    (`graph_encoder`, `ln_graph`, `blending_module`).

    Args:
        flat: config of the 2D encoder, see `make_encoder`.
        spatial: config of the 3D encoder, by default options of `UniMol`; its `special_tokens` is
            always true here.
        layers: number of blocks.
        width: length of a blended row.
        heads: attention heads, a divisor of `width`.
        special_tokens: the features hold the mean, [CLS] and [SEP] too; they are blended either
            way.
        train_blending: `freeze` leaves the LayerNorms and the blending trainable, as the published
            training does; the two encoders are frozen all the same.

    Raises:
        ValueError: `width` is no multiple of `heads`.

    Example:
        >>> from edt_former.chem import make_conformers, read_molecules
        >>> molecules = read_molecules(["CCO", "[Na+].[Cl-]"])
        >>> places = [conformer.coordinates for conformer in make_conformers(molecules)]
        >>> model = Blended(
        ...     flat={"name": "gin", "layers": 2, "width": 8},
        ...     spatial={"layers": 2, "width": 16, "heads": 2, "ffn": 32},
        ...     layers=1,
        ...     width=16,
        ...     heads=2,
        ... )
        >>> features = model(GraphBatch.pack(molecules, places))
        >>> features.offsets, features.views
        (tensor([ 0,  6, 10]), (tensor([0, 1, 2, 6, 7]), tensor([3, 4, 5, 8, 9])))
    """

    needs_coordinates = True

    def __init__(
        self,
        flat: Mapping[str, object] | None = None,
        spatial: Mapping[str, object] | None = None,
        layers: int = 8,
        width: int = 512,
        heads: int = 8,
        special_tokens: bool = False,
        train_blending: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads {heads}, got {width}")
        encoders = {
            FLAT: make_encoder(flat or {"name": "gin"}),
            SPATIAL: make_encoder({"name": "unimol", **(spatial or {}), "special_tokens": True}),
        }
        self.width = width
        self.config = {
            "name": "blended",
            "flat": encoders[FLAT].config,
            "spatial": encoders[SPATIAL].config,
            "layers": layers,
            "width": width,
            "heads": heads,
            "special_tokens": special_tokens,
            "train_blending": train_blending,
        }
        self.special_tokens, self.train_blending = special_tokens, train_blending
        self.graph_encoder = nn.ModuleDict(encoders)
        self.ln_graph = nn.ModuleDict({k: nn.LayerNorm(e.width) for k, e in encoders.items()})
        widths = {name: encoder.width for name, encoder in encoders.items()}
        self.blending_module = Blending(widths, layers, width, heads)

    def forward(self, batch: GraphBatch) -> GraphFeatures:
        """[2D; 3D] of every molecule; see the class.

        Raises:
            ValueError: the batch has no coordinates.
        """
        return self._joined(*self.views(batch), batch)

    def levels(self, batch: GraphBatch) -> list[GraphFeatures]:
        """[2D; 3D] as projected, then after each block of the blending; `layers + 1` in all."""
        pairs = self.blending_module.levels(self.flat(batch), self.spatial(batch))
        return [self._joined(*pair, batch) for pair in pairs]

    def _joined(
        self, flat: GraphFeatures, spatial: GraphFeatures, batch: GraphBatch
    ) -> GraphFeatures:
        if not self.special_tokens:
            flat, spatial = (_atoms_alone(view, batch) for view in (flat, spatial))
        molecule = owners(batch.offsets, batch.num_atoms)
        parts = (flat.values, spatial.values), (flat.offsets, spatial.offsets)
        values, offsets = edt_kernels.ragged_cat(*map(list, parts))
        views = (
            flat.views[0] + spatial.offsets[molecule],
            spatial.views[0] + flat.offsets[molecule + 1],
        )
        return GraphFeatures(values, offsets, views)

    def views(self, batch: GraphBatch) -> tuple[GraphFeatures, GraphFeatures]:
        """The blended rows of the 2D view, [mean, atoms], and of the 3D view, [CLS], atoms, [SEP].

        Each with its own offsets and where its atoms are.
        """
        return self.blending_module(self.flat(batch), self.spatial(batch))

    def flat(self, batch: GraphBatch) -> GraphFeatures:
        """The rows [mean, atoms] of the 2D encoder, normalised, before they are blended."""
        view = _with_mean(self.graph_encoder[FLAT](batch))
        return view._replace(values=self.ln_graph[FLAT](view.values))

    def spatial(self, batch: GraphBatch) -> GraphFeatures:
        """The rows [CLS], atoms, [SEP] of the 3D encoder, normalised, before they are blended."""
        view = self.graph_encoder[SPATIAL](batch)
        return view._replace(values=self.ln_graph[SPATIAL](view.values))

    def freeze(self) -> Self:
        """As of `GraphEncoder`; with `train_blending` only the two encoders."""
        if not self.train_blending:
            return super().freeze()
        for encoder in self.graph_encoder.values():
            encoder.freeze()
        return self


class Blending(nn.Module):
    """Projects two views to one width and lets them read themselves and one another.

    Args:
        widths: of the rows of the 2D and the 3D view, by the published names of their encoders.
        layers: number of blocks.
        width: of the projected rows.
        heads: attention heads.
    """

    def __init__(self, widths: Mapping[str, int], layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(given, width)) for name, given in widths.items()}
        )
        self.cross_attn_blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.apply(_initialise)

    def forward(
        self, flat: GraphFeatures, spatial: GraphFeatures
    ) -> tuple[GraphFeatures, GraphFeatures]:
        """Both views after the last block, [R, width] each."""
        return self.levels(flat, spatial)[-1]

    def levels(
        self, flat: GraphFeatures, spatial: GraphFeatures
    ) -> list[tuple[GraphFeatures, GraphFeatures]]:
        """Both views as projected, then after each block; `layers + 1` pairs in all."""
        flat = flat._replace(values=self.mlp[FLAT](flat.values))
        spatial = spatial._replace(values=self.mlp[SPATIAL](spatial.values))
        levels = [(flat, spatial)]
        for block in self.cross_attn_blocks:
            levels.append(block(*levels[-1]))
        return levels


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn_block_2D = _Unit(width, heads)
        self.self_attn_block_3D = _Unit(width, heads)
        self.cross_attn_block_2Dto3D = _Unit(width, heads)
        self.cross_attn_block_3Dto2D = _Unit(width, heads)

    def forward(
        self, flat: GraphFeatures, spatial: GraphFeatures
    ) -> tuple[GraphFeatures, GraphFeatures]:
        flat = self.self_attn_block_2D(flat, flat)
        spatial = self.self_attn_block_3D(spatial, spatial)
        flat = self.cross_attn_block_3Dto2D(flat, spatial)
        return flat, self.cross_attn_block_2Dto3D(spatial, flat)


class _Unit(nn.Module):
    """y = x + attention(LN(x), LN(source)); y + MLP(LN(y))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn = nn.Module()
        self.attn.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.attn.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.attn.out_proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.ln_q, self.ln_k, self.ln_v, self.ln = (nn.LayerNorm(width) for _ in range(4))
        nn.init.xavier_uniform_(self.attn.in_proj_weight)

    def forward(self, x: GraphFeatures, source: GraphFeatures) -> GraphFeatures:
        rows = ((self.ln_q, x), (self.ln_k, source), (self.ln_v, source))
        weights = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(norm(of.values), weight, bias).unflatten(1, (self.heads, -1))
            for (norm, of), weight, bias in zip(rows, *weights, strict=True)
        )
        read = edt_kernels.ragged_attention(q, k, v, x.offsets, source.offsets)
        y = x.values + self.attn.out_proj(read.flatten(1))
        return x._replace(values=y + self.mlp(self.ln(y)))


def _with_mean(features: GraphFeatures) -> GraphFeatures:
    """[mean of the atoms, atoms] of every molecule."""
    atoms, offsets = features.values, features.offsets
    mean = edt_kernels.segment_pool(atoms, offsets, reduce="mean")
    every = torch.arange(len(offsets), device=offsets.device)
    values, bounds = edt_kernels.ragged_cat([mean, atoms], [every, offsets])
    rows = torch.arange(len(atoms), device=offsets.device)
    return GraphFeatures(values, bounds, (rows + owners(offsets, len(atoms)) + 1,))


def _atoms_alone(view: GraphFeatures, batch: GraphBatch) -> GraphFeatures:
    rows = torch.arange(batch.num_atoms, device=batch.offsets.device)
    return GraphFeatures(*view.atoms(), batch.offsets, (rows,))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
