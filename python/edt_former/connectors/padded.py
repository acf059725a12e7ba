"""The query transformer over padded rectangles: what a comparison in speed is made against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import edt_kernels
from edt_former.connectors.qformer import QFormer, Rows


def padded_read(connector: QFormer, queries: Rows, keys: Rows, *, slots: int | None) -> Tensor:
    """What `connector` computes from its queries, with padding: same weights, torch's attention.

    Queries are padded to `slots` per molecule (None: the longest of the batch) and keys to the
    longest molecule, as programs without ragged kernels do; padding is masked as a key but
    computed as a query. Where nothing is padded there is no mask, which torch does fastest.

    Returns:
        Hidden states [B, slots, width]; the rows of padding hold what nobody reads.

    Raises:
        ValueError: a molecule has more than `slots` queries.
    """
    x, own = _pad(queries, slots)
    graph, seen = _pad(keys, None)
    transformer = connector.Qformer.bert
    x = transformer.embeddings(x)
    for layer in transformer.encoder.layer:
        x = _attend(layer.attention, x, x, own)
        if layer.crossattention is not None:
            x = _attend(layer.crossattention, x, graph, seen)
        x = layer.output_query(layer.intermediate_query(x), x)
    return x


def _attend(attention: torch.nn.Module, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (
        projection(rows).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for projection, rows in (
            (attention.self.query, x),
            (attention.self.key, source),
            (attention.self.value, source),
        )
    )
    read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.output(read.transpose(1, 2).flatten(2), x)


def _pad(rows: Rows, slots: int | None) -> tuple[Tensor, Tensor | None]:
    """[B, slots, ...] and the mask [B, 1, 1, slots] of what is real; None where all is."""
    shortest, longest = (int(x) for x in rows.offsets.diff().aminmax())
    slots = longest if slots is None else slots
    if longest > slots:
        raise ValueError(f"slots must be at least {longest}, the longest molecule's, got {slots}")
    if shortest == slots:
        return rows.values.unflatten(0, (-1, slots)), None
    padded, real = edt_kernels.pad(rows.values, rows.offsets, length=slots)
    return padded, real[:, None, None]
