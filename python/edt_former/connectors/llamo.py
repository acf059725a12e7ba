"""LLaMo's multi-level projector: queries for every level of the graph encoder, and for motifs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edt_kernels
from edt_former.connectors.connector import Connector, MoleculeTokens, register_connector
from edt_former.graph.batch import MOTIF_WIDTH, MotifFeatures
from edt_former.graph.encoder import GraphFeatures
from edt_former.tokens.patches import PatchOptions
from edt_kernels import Patches
from edt_kernels.nn import CrossAttention

PROJECTORS = ("levels", "low", "high", "concat", "average", "skip", "resampler")
ROWS_PER_UNIT = 16
"""Sums over the rows of a molecule are divided by this, so that they are of order 1."""


@dataclass(frozen=True)
class LLaMoConfig:
    """Options of `LLaMo`.

    Args:
        llm_width: of the language model's embeddings.
        encoder_width: of a row of the graph encoder.
        num_levels: of the graph encoder, what its atoms begin with among them.
        projector: what the queries read.
            "levels": a group of queries for every level, as published.
            "low", "high": all queries read the level after the first layer, or the last one.
            "concat": all read the rows of all levels side by side.
            "average": all read the mean of the normalised levels, with learned weights.
            "skip": all read the sum of the normalised levels, as skip connections would make it.
            "resampler": all read the last level, projected and normalised as in Qwen-VL
            (arXiv:2308.12966).
        level_queries: learned queries per level; all of them, `num_levels` times as many, read
            the same rows where the projector does not tell levels apart.
        motif_queries: learned queries that read the motifs; 0 reads none.
        width: of queries and attention; None for `encoder_width`, as published.
        heads: attention heads, a divisor of the width.
        shared_attention: of "levels", one attention for all levels, as in the published program;
            or one for every level, as the paper has it.
        depth: linear layers of the MLP that writes tokens.
        sum_tokens: further rows per molecule and level, sums over its rows, which count where
            attention averages; none in the published model.
        sum_width: inside the MLP that makes them.
    """

    llm_width: int
    encoder_width: int = 300
    num_levels: int = 6
    projector: str = "levels"
    level_queries: int = 4
    motif_queries: int = 4
    width: int | None = None
    heads: int = 4
    shared_attention: bool = True
    depth: int = 6
    sum_tokens: int = 0
    sum_width: int = 64

    def __post_init__(self) -> None:
        if self.projector not in PROJECTORS:
            known = ", ".join(map(repr, PROJECTORS))
            raise ValueError(f"projector must be one of {known}, got {self.projector!r}")
        for name, least in (
            *(("num_levels", 2 if self.projector == "low" else 1), ("level_queries", 1)),
            *(("motif_queries", 0), ("depth", 1), ("sum_tokens", 0)),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.query_width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads {self.heads}, got {self.query_width}"
            )

    @property
    def query_width(self) -> int:
        """Of queries and attention."""
        return self.encoder_width if self.width is None else self.width


@register_connector("llamo")
class LLaMo(Connector):
    """The multi-level projector of LLaMo (arXiv:2411.00871), ragged.

    A few learned queries per level read the atoms of every level of the graph encoder, others the
    motifs of the molecule (`edt_former.chem.find_motifs`); an MLP makes a token of each:

        MLP(LN([attention(q, W motifs); attention(q_0, level 0); ...; attention(q_L, level L)]))

    No padding takes part. Queries of a molecule without motifs stay as they are. Parameter names
    are the published ones, the shared attention being `cross_attention.0`.

    Args:
        config: options of `LLaMoConfig`, `llm_width` at least.

    Example:
        >>> import torch
        >>> from edt_former.chem import motif_features, read_molecules
        >>> from edt_former.graph import GIN, GraphBatch
        >>> molecules = read_molecules(["CCO", "c1ccccc1"])
        >>> batch = GraphBatch.pack(molecules, motifs=motif_features(molecules))
        >>> connector = LLaMo({"llm_width": 8, "encoder_width": 16, "num_levels": 3, "depth": 2})
        >>> features = connector.read_graph(GIN(layers=2, width=16), batch)
        >>> tokens = connector(features, {})
        >>> tokens.values.shape, tokens.offsets
        (torch.Size([32, 8]), tensor([ 0, 16, 32]))
    """

    name = "llamo"

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__()
        self.options = options = LLaMoConfig(**config)
        self.config = {"name": self.name, **asdict(options)}
        self.patch_options = PatchOptions(sources=())
        self.reads_levels = options.projector not in ("high", "resampler")
        self.reads_motifs = options.motif_queries > 0
        width, levels = options.query_width, options.num_levels
        apart = options.projector == "levels"
        groups = levels if apart else 1
        queries = levels * options.level_queries // groups
        self.query_tokens = nn.Parameter(torch.randn(groups, queries, width))

        row_width = options.encoder_width
        if options.projector == "concat":
            row_width *= levels
        if options.projector == "average":
            self.level_weights = nn.Parameter(torch.zeros(levels))
        if options.projector == "resampler":
            self.kv_proj = nn.Linear(row_width, width, bias=False)
            self.ln_kv, self.ln_q = nn.LayerNorm(width), nn.LayerNorm(width)
            row_width = width
        self.cross_attention = nn.ModuleList(
            CrossAttention(width, options.heads, kdim=row_width, vdim=row_width)
            for _ in range(1 if options.shared_attention else groups)
        )
        if options.sum_tokens:
            self.sum_mlp = nn.Sequential(
                nn.Linear(row_width, options.sum_width),
                nn.GELU(),
                nn.Linear(options.sum_width, options.sum_tokens * row_width),
            )
        if options.motif_queries:
            self.motif_query_tokens = nn.Parameter(torch.randn(options.motif_queries, width))
            self.motif_weight = nn.Linear(MOTIF_WIDTH, width, bias=False)
            self.motif_cross_attention = CrossAttention(width, options.heads)
        self.layer_norm = nn.LayerNorm(width)
        layers: list[nn.Module] = [nn.Linear(width, options.llm_width)]
        for _ in range(options.depth - 1):
            layers += [nn.SiLU(), nn.Linear(options.llm_width, options.llm_width)]
        self.net = nn.Sequential(*layers)

    def forward(self, features: GraphFeatures, patches: Mapping[str, Patches]) -> MoleculeTokens:
        """The tokens of every molecule, as many for each; `patches` is not read.

        Raises:
            ValueError: features lack the levels or the motifs that are read, or there are not
                `num_levels` levels.
        """
        tokens = self.net(self.layer_norm(self.read(features)))
        count = tokens.shape[1]
        ends = torch.arange(len(tokens) + 1, device=tokens.device) * count
        return MoleculeTokens(tokens.flatten(0, 1), ends.to(features.offsets.dtype))

    def read(self, features: GraphFeatures) -> Tensor:
        """What every query has read [B, queries, width]: those of motifs, then level by level."""
        queries = self.query_tokens
        if self.options.projector == "resampler":
            queries = self.ln_q(queries)
        read = []
        if self.reads_motifs:
            read.append(self._read_motifs(features.motifs, len(features.offsets) - 1))
        for group, rows in enumerate(self._rows(features)):
            attention = self.cross_attention[group % len(self.cross_attention)]
            keys, offsets = self._with_sums(rows.to(queries.dtype), features.offsets)
            read.append(attention.pool(queries[group], keys, offsets))
        return torch.cat(read, 1)

    def token_counts(self, patch_counts: Mapping[str, list[int]], num_molecules: int) -> list[int]:
        """A token per query."""
        options = self.options
        count = options.motif_queries + options.num_levels * options.level_queries
        return [count] * num_molecules

    def _rows(self, features: GraphFeatures) -> list[Tensor]:
        """What each group of queries reads, [R, ...] each."""
        projector = self.options.projector
        if projector == "high":
            return [features.values]
        if projector == "resampler":
            values = features.values.to(self.kv_proj.weight.dtype)
            return [self.ln_kv(self.kv_proj(values))]
        levels = features.levels
        if levels is None or len(levels) != self.options.num_levels:
            got = "none" if levels is None else len(levels)
            raise ValueError(
                f"features must have {self.options.num_levels} levels (num_levels), got {got}: "
                "Connector.read_graph has the graph encoder give them"
            )
        if projector == "levels":
            return list(levels)
        if projector == "low":
            return [levels[1]]
        if projector == "concat":
            return [torch.cat(levels, 1)]
        equal = torch.stack([F.layer_norm(level, level.shape[1:]) for level in levels])
        if projector == "skip":
            return [equal.sum(0)]
        return [torch.tensordot(self.level_weights.softmax(0).to(equal.dtype), equal, 1)]

    def _with_sums(self, rows: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        count = self.options.sum_tokens
        if not count:
            return rows, offsets
        sums = edt_kernels.segment_pool(self.sum_mlp(rows), offsets, reduce="sum") / ROWS_PER_UNIT
        every = torch.arange(len(offsets), dtype=offsets.dtype, device=offsets.device) * count
        sums = sums.unflatten(1, (count, -1)).flatten(0, 1).to(rows.dtype)
        return edt_kernels.ragged_cat([sums, rows], [every, offsets])

    def _read_motifs(self, motifs: MotifFeatures | None, molecules: int) -> Tensor:
        if motifs is None or len(motifs.offsets) != molecules + 1:
            got = "none" if motifs is None else f"those of {len(motifs.offsets) - 1}"
            raise ValueError(
                f"features must have the motifs of {molecules} molecules, got {got}: "
                "GraphBatch.pack takes them (edt_former.chem.motif_features)"
            )
        queries = self.motif_query_tokens
        rows = self.motif_weight(motifs.values.to(queries.dtype))
        read = self.motif_cross_attention.pool(queries, rows, motifs.offsets)
        return torch.where((motifs.offsets.diff() > 0)[:, None, None], read, queries)
