"""Uni-Mol: a transformer over the atoms of a molecule that sees how far apart they are."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edt_kernels
from edt_former.graph.batch import GraphBatch, owners
from edt_former.graph.encoder import GraphEncoder, GraphFeatures, register_encoder

SYMBOLS = (
    *("[PAD]", "[CLS]", "[SEP]", "[UNK]", "C", "N", "O", "S", "H", "Cl", "F", "Br", "I", "Si", "P"),
    *("B", "Na", "K", "Al", "Ca", "Sn", "As", "Hg", "Fe", "Zn", "Cr", "Se", "Gd", "Au", "Li"),
    "[MASK]",
)
"""The dictionary of the released weights; every other element is [UNK]."""

_CLS, _SEP, _UNK, _MASK = map(SYMBOLS.index, ("[CLS]", "[SEP]", "[UNK]", "[MASK]"))
_ATOMIC_NUMBERS = (6, 7, 8, 16, 1, 17, 9, 35, 53, 14, 15, 5, 11, 19, 13, 20)
_ATOMIC_NUMBERS += (50, 33, 80, 26, 30, 24, 34, 64, 79, 3)  # of SYMBOLS from "C" to "Li"
_HYDROGEN = 1
_ELEMENTS = 119
HIDDEN = _ELEMENTS
"""In `GraphBatch.elements`, an atom whose element is to be guessed: Uni-Mol reads [MASK]."""

PI = 3.14159  # of the Gaussians, as the released weights were trained
PAIRS_AT_A_TIME = 4096


@register_encoder("unimol")
class UniMol(GraphEncoder):
    """Uni-Mol (doi:10.26434/chemrxiv-2022-jjm0j-v4) as EDT-Former reads it, arXiv:2602.02742.

    A molecule is [CLS], its atoms, [SEP]; the two lie in the middle of the atoms. Atoms i and j at
    distance d, of a pair of symbols t, attend to one another with a bias per head,

        bias_ij = MLP(Gaussians(mul_t d + bias_t)),

    and every layer hands its scores, q k^T / sqrt(D) + bias, to the next one as bias. Layers are
    pre-LayerNorm. Nothing is padded: pairs are ragged, [sum L^2, heads]. Parameter names are the
    published ones, so released weights load.

    Args:
        layers: number of layers.
        width: length of an atom's vector.
        heads: attention heads, a divisor of `width`.
        ffn: width inside the feed-forward.
        gaussians: number of Gaussians.
        dropout: of embeddings, hidden states and attention weights, in training.
        special_tokens: the features hold the rows of [CLS] and [SEP] too, and `views` says where
            the atoms are.
        hydrogens: isotopic hydrogens and the like are read as atoms. The published program leaves
            them out (unless there is nothing else) and centres the others; an atom that is left
            out is represented by [CLS], so this needs `special_tokens`.

    Raises:
        ValueError: `width` is no multiple of `heads`; no `hydrogens` without `special_tokens`.

    Example:
        >>> import numpy as np
        >>> from edt_former.chem import make_conformers, read_molecules
        >>> molecules = read_molecules(["CCO", "[Na+].[Cl-]"])
        >>> places = [conformer.coordinates for conformer in make_conformers(molecules)]
        >>> model = UniMol(layers=2, width=16, heads=2, ffn=32)
        >>> model(GraphBatch.pack(molecules, places)).values.shape
        torch.Size([5, 16])
    """

    needs_coordinates = True

    def __init__(
        self,
        layers: int = 15,
        width: int = 512,
        heads: int = 64,
        ffn: int = 2048,
        gaussians: int = 128,
        dropout: float = 0.1,
        special_tokens: bool = False,
        hydrogens: bool = True,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads {heads}, got {width}")
        if not hydrogens and not special_tokens:
            raise ValueError("special_tokens must be True where hydrogens is False, got False")
        self.width = width
        self.config = {
            "name": "unimol",
            "layers": layers,
            "width": width,
            "heads": heads,
            "ffn": ffn,
            "gaussians": gaussians,
            "dropout": dropout,
            "special_tokens": special_tokens,
            "hydrogens": hydrogens,
        }
        self.special_tokens, self.hydrogens = special_tokens, hydrogens
        self.embed_tokens = nn.Embedding(len(SYMBOLS), width, padding_idx=0)
        self.gbf = _Gaussians(gaussians)
        self.gbf_proj = _PairMLP(gaussians, heads)
        self.encoder = _Encoder(layers, width, heads, ffn, dropout)
        ids = torch.full((_ELEMENTS + 1,), _UNK)
        ids[list(_ATOMIC_NUMBERS)] = torch.arange(_UNK + 1, _MASK)
        ids[HIDDEN] = _MASK
        self.register_buffer("token_of_element", ids, persistent=False)
        self.apply(_initialise)

    def forward(self, batch: GraphBatch) -> GraphFeatures:
        """The atoms [N, width], or all rows where `special_tokens` says so.

        Raises:
            ValueError: the batch has no coordinates.
        """
        tokens = self._tokens(batch)
        last = deque(self._levels(tokens), maxlen=1).pop()
        return self._features(last, tokens, batch)

    def levels(self, batch: GraphBatch) -> list[GraphFeatures]:
        """Features of every level: the embedded symbols, then each layer's; `layers + 1` in all.

        The last passes the LayerNorm that ends the encoder, as it does in `forward`.
        """
        tokens = self._tokens(batch)
        return [self._features(values, tokens, batch) for values in self._levels(tokens)]

    def _levels(self, tokens: _Tokens) -> Iterator[Tensor]:
        return self.encoder(self.embed_tokens(tokens.ids), tokens.offsets, self._bias(tokens))

    def _features(self, values: Tensor, tokens: _Tokens, batch: GraphBatch) -> GraphFeatures:
        if self.special_tokens:
            return GraphFeatures(values, tokens.offsets, (tokens.atoms,))
        return GraphFeatures(values.index_select(0, tokens.atoms), batch.offsets)

    def _tokens(self, batch: GraphBatch) -> _Tokens:
        if batch.coordinates is None:
            raise ValueError(
                "batch.coordinates must be given to a 3D encoder, got None: make them with "
                "edt_former.chem.make_conformers and pass them to GraphBatch.pack"
            )
        kept = None if self.hydrogens else _without_hydrogens(batch)
        elements, places, offsets = batch.elements, batch.coordinates, batch.offsets
        if kept is not None:
            elements, places = elements[kept], places[kept]
            offsets = F.pad(kept.cumsum(0), (1, 0))[offsets]
        molecule = owners(offsets, len(elements))
        rows = torch.arange(len(elements), device=offsets.device) + 2 * molecule + 1
        bounds = offsets + 2 * torch.arange(len(offsets), device=offsets.device)

        ids = elements.new_full((len(elements) + 2 * batch.num_molecules,), _SEP)
        ids[bounds[:-1]] = _CLS
        ids[rows] = self.token_of_element[elements]
        middle = edt_kernels.segment_pool(places, offsets, reduce="mean")
        positions = places.new_zeros(len(ids), 3).index_copy(0, rows, places - middle[molecule])
        if kept is not None:
            absent = bounds[owners(batch.offsets, batch.num_atoms)]
            rows = absent.masked_scatter(kept, rows)
        return _Tokens(ids, positions, bounds, rows)

    def _bias(self, tokens: _Tokens) -> Tensor:
        """The bias [sum L^2, heads] of every pair of rows of a molecule."""
        i, j = _pairs(tokens.offsets, len(tokens.ids))
        distance = torch.linalg.vector_norm(tokens.positions[i] - tokens.positions[j], dim=-1)
        kind = tokens.ids[i] * len(SYMBOLS) + tokens.ids[j]
        # A few pairs at a time: their Gaussians, 128 numbers each, stay in the cache.
        chunks = zip(distance.split(PAIRS_AT_A_TIME), kind.split(PAIRS_AT_A_TIME), strict=True)
        return torch.cat([self.gbf_proj(self.gbf(*chunk)) for chunk in chunks])


class _Tokens(NamedTuple):
    """What the transformer reads: [CLS], atoms, [SEP] of every molecule, packed."""

    ids: Tensor  # [R]
    positions: Tensor  # [R, 3], 0 for [CLS] and [SEP]
    offsets: Tensor  # [B + 1]
    atoms: Tensor  # [N], the row of every atom of the batch


def _without_hydrogens(batch: GraphBatch) -> Tensor:
    """The atoms [N] that the published program reads: no hydrogen beside other atoms."""
    heavy = batch.elements != _HYDROGEN
    molecule = owners(batch.offsets, batch.num_atoms)
    others = torch.zeros_like(batch.offsets).index_add(0, molecule, heavy.long())
    return heavy | (others[molecule] == 0)


def _pairs(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The rows (i, j) of every pair of a molecule: all j of its first row, then of the second."""
    molecule = owners(offsets, rows)
    lengths = offsets.diff()[molecule]
    ends = lengths.cumsum(0)
    pairs = int(ends[-1]) if rows else 0
    first = torch.arange(rows, device=offsets.device)
    first = first.repeat_interleave(lengths, output_size=pairs)
    shift = offsets[:-1][molecule] - (ends - lengths)
    return first, torch.arange(pairs, device=offsets.device) + shift[first]


