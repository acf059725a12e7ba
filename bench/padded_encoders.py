"""Uni-Mol and blending over padded rectangles: what a comparison in speed is made against.

The twins use the weights of the ragged modules. Molecules become rectangles whose length is a
multiple of 8, every pair of every rectangle has its bias, and padding is masked.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edt_former.graph import UniMol
from edt_former.graph.blending import FLAT, SPATIAL, Blending
from edt_former.graph.unimol import SYMBOLS
from edt_kernels import pad


def in_eights(values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """[B, L, ...] with L a multiple of 8, and which rows are real [B, L]."""
    padded, real = pad(values, offsets)
    more = -padded.shape[1] % 8
    return F.pad(padded, (0, 0) * (padded.dim() - 2) + (0, more)), F.pad(real, (0, more))


def padded_unimol(model: UniMol, ids: Tensor, places: Tensor, real: Tensor) -> Tensor:
    """[B, L, width]: the published order, pairs and scores in rectangles [B, heads, L, L]."""
    distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    kind = ids[:, :, None] * len(SYMBOLS) + ids[:, None]
    pairs = model.gbf_proj(model.gbf(distance.flatten(), kind.flatten()))
    bias = pairs.unflatten(0, distance.shape).permute(0, 3, 1, 2).contiguous()
    bias = bias.masked_fill(~real[:, None, None], -torch.inf)
    x = model.encoder.emb_layer_norm(model.embed_tokens(ids)) * real[..., None]
    for layer in model.encoder.layers:
        qkv = layer.self_attn.in_proj(layer.self_attn_layer_norm(x))
        q, k, v = (y.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for y in qkv.chunk(3, -1))
        bias = q * q.shape[-1] ** -0.5 @ k.mT + bias
        read = (bias.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + layer.self_attn.out_proj(read)
        x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
    return model.encoder.final_layer_norm(x)


def padded_unit(unit: nn.Module, x: Tensor, source: Tensor, real: tuple[Tensor, Tensor]) -> Tensor:
    parts = ((unit.ln_q, x), (unit.ln_k, source), (unit.ln_v, source))
    weights = unit.attn.in_proj_weight.chunk(3), unit.attn.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(norm(of), w, b).unflatten(-1, (unit.heads, -1)).transpose(1, 2)
        for (norm, of), w, b in zip(parts, *weights, strict=True)
    )
    read = F.scaled_dot_product_attention(q, k, v, attn_mask=real[1][:, None, None])
    y = x + unit.attn.out_proj(read.transpose(1, 2).flatten(2))
    return (y + unit.mlp(unit.ln(y))) * real[0][..., None]


def padded_blending(
    model: Blending, flat: Tensor, spatial: Tensor, real: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    a, b = real
    flat = model.mlp[FLAT](flat) * a[..., None]
    spatial = model.mlp[SPATIAL](spatial) * b[..., None]
    for block in model.cross_attn_blocks:
        flat = padded_unit(block.self_attn_block_2D, flat, flat, (a, a))
        spatial = padded_unit(block.self_attn_block_3D, spatial, spatial, (b, b))
        flat = padded_unit(block.cross_attn_block_3Dto2D, flat, spatial, (a, b))
        spatial = padded_unit(block.cross_attn_block_2Dto3D, spatial, flat, (b, a))
    return flat, spatial
