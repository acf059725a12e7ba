"""The published stage 1 in padded torch, from the encoders' outputs to the losses.

Written for these tests alone: it shares no code with the package. It reproduces the recorded
numbers with all their padding, and shows by one switch what the padding changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SLOTS, STATIC, HEADS, BLEND_HEADS = 96, 32, 4, 4


class Front(NamedTuple):
    """What enters the transformer, padded; masks are true where a row exists."""

    node: Tensor  # [B, R, D]
    node_mask: Tensor
    pooled: Tensor  # [B, G, D]
    queries: Tensor  # [B, 96, W]
    query_mask: Tensor
    blocks: list[tuple[Tensor, Tensor]]


class Outputs(NamedTuple):
    query_hidden: Tensor
    text_hidden: Tensor
    graph_features: Tensor
    text_features: Tensor
    similarity: Tensor
    matching: Tensor
    caption: Tensor
    losses: tuple[Tensor, Tensor, Tensor]


def linear(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: Mapping[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, heads: int) -> Tensor:
    """q [B, L, W], allowed bool, broadcast to [B, L, K]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed[:, None], -1e30)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def blend(state: Mapping[str, Tensor], record: Mapping[str, Tensor]) -> Front:
    masks = [record[f"enc.{name}.mask"] for name in ("moleculestm", "unimol")]
    views = []
    for name, mask in zip(("moleculestm", "unimol"), masks, strict=True):
        x = norm(state, f"ln_graph.{name}", record[f"enc.{name}.node"])
        views.append(linear(state, f"blending_module.mlp.{name}.0", x) * mask[..., None])
    blocks, n = [], 0
    while f"blending_module.cross_attn_blocks.{n}.self_attn_block_2D.ln.weight" in state:
        for unit, target, source in (
            ("self_attn_block_2D", 0, 0),
            ("self_attn_block_3D", 1, 1),
            ("cross_attn_block_3Dto2D", 0, 1),
            ("cross_attn_block_2Dto3D", 1, 0),
        ):
            at = f"blending_module.cross_attn_blocks.{n}.{unit}"
            x, y = views[target], views[source]
            weights = state[f"{at}.attn.in_proj_weight"].chunk(3)
            biases = state[f"{at}.attn.in_proj_bias"].chunk(3)
            rows = (norm(state, f"{at}.ln_q", x), norm(state, f"{at}.ln_k", y))
            rows = (*rows, norm(state, f"{at}.ln_v", y))
            q, k, v = (r @ w.T + b for r, w, b in zip(rows, weights, biases, strict=True))
            read = attend(q, k, v, masks[source][:, None], BLEND_HEADS)
            x = x + linear(state, f"{at}.attn.out_proj", read)
            inner = F.gelu(linear(state, f"{at}.mlp.0", norm(state, f"{at}.ln", x)))
            x = x + linear(state, f"{at}.mlp.2", inner)
            views[target] = x * masks[target][..., None]
        blocks.append(tuple(views))
        n += 1
    node, node_mask = torch.cat(views, 1), torch.cat(masks, 1)

    cuts = {
        source: record[f"in.{source}_gids.flat"].split(record[f"in.{source}_gids.len"].tolist())
        for source in ("brics", "entropy")
    }
    pooled = []
    for molecule, x in enumerate(node):
        rows = int(node_mask[molecule].sum()) - 2
        pooled.append(pool(x[1 : 1 + rows], [cuts[s][molecule] for s in ("brics", "entropy")]))
    counts = [len(x) for x in pooled]
    pooled = torch.nn.utils.rnn.pad_sequence(pooled, batch_first=True)
    local = linear(state, "local_q_proj", pooled)
    static = state["query_tokens"].expand(len(node), -1, -1)
    queries = F.pad(torch.cat([static, local], 1), (0, 0, 0, SLOTS - STATIC - local.shape[1]))
    query_mask = torch.arange(SLOTS) < STATIC + torch.tensor(counts)[:, None]
    return Front(node, node_mask, pooled, queries, query_mask, blocks)


def pool(rows: Tensor, cuts: list[Tensor]) -> Tensor:
    """The published mean over each group of rows: ids cut off, or continued with the last."""
    means = []
    for cut in cuts:
        ids = cut[: len(rows)].tolist() or [0]
        ids = torch.tensor(ids + [ids[-1]] * (len(rows) - len(ids)))
        means += [rows[ids == group].mean(0) for group in ids.unique()]
    return torch.stack(means)


