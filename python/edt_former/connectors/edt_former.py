"""EDT-Former: learned anchors, and a dynamic query for every patch of the molecule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import edt_kernels
from edt_former.connectors.connector import register_connector
from edt_former.connectors.qformer import QFormer, QFormerConfig, Rows, check_budget
from edt_former.graph.encoder import GraphFeatures
from edt_former.tokens.patches import PatchOptions
from edt_former.tokens.rows import molecule_of_rows
from edt_kernels import Patches

REDUCTIONS = ("mean", "sum", "max", "min")
VIEW_REDUCTIONS = ("mean", "concat")


@dataclass(frozen=True)
class EDTFormerConfig(QFormerConfig):
    """Options of EDT-Former: those of `QFormerConfig`, and how patches become queries.

    Args:
        patches: `PatchOptions`, or a mapping of its fields.
        patch_reduce: "mean", "sum", "max" or "min" of a patch's atoms.
        max_dynamic: most dynamic queries of a molecule, the first in order (BRICS patches stand
            before those of entropy); None for all.
        view_reduce: how the views of an atom (2D and 3D) enter its patch: their "mean", or
            "concat", one after the other.
        num_views: of the graph encoder; needed by "concat" alone.
    """

    cross_attention_freq: int = 1
    patches: PatchOptions = field(default_factory=PatchOptions)
    patch_reduce: str = "mean"
    max_dynamic: int | None = None
    view_reduce: str = "mean"
    num_views: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.patches, Mapping):
            object.__setattr__(self, "patches", PatchOptions(**self.patches))
        if self.patch_reduce not in REDUCTIONS:
            raise ValueError(
                f"patch_reduce must be one of {', '.join(map(repr, REDUCTIONS))}, "
                f"got {self.patch_reduce!r}"
            )
        check_budget("max_dynamic", self.max_dynamic)
        if self.max_dynamic is not None and self.max_dynamic < 0:
            raise ValueError(f"max_dynamic must be at least 0, got {self.max_dynamic}")
        if self.view_reduce not in VIEW_REDUCTIONS:
            raise ValueError(
                f"view_reduce must be one of {', '.join(map(repr, VIEW_REDUCTIONS))}, "
                f"got {self.view_reduce!r}"
            )
        if self.num_views < 1:
            raise ValueError(f"num_views must be at least 1, got {self.num_views}")


@register_connector("edt_former")
class EDTFormer(QFormer):
    """Queries [anchors; BRICS patches; entropy patches] read the atoms (arXiv:2602.02742).

    A dynamic query is Linear(mean of the normalised atoms of its patch). A molecule has exactly
    as many as it has patches, of the sources that `patches` names: no padding, no limit unless
    `max_dynamic` sets one. A patch is the same atoms in every view of the graph encoder
    (`GraphFeatures.views`); rows that are no atoms ([CLS], graph tokens) belong to none.

    Args:
        config: options of `EDTFormerConfig`, `llm_width` at least.

    Example:
        >>> import torch
        >>> from edt_former.graph import GraphFeatures
        >>> from edt_former.tokens import pack_patches
        >>> size = {"width": 16, "layers": 2, "heads": 2, "ffn": 32, "num_queries": 4}
        >>> model = EDTFormer({"llm_width": 8, **size})
        >>> atoms = GraphFeatures(torch.zeros(3, 300), torch.tensor([0, 2, 3]))
        >>> model(atoms, {"entropy": pack_patches([[0, 1], [0]])}).offsets
        tensor([ 0,  6, 11])
        >>> model.token_counts({"entropy": [2, 1]}, 2)
        [6, 5]
    """

    name = "edt_former"
    Config = EDTFormerConfig

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__(config)
        self.patch_options = self.options.patches
        self.config["patches"]["sources"] = list(self.patch_options.sources)
        concat = self.options.view_reduce == "concat"
        patch_width = self.options.encoder_width * (self.options.num_views if concat else 1)
        self.local_q_proj = nn.Linear(patch_width, self.options.width)
        nn.init.normal_(self.local_q_proj.weight, std=0.02)
        nn.init.zeros_(self.local_q_proj.bias)

    def queries(self, features: GraphFeatures, patches: Mapping[str, Patches]) -> Rows:
        """Anchors, then the dynamic queries of every source."""
        wanted = [_source(patches, name) for name in self.patch_options.sources]
        if not wanted:
            return super().queries(features, patches)
        atoms = self._atoms(features)
        pooled = [
            edt_kernels.segment_pool(
                atoms, source.atom_offsets, order=source.order, reduce=self.options.patch_reduce
            )
            for source in wanted
        ]
        dynamic = Rows(*edt_kernels.ragged_cat(pooled, [source.patch_offsets for source in wanted]))
        if self.options.max_dynamic is not None:
            dynamic = _first(dynamic, self.options.max_dynamic)
        queries = self.local_q_proj(dynamic.values).to(self.query_tokens.dtype)
        return Rows(*edt_kernels.ragged_cat([self.anchors(), queries], [None, dynamic.offsets]))

    def set_budget(self, *, anchors: int | None = None, dynamic: int | None = None) -> None:
        """As of `QFormer`, and at most `dynamic` queries from patches, the first in order."""
        self._change(anchor_budget=anchors, max_dynamic=dynamic)

    def _atoms(self, features: GraphFeatures) -> Tensor:
        """The normalised atoms, one row each, of all views together."""
        views = features._replace(values=self.ln_graph(features.values)).atoms()
        if self.options.view_reduce == "mean":
            return torch.stack(views).mean(0) if len(views) > 1 else views[0]
        if len(views) != self.options.num_views:
            raise ValueError(
                f"the graph encoder must have {self.options.num_views} views (num_views), "
                f"it has {len(views)}"
            )
        return torch.cat(views, 1)

    def token_counts(self, patch_counts: Mapping[str, list[int]], num_molecules: int) -> list[int]:
        """The anchors, and the patches of every source (at most `max_dynamic`)."""
        counts = [0] * num_molecules
        for name in self.patch_options.sources:
            counts = [a + b for a, b in zip(counts, _source(patch_counts, name), strict=True)]
        limit = self.options.max_dynamic
        if limit is not None:
            counts = [min(count, limit) for count in counts]
        return [self.num_anchors + count for count in counts]


def _source(patches: Mapping[str, object], name: str) -> object:
    if name not in patches:
        raise ValueError(
            f"patches must have the source {name!r} that the connector reads, "
            f"got {', '.join(map(repr, patches)) or 'none'}"
        )
    return patches[name]


def _first(rows: Rows, limit: int) -> Rows:
    """The first `limit` rows of every molecule, at a capacity that needs no look at the counts."""
    lengths = rows.offsets.diff().clamp(max=limit)
    offsets = torch.cat([rows.offsets[:1], lengths.cumsum(0)])
    capacity = min(rows.values.shape[0], limit * lengths.shape[0])
    molecule = molecule_of_rows(offsets, capacity)
    shift = (rows.offsets - offsets)[molecule]
    index = torch.arange(capacity, device=offsets.device) + shift
    return Rows(rows.values[index.clamp(max=rows.values.shape[0] - 1)], offsets)
