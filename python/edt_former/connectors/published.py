"""EDT-Former as published: what the released weights compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from edt_former.connectors.connector import register_connector
from edt_former.connectors.edt_former import EDTFormer, EDTFormerConfig
from edt_former.connectors.qformer import Rows
from edt_former.graph.encoder import GraphFeatures
from edt_former.tokens.published import PublishedPatchOptions
from edt_former.tokens.rows import molecule_of_rows
from edt_kernels import Patches

STATIC_QUERIES, DYNAMIC_QUERIES, LONGEST_TEXT = 32, 64, 512


@dataclass(frozen=True)
class PublishedEDTFormerConfig(EDTFormerConfig):
    """Options of `EDTFormerConfig` with the released sizes.

    Args:
        patches: `PublishedPatchOptions`, or a mapping of its fields.
    """

    encoder_width: int = 512
    num_queries: int = STATIC_QUERIES
    max_dynamic: int | None = DYNAMIC_QUERIES
    graph_token: bool = False
    text_positions: int = STATIC_QUERIES + DYNAMIC_QUERIES + LONGEST_TEXT
    patches: PublishedPatchOptions = field(default_factory=PublishedPatchOptions)

    def __post_init__(self) -> None:
        if isinstance(self.patches, Mapping):
            object.__setattr__(self, "patches", PublishedPatchOptions(**self.patches))
        super().__post_init__()
        fixed = {"graph_token": False, "sum_tokens": 0, "patch_reduce": "mean"}
        fixed |= {"view_reduce": "mean", "num_views": 1}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} must be {value!r} in the published EDT-Former, "
                    f"got {getattr(self, name)!r}"
                )


@register_connector("edt_former_published")
class PublishedEDTFormer(EDTFormer):
    """EDT-Former with the rules of the released weights (arXiv:2602.02742).

    A molecule gives, in any batch, what the published program gives for it alone, less the slots
    that are padding there: tokens of 32 anchors, then of its BRICS patches, then of its entropy
    patches, at most 64 of both. It differs from `EDTFormer` in what a patch is: see
    `PublishedPatchOptions`. With two views, the last patch takes in [CLS] and the 3D atoms.

    The graph encoder must return its special rows: `Blended(special_tokens=True)` over a `UniMol`
    with `hydrogens=False`, or with `patches.encoder` "3d" that `UniMol` alone. Blended rows are
    read as they are, those of Uni-Mol pass a LayerNorm.

    Args:
        config: options of `PublishedEDTFormerConfig`, `llm_width` at least.

    Example:
        >>> from edt_former.tokens import pack_patches
        >>> size = {"width": 16, "layers": 2, "heads": 2, "ffn": 32, "encoder_width": 8}
        >>> model = PublishedEDTFormer({"llm_width": 8, **size})
        >>> carbon = GraphFeatures(torch.zeros(5, 8), torch.tensor([0, 5]))
        >>> one = pack_patches([[0, 0, 0]])
        >>> model(carbon, {"brics": one, "entropy": one}).values.shape
        torch.Size([34, 8])
    """

    name = "edt_former_published"
    Config = PublishedEDTFormerConfig

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__(config)
        if self.patch_options.encoder == "both":
            self.ln_graph = nn.Identity()

    def queries(self, features: GraphFeatures, patches: Mapping[str, Patches]) -> Rows:
        """Anchors, BRICS patches, entropy patches; patches are those of the inner rows.

        Raises:
            ValueError: patches are of more or fewer rows than the features have.
        """
        inner = _inner_rows(features)
        for source, found in patches.items():
            if len(found.ids) != len(inner.values):
                raise ValueError(
                    f"patches[{source!r}] must be of the {len(inner.values)} rows between the "
                    f"first and the last of every molecule, got {len(found.ids)} ids; does the "
                    "graph encoder return its special rows?"
                )
        return super().queries(inner, patches)

    def keys(self, features: GraphFeatures) -> Rows:
        """All rows of every molecule."""
        return Rows(self.ln_graph(features.values), features.offsets)


def _inner_rows(features: GraphFeatures) -> GraphFeatures:
    """The rows of every molecule but its first and its last."""
    values, offsets = features.values, features.offsets
    molecules = len(offsets) - 1
    bounds = offsets - 2 * torch.arange(molecules + 1, device=offsets.device)
    rows = max(len(values) - 2 * molecules, 0)
    index = torch.arange(rows, device=offsets.device)
    if rows:
        index = index + 2 * molecule_of_rows(bounds, rows) + 1
    return GraphFeatures(values.index_select(0, index), bounds)