def transformer(state, queries, keys, key_mask, text, allowed, first=0):
    """Hidden states of [queries; text]; `allowed` bool [B, L, L]."""
    at = "Qformer.bert.embeddings"
    x, count = queries, queries.shape[1]
    if text is not None:
        places = state[f"{at}.position_embeddings.weight"][first : first + text.shape[1]]
        x = torch.cat([x, state[f"{at}.word_embeddings.weight"][text] + places], 1)
    x = norm(state, f"{at}.LayerNorm", x, 1e-12)
    n = 0
    while f"Qformer.bert.encoder.layer.{n}.attention.self.query.weight" in state:
        at = f"Qformer.bert.encoder.layer.{n}"

        def attention(part, x, source, allowed, at=at):
            q, k, v = (
                linear(state, f"{at}.{part}.self.{name}", y)
                for name, y in (("query", x), ("key", source), ("value", source))
            )
            read = linear(state, f"{at}.{part}.output.dense", attend(q, k, v, allowed, HEADS))
            return norm(state, f"{at}.{part}.output.LayerNorm", read + x, 1e-12)

        def feed(branch, x, at=at):
            inner = F.gelu(linear(state, f"{at}.intermediate{branch}.dense", x))
            out = linear(state, f"{at}.output{branch}.dense", inner)
            return norm(state, f"{at}.output{branch}.LayerNorm", out + x, 1e-12)

        x = attention("attention", x, x, allowed)
        q, words = x[:, :count], x[:, count:]
        if count and f"{at}.crossattention.self.query.weight" in state:
            q = attention("crossattention", q, keys, key_mask[:, None])
        parts = ([feed("_query", q)] if count else []) + (
            [feed("", words)] if text is not None else []
        )
        x = torch.cat(parts, 1)
        n += 1
    return x


def stage1(
    state,
    node,
    node_mask,
    queries,
    query_mask,
    ids,
    text_mask,
    negatives,
    *,
    begin_id,
    first,
    padded_slots=True,
    temperature=0.1,
) -> Outputs:
    """The three losses; without `padded_slots` the contrast looks at queries that exist."""
    batch, words, slots = *ids.shape, queries.shape[1]
    begun = ids.clone()
    begun[:, 0] = begin_id
    causal = torch.ones(words, words, dtype=torch.bool).tril()
    allowed = torch.zeros(batch, slots + words, slots + words, dtype=torch.bool)
    allowed[:, :, :slots] = query_mask[:, None]
    allowed[:, slots:, slots:] = causal & text_mask[:, None]
    both = transformer(state, queries, node, node_mask, begun, allowed, first)
    query_hidden, text_states = both.split([slots, words], 1)

    nothing = queries[:, :0]
    text_hidden = transformer(state, nothing, node, node_mask, ids, text_mask[:, None])
    graph_features = F.normalize(linear(state, "graph_proj", query_hidden), dim=-1)
    text_features = F.normalize(linear(state, "text_proj", text_hidden[:, 0]), dim=-1)
    every = torch.einsum("iqd,jd->ijq", graph_features, text_features) / temperature
    if not padded_slots:
        every = every.masked_fill(~query_mask[:, None], -1e30)
    similarity = every.amax(-1)
    own = torch.arange(batch)
    contrast = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2

    graphs, texts = torch.cat([own, negatives[0], own]), torch.cat([own, own, negatives[1]])
    static = state["query_tokens"].expand(3 * batch, -1, -1)
    seen = torch.cat([torch.ones(3 * batch, static.shape[1]).bool(), text_mask[texts]], 1)
    hidden = transformer(state, static, node[graphs], node_mask[graphs], ids[texts], seen[:, None])
    matching = linear(state, "gtm_head", hidden[:, : static.shape[1]])
    target = (torch.arange(3 * batch) < batch).long()
    matched = F.cross_entropy(matching.mean(1), target)

    at = "Qformer.cls.predictions"
    h = F.gelu(linear(state, f"{at}.transform.dense", text_states))
    h = norm(state, f"{at}.transform.LayerNorm", h, 1e-12)
    caption = h @ state["Qformer.bert.embeddings.word_embeddings.weight"].T + state[f"{at}.bias"]
    labels = begun.masked_fill(~text_mask, -100)[:, 1:]
    captioned = F.cross_entropy(
        caption[:, :-1].flatten(0, 1), labels.flatten(), label_smoothing=0.1
    )
    losses = contrast, matched, captioned
    return Outputs(
        query_hidden,
        text_hidden,
        graph_features,
        text_features,
        similarity,
        matching,
        caption,
        losses,
    )