class _Gaussians(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.means, self.stds = nn.Embedding(1, count), nn.Embedding(1, count)
        self.mul, self.bias = (nn.Embedding(len(SYMBOLS) ** 2, 1) for _ in range(2))

    def forward(self, distance: Tensor, kind: Tensor) -> Tensor:
        """Densities [P, count] of pairs at a distance [P], of two symbols [P]; in float32."""
        x = self.mul(kind).float() * distance[:, None] + self.bias(kind).float()
        mean, std = self.means.weight.float(), self.stds.weight.float().abs() + 1e-5
        density = torch.exp(-0.5 * ((x - mean) / std) ** 2) / (math.sqrt(2 * PI) * std)
        return density.to(self.means.weight.dtype)


class _PairMLP(nn.Module):
    def __init__(self, gaussians: int, heads: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(gaussians, gaussians)
        self.linear2 = nn.Linear(gaussians, heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))


class _Encoder(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.emb_layer_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_Layer(width, heads, ffn, dropout) for _ in range(layers))
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor) -> Iterator[Tensor]:
        """The rows [R, width] of every level, one after another."""
        x = self.dropout(self.emb_layer_norm(x))
        for layer in self.layers:
            yield x
            x, bias = layer(x, offsets, bias, hand_on=layer is not self.layers[-1])
        yield self.final_layer_norm(x)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.self_attn = nn.Module()
        self.self_attn.in_proj = nn.Linear(width, 3 * width)
        self.self_attn.out_proj = nn.Linear(width, width)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, offsets: Tensor, bias: Tensor, *, hand_on: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The rows [R, width] and, to hand on, the scores of the pairs."""
        read, scores = self._attend(self.self_attn_layer_norm(x), offsets, bias, hand_on)
        x = x + self.dropout(self.self_attn.out_proj(read))
        hidden = F.gelu(self.fc1(self.final_layer_norm(x)))
        return x + self.dropout(self.fc2(hidden)), scores

    def _attend(
        self, x: Tensor, offsets: Tensor, bias: Tensor, hand_on: bool
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.self_attn.in_proj(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        dropout = self.dropout.p if self.training else 0.0
        seed = torch.randint(2**63 - 1, (len(offsets) - 1,), device=x.device) if dropout else None
        options = {"bias": bias, "dropout_p": dropout, "seed": seed, "return_scores": hand_on}
        read = edt_kernels.ragged_attention(q, k, v, offsets, offsets, **options)
        read, scores = read if hand_on else (read, None)
        return read.flatten(1), scores


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx])
    if isinstance(module, _Gaussians):
        nn.init.uniform_(module.means.weight, 0, 3)
        nn.init.uniform_(module.stds.weight, 0, 3)
        nn.init.ones_(module.mul.weight)
        nn.init.zeros_(module.bias.weight)
