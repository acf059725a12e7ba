"""How large the parts of a released file are: read off the shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Size

from edt_former.connectors.published import DYNAMIC_QUERIES, LONGEST_TEXT, STATIC_QUERIES
from edt_former.graph.gin import ATOM_TABLES, BOND_TABLES
from edt_former.released.tree import BOTH


class Shaped(Protocol):
    """A tensor, in memory or in a file."""

    shape: Size


@dataclass(frozen=True)
class Told:
    """What shapes do not tell, with the published values.

    Args:
        heads: attention heads of the query transformer.
        blending_heads: attention heads of the blending.
        max_dynamic: most dynamic queries of a molecule.
    """

    heads: int = 12
    blending_heads: int = 8
    max_dynamic: int = DYNAMIC_QUERIES


def graph_config(weights: Mapping[str, Shaped], view: str, told: Told) -> dict[str, object]:
    """The config of the graph encoder with these weights; see `edt_former.graph.make_encoder`.

    A tensor that says a size and is missing leaves it as published; a comparison of names shows
    what is missing.

    Example:
        >>> from edt_former.graph import make_encoder
        >>> sizes = {"layers": 2, "width": 16, "heads": 2, "ffn": 32}
        >>> encoder = make_encoder({"name": "unimol", **sizes})
        >>> found = graph_config(encoder.state_dict(), "3d", Told())
        >>> [found[name] for name in sizes], found["special_tokens"]
        ([2, 16, 2, 32], True)
    """
    if view != BOTH:
        return _unimol(weights, "")
    return {
        "name": "blended",
        "flat": _gin(weights, "graph_encoder.moleculestm.molecule_node_model."),
        "spatial": _unimol(weights, "graph_encoder.unimol."),
        "layers": count(weights, "blending_module.cross_attn_blocks.", 8),
        "width": _size(weights, "blending_module.mlp.unimol.0.weight", 0, 512),
        "heads": told.blending_heads,
        "special_tokens": True,
    }


def connector_config(
    weights: Mapping[str, Shaped], view: str, told: Told, *, positions: int | None = None
) -> dict[str, object]:
    """The config of the connector with these weights; see `edt_former.connectors.make_connector`.

    Args:
        weights: of the connector.
        view: of the molecule.
        told: what shapes do not tell.
        positions: of the text where there is no text branch.

    Example:
        >>> from edt_former.connectors import make_connector
        >>> sizes = {"width": 16, "layers": 2, "ffn": 32, "encoder_width": 8, "num_queries": 4}
        >>> sizes |= {"llm_width": 24, "text_vocab_size": 10, "text_positions": 20}
        >>> model = make_connector({"name": "edt_former_published", "heads": 2, **sizes})
        >>> found = connector_config(model.state_dict(), "both", Told(heads=2))
        >>> {name: found[name] for name in sizes} == sizes, found["cross_attention_freq"]
        (True, 1)
    """
    layers, first = "Qformer.bert.encoder.layer.", "Qformer.bert.encoder.layer.0."
    words = "Qformer.bert.embeddings.word_embeddings.weight"
    places = "Qformer.bert.embeddings.position_embeddings.weight"
    queries = _size(weights, "query_tokens", 1, STATIC_QUERIES)
    text = has_text(weights)
    default = positions or queries + told.max_dynamic + LONGEST_TEXT
    depth = count(weights, layers, 12)
    crossed = _numbers((n for n in weights if ".crossattention." in n), layers)
    return {
        "name": "edt_former_published",
        "llm_width": _size(weights, "llm_proj.weight", 0, None),
        "width": _size(weights, "query_tokens", 2, 768),
        "layers": depth,
        "heads": told.heads,
        "ffn": _size(weights, f"{first}intermediate_query.dense.weight", 0, 3072),
        "cross_attention_freq": crossed[1] - crossed[0] if len(crossed) > 1 else depth,
        "encoder_width": _size(weights, f"{first}crossattention.self.key.weight", 1, 512),
        "num_queries": queries,
        "max_dynamic": told.max_dynamic,
        "text_vocab_size": _size(weights, words, 0, 31_091) if text else None,
        "text_positions": _size(weights, places, 0, default) if text else default,
        "patches": {"encoder": view},
    }


def has_text(weights: Iterable[str]) -> bool:
    """Whether a connector with weights of these names has a text branch."""
    inside = ("word_embeddings.", "position_embeddings.", ".intermediate.", ".output.dense.")
    return any(
        any(part in name for part in inside) and "attention." not in name for name in weights
    )


def count(weights: Iterable[str], prefix: str, default: int) -> int:
    """How many numbered modules there are under `prefix`.

    >>> count(["h.0.a", "h.1.a", "h.1.b"], "h.", 5), count([], "h.", 5)
    (2, 5)
    """
    numbers = _numbers(weights, prefix)
    return numbers[-1] + 1 if numbers else default


def _gin(weights: Mapping[str, Shaped], at: str) -> dict[str, object]:
    atoms, bonds = f"{at}atom_encoder.atom_embedding_list.", "bond_encoder.bond_embedding_list."
    return {
        "name": "gin",
        "layers": count(weights, f"{at}gnns.", 5),
        "width": _size(weights, f"{at}gnns.0.mlp.3.weight", 0, 300),
        "atom_tables": _tables(weights, atoms, ATOM_TABLES),
        "bond_tables": _tables(weights, f"{at}gnns.0.{bonds}", BOND_TABLES),
    }


def _unimol(weights: Mapping[str, Shaped], at: str) -> dict[str, object]:
    return {
        "name": "unimol",
        "layers": count(weights, f"{at}encoder.layers.", 15),
        "width": _size(weights, f"{at}embed_tokens.weight", 1, 512),
        "heads": _size(weights, f"{at}gbf_proj.linear2.weight", 0, 64),
        "ffn": _size(weights, f"{at}encoder.layers.0.fc1.weight", 0, 2048),
        "gaussians": _size(weights, f"{at}gbf.means.weight", 1, 128),
        "special_tokens": True,
        "hydrogens": False,
    }


def _tables(weights: Mapping[str, Shaped], at: str, published: tuple[int, ...]) -> list[int]:
    return [
        _size(weights, f"{at}{i}.weight", 0, size)
        for i, size in enumerate(published[: count(weights, at, len(published))])
    ]


def _size(weights: Mapping[str, Shaped], name: str, dim: int, default: int | None) -> int | None:
    shape = weights[name].shape if name in weights else ()
    return shape[dim] if dim < len(shape) else default


def _numbers(names: Iterable[str], prefix: str) -> list[int]:
    found = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in names)
    return sorted({int(match[1]) for match in found if match})
