"""Attention within every molecule: a program owns a molecule and a head, whatever their lengths.

With x = scale q k^T + bias, P = softmax(x), M what dropout multiplies P with and dP = M (dO V^T):
O = (M P) V, dx = P (dP - delta + dlse) + dscores, delta = rowsum(P dP), dq = scale dx K,
dk = scale dx^T Q, dv = (M P)^T dO. The backward makes x again tile by tile. Its programs own a key
head and sum over the query heads that share it, so nothing is added by two programs: no atomics,
and a molecule's bits do not depend on its batch.

A molecule of at most BLOCK_M queries and BLOCK_N keys is one tile, and both kernels go straight
through it. Longer ones are cut into tiles of BLOCK_M queries and LOOP_N keys. What a tile has
beyond its molecule, or a head beyond its width D, is masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from edt_kernels.ops.ragged_attention import WIDEST_ON_GPU
from edt_kernels.reference.entropy import accumulation_dtype
from edt_kernels.triton.launch import Configuration, launch
from edt_kernels.triton.primitives import accumulator, dense, tail_programs


@triton.jit
def _bounds(offsets_ptr, molecule):
    """First row of a molecule and its number of rows."""
    begin = tl.load(offsets_ptr + molecule).to(tl.int64)
    return begin, (tl.load(offsets_ptr + molecule + 1).to(tl.int64) - begin).to(tl.int32)


@triton.jit
def _row_places(
    ptr,
    first,
    rows,
    ROW: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Where the numbers of rows `first` to first + BLOCK lie, and which of them exist.

    `ptr` is a molecule's first row [D] of a head, ROW the way from one row to the next.
    """
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    exist = row < rows - first
    if D < BLOCK_D:
        exist = exist & (column < D)
    return ptr + tl.cast(first, tl.int64) * ROW + (row.to(tl.int64) * ROW + column), exist


@triton.jit
def _load_rows(
    ptr,
    first,
    rows,
    ROW: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tile [BLOCK, BLOCK_D] of a head's [rows, D], 0 where nothing exists."""
    places, exist = _row_places(ptr, first, rows, ROW, D, BLOCK, BLOCK_D)
    return tl.load(places, exist, 0.0)


@triton.jit
def _store_rows(
    ptr,
    x,
    first,
    rows,
    ROW: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Inverse of `_load_rows`."""
    places, exist = _row_places(ptr, first, rows, ROW, D, BLOCK, BLOCK_D)
    tl.store(places, x.to(ptr.dtype.element_ty), exist)


@triton.jit
def _fill(ptr, begin, end, value, program, programs):
    """`value` in elements `begin` to `end` of a flat array, by `programs` programs together."""
    for first in range(begin + program * 1024, end, programs * 1024):
        place = first + tl.arange(0, 1024)
        tl.store(ptr + place, tl.full((1024,), value, ptr.dtype.element_ty), place < end)


@triton.jit
def _load_numbers(ptr, row, queries, HEADS: tl.constexpr):
    """A head's numbers of the queries of a tile, from [queries, HEADS]; 0 where none exists."""
    return tl.load(ptr + row.to(tl.int64) * HEADS, row < queries, 0.0)


@triton.jit
def _store_numbers(ptr, x, row, queries, HEADS: tl.constexpr):
    tl.store(ptr + row.to(tl.int64) * HEADS, x, row < queries)


@triton.jit
def _finite(x):
    """0 in place of -inf: where no key is seen, weights are e^(-inf - 0) = 0."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _inverse(total):
    """1 / total; 1 where no key is seen, whose weights are 0."""
    return 1 / tl.where(total == 0, 1.0, total)


# A tile of pairs is (head, row, key, queries, keys, pitch): its head, the indices [BLOCK_M, 1] and
# [1, BLOCK_N] of its queries and keys, how many the molecule has, and the way from one query's
# pairs to the next one's in [pairs, HEADS].


@triton.jit
def _seen(tile, CAUSAL: tl.constexpr):
    """Which keys of a tile exist and are not hidden by causal: the last query sees all."""
    _, row, key, queries, keys, _ = tile
    seen = key < keys
    if CAUSAL:
        seen = seen & (key <= row + keys - queries)
    return seen


@triton.jit
def _pair_places(ptr, tile, HEADS: tl.constexpr):
    """Where a tile's pairs lie behind their molecule's first, and which of them exist."""
    head, row, key, queries, keys, pitch = tile
    return ptr + head + (row * pitch + key * HEADS), (row < queries) & (key < keys)


@triton.jit
def _add_pairs(x, ptr, tile, HEADS: tl.constexpr):
    """x of a tile and the numbers of its pairs, where there are any."""
    if ptr is not None:
        places, exist = _pair_places(ptr, tile, HEADS)
        x += tl.load(places, exist, 0.0).to(x.dtype)
    return x


@triton.jit
def _store_pairs(ptr, x, tile, HEADS: tl.constexpr):
    """x of a tile, where it is wanted."""
    if ptr is not None:
        places, exist = _pair_places(ptr, tile, HEADS)
        tl.store(places, x.to(ptr.dtype.element_ty), exist)


@triton.jit
def _mix(x):
    """A bijection of 32 bits in which every bit of the result depends on every bit of x."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _dropout(seed, tile, drop_below, keep_scale):
    """What dropout multiplies a tile of weights with: 0, or 1 / (1 - p)."""
    head, row, key, _, _, _ = tile
    bits = _mix(_mix(seed.to(tl.uint32)) + (seed >> 32).to(tl.uint32))
    bits = _mix(bits + head.to(tl.uint32))
    bits = _mix(_mix(bits + row.to(tl.uint32)) + key.to(tl.uint32))
    return tl.where(bits >= drop_below.to(tl.uint32), keep_scale, 0.0)


@triton.jit
def _product(a, b, ACC: tl.constexpr):
    return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def _row_products(a, b, SLICES: tl.constexpr, ACC: tl.constexpr):
    """a b^T in slices of the width of a head, one after the other's registers."""
    if SLICES == 1:
        return _product(a, tl.trans(b), ACC)
    else:
        WIDTH: tl.constexpr = a.shape[1] // SLICES
        a = tl.permute(tl.reshape(a, (a.shape[0], SLICES, WIDTH)), (1, 0, 2))
        b = tl.permute(tl.reshape(b, (b.shape[0], SLICES, WIDTH)), (1, 2, 0))
        return tl.sum(_product(a, b, ACC), 0)


@triton.jit
def _add_product(total, a, b, ACC: tl.constexpr):
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=ACC)


@triton.jit
def _logits(
    q,
    k,
    tile,
    scale,
    bias_ptr,
    HEADS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SLICES: tl.constexpr,
):
    """x of a tile, -inf where a key is not seen."""
    x = _row_products(q, k, SLICES, scale.dtype) * scale
    x = _add_pairs(x, bias_ptr, tile, HEADS)
    return tl.where(_seen(tile, CAUSAL), x, float("-inf"))


@triton.jit(do_not_specialize=["molecules", "rows", "pairs", "drop_below"])
def _forward_kernel(
    q_ptr,  # [rows, HEADS, D], Q_ROW from row to row, q_head from head to head
    k_ptr,  # [Tk, HEADS / GROUP, D], likewise
    v_ptr,
    bias_ptr,  # [pairs, HEADS], or None
    seed_ptr,  # [molecules] or [1], or None without dropout
    q_offsets_ptr,  # [molecules + 1]
    k_offsets_ptr,
    pair_offsets_ptr,  # likewise, or None without bias and scores
    out_ptr,  # [rows, HEADS, D]
    lse_ptr,  # [rows, HEADS]
    scores_ptr,  # [pairs, HEADS], or None
    q_head,
    k_head,
    v_head,
    molecules,
    rows,
    pairs,
    scale: tl.float64,
    drop_below,
    keep_scale: tl.float64,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    INDEX: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEED_PER_MOLECULE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOOP_N: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    if program >= molecules * HEADS:
        program -= molecules * HEADS
        programs = tl.num_programs(0) - molecules * HEADS
        used = tl.load(q_offsets_ptr + molecules).to(tl.int64) * HEADS
        end = rows.to(tl.int64) * HEADS
        _fill(out_ptr, used * D, end * D, 0.0, program, programs)
        _fill(lse_ptr, used, end, float("-inf"), program, programs)
        if scores_ptr is not None:
            used = tl.load(pair_offsets_ptr + molecules) * HEADS
            _fill(scores_ptr, used, pairs.to(tl.int64) * HEADS, 0.0, program, programs)
        return

    molecule = program // HEADS
    head = program % HEADS
    q_begin, queries = _bounds(q_offsets_ptr, molecule)
    k_begin, keys = _bounds(k_offsets_ptr, molecule)
    q_ptr += q_begin * Q_ROW + head.to(tl.int64) * q_head
    k_ptr += k_begin * K_ROW + (head // GROUP).to(tl.int64) * k_head
    v_ptr += k_begin * V_ROW + (head // GROUP).to(tl.int64) * v_head
    out_ptr += (q_begin * HEADS + head) * D
    lse_ptr += q_begin * HEADS + head
    if pair_offsets_ptr is not None:
        pair = tl.load(pair_offsets_ptr + molecule)
    if bias_ptr is not None:
        bias_ptr += pair * HEADS
    if scores_ptr is not None:
        scores_ptr += pair * HEADS
    seed = seed_ptr
    if seed_ptr is not None:
        seed = tl.load(seed_ptr + molecule if SEED_PER_MOLECULE else seed_ptr)
    pitch = keys.to(INDEX) * HEADS
    scale = tl.full((), scale, ACC)
    keep_scale = tl.full((), keep_scale, ACC)

    if (queries <= BLOCK_M) & (keys <= BLOCK_N):
        row = tl.arange(0, BLOCK_M)[:, None]
        key = tl.arange(0, BLOCK_N)[None, :]
        q = _load_rows(q_ptr, 0, queries, Q_ROW, D, BLOCK_M, BLOCK_D)
        k = _load_rows(k_ptr, 0, keys, K_ROW, D, BLOCK_N, BLOCK_D)
        v = _load_rows(v_ptr, 0, keys, V_ROW, D, BLOCK_N, BLOCK_D)
        tile = head, row, key, queries, keys, pitch
        x = _logits(q, k, tile, scale, bias_ptr, HEADS, CAUSAL, SLICES)
        _store_pairs(scores_ptr, x, tile, HEADS)
        top = tl.max(x, 1, keep_dims=True)
        p = tl.exp(x - _finite(top))
        total = tl.sum(p, 1, keep_dims=True)
        if seed_ptr is not None:
            p *= _dropout(seed, tile, drop_below, keep_scale)
        out = _product(p.to(v.dtype), v, ACC)
        out *= _inverse(total)
        _store_rows(out_ptr, out, 0, queries, HEADS * D, D, BLOCK_M, BLOCK_D)
        _store_numbers(lse_ptr, top + tl.log(total), row, queries, HEADS)
    else:
        for first in range(0, queries, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)[:, None]
            q = _load_rows(q_ptr, first, queries, Q_ROW, D, BLOCK_M, BLOCK_D)
            top = tl.full((BLOCK_M, 1), float("-inf"), ACC)
            total = tl.zeros((BLOCK_M, 1), ACC)
            out = tl.zeros((BLOCK_M, BLOCK_D), ACC)
            end = keys
            if CAUSAL and scores_ptr is None:
                end = tl.minimum(keys, first + BLOCK_M + keys - queries)
            for first_key in range(0, end, LOOP_N):
                key = first_key + tl.arange(0, LOOP_N)[None, :]
                k = _load_rows(k_ptr, first_key, keys, K_ROW, D, LOOP_N, BLOCK_D)
                v = _load_rows(v_ptr, first_key, keys, V_ROW, D, LOOP_N, BLOCK_D)
                tile = head, row, key, queries, keys, pitch
                x = _logits(q, k, tile, scale, bias_ptr, HEADS, CAUSAL, SLICES)
                _store_pairs(scores_ptr, x, tile, HEADS)
                higher = tl.maximum(top, tl.max(x, 1, keep_dims=True))
                shrink = tl.exp(top - _finite(higher))
                p = tl.exp(x - _finite(higher))
                total = total * shrink + tl.sum(p, 1, keep_dims=True)
                if seed_ptr is not None:
                    p *= _dropout(seed, tile, drop_below, keep_scale)
                out = _add_product(out * shrink, p.to(v.dtype), v, ACC)
                top = higher
            out *= _inverse(total)
            _store_rows(out_ptr, out, first, queries, HEADS * D, D, BLOCK_M, BLOCK_D)
            _store_numbers(lse_ptr, top + tl.log(total), row, queries, HEADS)


@triton.jit
def _of_head(ptr, head, stride):
    """Where a head's part of a tensor begins."""
    return ptr + head.to(tl.int64) * stride


@triton.jit
def _weight_grads(p, v, grad, tile, factors, seed, SLICES: tl.constexpr):
    """M P and dP of a tile."""
    scale, drop_below, keep_scale = factors
    kept = p
    dp = _row_products(grad, v, SLICES, scale.dtype)
    if seed is not None:
        m = _dropout(seed, tile, drop_below, keep_scale)
        kept = m * p
        dp = m * dp
    return kept, dp


@triton.jit
def _logit_grads(
    p,
    dp,
    shift,
    tile,
    grad_scores_ptr,
    dbias_ptr,
    HEADS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """dx of a tile, given delta - dlse of its queries; what of it is the bias's is stored."""
    dx = _add_pairs(p * (dp - shift), grad_scores_ptr, tile, HEADS)
    dx = tl.where(_seen(tile, CAUSAL), dx, 0.0)
    _store_pairs(dbias_ptr, dx, tile, HEADS)
    return dx


@triton.jit(do_not_specialize=["molecules", "rows", "key_rows", "pairs", "drop_below"])
def _backward_kernel(
    grad_ptr,  # [rows, HEADS, D], GRAD_ROW from row to row, grad_head from head to head
    grad_lse_ptr,  # [rows, HEADS], or None
    grad_scores_ptr,  # [pairs, HEADS], or None
    q_ptr,  # as grad
    k_ptr,  # [key_rows, HEADS / GROUP, D], likewise
    v_ptr,
    bias_ptr,  # [pairs, HEADS], or None
    seed_ptr,  # [molecules] or [1], or None without dropout
    lse_ptr,  # [rows, HEADS]
    q_offsets_ptr,  # [molecules + 1]
    k_offsets_ptr,
    pair_offsets_ptr,  # likewise, or None without bias and scores
    dq_ptr,  # [rows, HEADS, D]
    dk_ptr,  # [key_rows, HEADS / GROUP, D]
    dv_ptr,
    dbias_ptr,  # [pairs, HEADS], or None
    rows_ptr,  # [rows, 2, HEADS], what a program notes of the queries of molecules that fit no tile
    grad_head,
    q_head,
    k_head,
    v_head,
    molecules,
    rows,
    key_rows,
    pairs,
    scale: tl.float64,
    drop_below,
    keep_scale: tl.float64,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    GRAD_ROW: tl.constexpr,
    Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    INDEX: tl.constexpr,
    CAUSAL: tl.constexpr,
    SEED_PER_MOLECULE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOOP_N: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    KV_HEADS: tl.constexpr = HEADS // GROUP
    program = tl.program_id(0)
    if program >= molecules * KV_HEADS:
        program -= molecules * KV_HEADS
        programs = tl.num_programs(0) - molecules * KV_HEADS
        used = tl.load(q_offsets_ptr + molecules).to(tl.int64) * (HEADS * D)
        _fill(dq_ptr, used, rows.to(tl.int64) * (HEADS * D), 0.0, program, programs)
        used = tl.load(k_offsets_ptr + molecules).to(tl.int64) * (KV_HEADS * D)
        end = key_rows.to(tl.int64) * (KV_HEADS * D)
        _fill(dk_ptr, used, end, 0.0, program, programs)
        _fill(dv_ptr, used, end, 0.0, program, programs)
        if dbias_ptr is not None:
            used = tl.load(pair_offsets_ptr + molecules) * HEADS
            _fill(dbias_ptr, used, pairs.to(tl.int64) * HEADS, 0.0, program, programs)
        return

    molecule = program // KV_HEADS
    kv_head = program % KV_HEADS
    first_head = kv_head * GROUP
    q_begin, queries = _bounds(q_offsets_ptr, molecule)
    k_begin, keys = _bounds(k_offsets_ptr, molecule)
    grad_ptr += q_begin * GRAD_ROW
    q_ptr += q_begin * Q_ROW
    k_ptr += k_begin * K_ROW + kv_head.to(tl.int64) * k_head
    v_ptr += k_begin * V_ROW + kv_head.to(tl.int64) * v_head
    dq_ptr += q_begin * (HEADS * D)
    dk_ptr += (k_begin * KV_HEADS + kv_head) * D
    dv_ptr += (k_begin * KV_HEADS + kv_head) * D
    lse_ptr += q_begin * HEADS
    rows_ptr += q_begin * (2 * HEADS)
    if grad_lse_ptr is not None:
        grad_lse_ptr += q_begin * HEADS
    if pair_offsets_ptr is not None:
        pair = tl.load(pair_offsets_ptr + molecule)
    if grad_scores_ptr is not None:
        grad_scores_ptr += pair * HEADS
    if bias_ptr is not None:
        bias_ptr += pair * HEADS
        dbias_ptr += pair * HEADS
    pitch = keys.to(INDEX) * HEADS
    scale = tl.full((), scale, ACC)
    seed = seed_ptr
    if seed_ptr is not None:
        seed = tl.load(seed_ptr + molecule if SEED_PER_MOLECULE else seed_ptr)
    factors = scale, drop_below, tl.full((), keep_scale, ACC)
    if (GROUP == 1) & (queries <= BLOCK_M) & (keys <= BLOCK_N):
        head = kv_head
        row = tl.arange(0, BLOCK_M)[:, None]
        key = tl.arange(0, BLOCK_N)[None, :]
        q = _load_rows(_of_head(q_ptr, head, q_head), 0, queries, Q_ROW, D, BLOCK_M, BLOCK_D)
        k = _load_rows(k_ptr, 0, keys, K_ROW, D, BLOCK_N, BLOCK_D)
        grad = _of_head(grad_ptr, head, grad_head)
        grad = _load_rows(grad, 0, queries, GRAD_ROW, D, BLOCK_M, BLOCK_D)
        v = _load_rows(v_ptr, 0, keys, V_ROW, D, BLOCK_N, BLOCK_D)
        tile = head, row, key, queries, keys, pitch
        x = _logits(q, k, tile, scale, bias_ptr, HEADS, CAUSAL, SLICES)
        p = tl.exp(x - _finite(tl.max(x, 1, keep_dims=True)))
        p *= _inverse(tl.sum(p, 1, keep_dims=True))
        kept, dp = _weight_grads(p, v, grad, tile, factors, seed, SLICES)
        dv = _product(tl.trans(grad), kept.to(grad.dtype), ACC)
        _store_rows(dv_ptr, tl.trans(dv), 0, keys, KV_HEADS * D, D, BLOCK_N, BLOCK_D)
        shift = tl.sum(p * dp, 1, keep_dims=True)
        if grad_lse_ptr is not None:
            shift -= _load_numbers(grad_lse_ptr + head, row, queries, HEADS)
        dx = _logit_grads(p, dp, shift, tile, grad_scores_ptr, dbias_ptr, HEADS, CAUSAL).to(q.dtype)
        dk = _product(tl.trans(q), dx, ACC) * scale
        _store_rows(dk_ptr, tl.trans(dk), 0, keys, KV_HEADS * D, D, BLOCK_N, BLOCK_D)
        dq = _product(dx, k, ACC) * scale
        dq_ptr += head * D
        _store_rows(dq_ptr, dq, 0, queries, HEADS * D, D, BLOCK_M, BLOCK_D)
    else:
        for member in range(GROUP):
            head = first_head + member
            q_of_head = _of_head(q_ptr, head, q_head)
            grad_of_head = _of_head(grad_ptr, head, grad_head)
            for first in range(0, queries, BLOCK_M):
                row = first + tl.arange(0, BLOCK_M)[:, None]
                q = _load_rows(q_of_head, first, queries, Q_ROW, D, BLOCK_M, BLOCK_D)
                grad = _load_rows(grad_of_head, first, queries, GRAD_ROW, D, BLOCK_M, BLOCK_D)
                lse = _finite(_load_numbers(lse_ptr + head, row, queries, HEADS))
                total = tl.zeros((BLOCK_M, 1), ACC)
                shift = tl.zeros((BLOCK_M, 1), ACC)
                end = keys
                if CAUSAL:
                    end = tl.minimum(keys, first + BLOCK_M + keys - queries)
                for first_key in range(0, end, LOOP_N):
                    key = first_key + tl.arange(0, LOOP_N)[None, :]
                    k = _load_rows(k_ptr, first_key, keys, K_ROW, D, LOOP_N, BLOCK_D)
                    v = _load_rows(v_ptr, first_key, keys, V_ROW, D, LOOP_N, BLOCK_D)
                    tile = head, row, key, queries, keys, pitch
                    x = _logits(q, k, tile, scale, bias_ptr, HEADS, CAUSAL, SLICES)
                    p = tl.exp(x - lse)
                    kept, dp = _weight_grads(p, v, grad, tile, factors, seed, SLICES)
                    total += tl.sum(p, 1, keep_dims=True)
                    shift += tl.sum(p * dp, 1, keep_dims=True)
                share = _inverse(total)
                shift *= share
                if grad_lse_ptr is not None:
                    shift -= _load_numbers(grad_lse_ptr + head, row, queries, HEADS)
                _store_numbers(rows_ptr + head, share, row, queries, 2 * HEADS)
                _store_numbers(rows_ptr + HEADS + head, shift, row, queries, 2 * HEADS)

                dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
                if dbias_ptr is not None:
                    end = keys
                for first_key in range(0, end, LOOP_N):
                    key = first_key + tl.arange(0, LOOP_N)[None, :]
                    k = _load_rows(k_ptr, first_key, keys, K_ROW, D, LOOP_N, BLOCK_D)
                    v = _load_rows(v_ptr, first_key, keys, V_ROW, D, LOOP_N, BLOCK_D)
                    tile = head, row, key, queries, keys, pitch
                    x = _logits(q, k, tile, scale, bias_ptr, HEADS, CAUSAL, SLICES)
                    p = tl.exp(x - lse) * share
                    kept, dp = _weight_grads(p, v, grad, tile, factors, seed, SLICES)
                    dx = _logit_grads(
                        p, dp, shift, tile, grad_scores_ptr, dbias_ptr, HEADS, CAUSAL
                    ).to(q.dtype)
                    dq = _add_product(dq, dx, k, ACC)
                dq *= scale
                _store_rows(dq_ptr + head * D, dq, first, queries, HEADS * D, D, BLOCK_M, BLOCK_D)

        # Other threads of this program read what is noted of a query than wrote it.
        tl.debug_barrier()
        for first_key in range(0, keys, LOOP_N):
            key = first_key + tl.arange(0, LOOP_N)[None, :]
            k = _load_rows(k_ptr, first_key, keys, K_ROW, D, LOOP_N, BLOCK_D)
            v = _load_rows(v_ptr, first_key, keys, V_ROW, D, LOOP_N, BLOCK_D)
            dk = tl.zeros((BLOCK_D, LOOP_N), ACC)
            dv = tl.zeros((BLOCK_D, LOOP_N), ACC)
            begin = 0
            if CAUSAL:
                begin = tl.maximum(first_key + queries - keys, 0) // BLOCK_M * BLOCK_M
            for member in range(GROUP):
                head = first_head + member
                q_of_head = _of_head(q_ptr, head, q_head)
                grad_of_head = _of_head(grad_ptr, head, grad_head)
                for first in range(begin, queries, BLOCK_M):
                    row = first + tl.arange(0, BLOCK_M)[:, None]
                    q = _load_rows(q_of_head, first, queries, Q_ROW, D, BLOCK_M, BLOCK_D)
                    grad = _load_rows(grad_of_head, first, queries, GRAD_ROW, D, BLOCK_M, BLOCK_D)
                    lse = _finite(_load_numbers(lse_ptr + head, row, queries, HEADS))
                    share = _load_numbers(rows_ptr + head, row, queries, 2 * HEADS)
                    shift = _load_numbers(rows_ptr + HEADS + head, row, queries, 2 * HEADS)
                    tile = head, row, key, queries, keys, pitch
                    x = _logits(q, k, tile, scale, bias_ptr, HEADS, CAUSAL, SLICES)
                    p = tl.exp(x - lse) * share
                    kept, dp = _weight_grads(p, v, grad, tile, factors, seed, SLICES)
                    dv = _add_product(dv, tl.trans(grad), kept.to(grad.dtype), ACC)
                    dx = _logit_grads(p, dp, shift, tile, grad_scores_ptr, None, HEADS, CAUSAL).to(
                        q.dtype
                    )
                    dk = _add_product(dk, tl.trans(q), dx, ACC)
            dk = tl.trans(dk * scale)
            _store_rows(dk_ptr, dk, first_key, keys, KV_HEADS * D, D, LOOP_N, BLOCK_D)
            _store_rows(dv_ptr, tl.trans(dv), first_key, keys, KV_HEADS * D, D, LOOP_N, BLOCK_D)


@triton.jit(do_not_specialize=["molecules"])
def _pair_offsets_kernel(
    q_offsets_ptr,  # [molecules + 1]
    k_offsets_ptr,
    pair_offsets_ptr,  # [molecules + 1]
    molecules,
    BLOCK_B: tl.constexpr,
):
    """Where the pairs of every molecule begin, and where the last one's end."""
    before = tl.zeros((1,), tl.int64)
    for first in range(0, molecules + 1, BLOCK_B):
        molecule = first + tl.arange(0, BLOCK_B)
        exists = molecule < molecules
        queries = tl.load(q_offsets_ptr + molecule + 1, exists, 0) - tl.load(
            q_offsets_ptr + molecule, exists, 0
        )
        keys = tl.load(k_offsets_ptr + molecule + 1, exists, 0) - tl.load(
            k_offsets_ptr + molecule, exists, 0
        )
        count = queries.to(tl.int64) * keys.to(tl.int64)
        begin = before + tl.cumsum(count, 0) - count
        tl.store(pair_offsets_ptr + molecule, begin, molecule <= molecules)
        before += tl.sum(count, 0)


class Tiles(NamedTuple):
    """How a kernel cuts its work.

    Attributes:
        queries: of a tile.
        keys: of the tile of a molecule that fits one.
        loop_keys: of the tiles of one that does not.
        warps: of a program.
        slices: of the width of a head in q k^T; fewer numbers of a thread are in registers at once.
    """

    queries: int
    keys: int
    loop_keys: int
    warps: int
    slices: int = 1


# By bytes of a number and width of a head, rounded up to a power of two: plain, and with a bias,
# scores or dropout. Constants, so that a molecule has the same bits in every batch.
#
# They are chosen from what the compiled kernels need (registers, shared memory, no spills) and from
# arithmetic for an H200, not measured. Attention of 40 queries over 30 atoms, 64 wide in bfloat16,
# does 17 operations a byte and is bound by memory: a multiprocessor's share of 4.3 TB/s is 33 bytes
# a ns, a program reads and writes 18 KB (backward 31 KB) and most of its microseconds are waiting.
# 5 programs (backward 3) share a multiprocessor and wait together. Molecules up to 64 atoms fit a
# tile; tiles of loops are narrow because the accumulators of loops are what fills registers.
_FORWARD = {
    (2, 64): (Tiles(64, 64, 32, 4), Tiles(64, 32, 16, 4)),
    (2, 128): (Tiles(64, 64, 32, 4), Tiles(64, 32, 16, 4)),
    (2, 256): (Tiles(32, 32, 32, 8), Tiles(32, 32, 32, 8)),
    (4, 16): (Tiles(64, 32, 32, 4), Tiles(32, 32, 32, 4)),
    (4, 32): (Tiles(64, 32, 32, 8), Tiles(64, 32, 16, 8)),
    (4, 64): (Tiles(64, 32, 32, 8), Tiles(64, 32, 16, 8)),
    (4, 128): (Tiles(32, 32, 32, 8), Tiles(32, 32, 32, 8)),
    (4, 256): (Tiles(16, 16, 16, 8), Tiles(16, 16, 16, 8)),
    **{(8, d): (Tiles(16, 16, 16, 4), Tiles(16, 16, 16, 4)) for d in (16, 32, 64, 128)},
    (8, 256): (Tiles(16, 16, 16, 8), Tiles(16, 16, 16, 8)),
}
_BACKWARD = {
    (2, 64): (Tiles(64, 64, 32, 4), Tiles(64, 32, 16, 4)),
    (2, 128): (Tiles(32, 32, 16, 4), Tiles(32, 32, 16, 4)),
    (2, 256): (Tiles(16, 32, 16, 4), Tiles(16, 32, 16, 4)),
    (4, 16): (Tiles(64, 32, 16, 8), Tiles(32, 32, 16, 4)),
    (4, 32): (Tiles(64, 32, 16, 8), Tiles(32, 32, 16, 4, 2)),
    (4, 64): (Tiles(64, 32, 16, 8, 4), Tiles(32, 32, 16, 8, 4)),
    (4, 128): (Tiles(32, 32, 16, 8, 4), Tiles(16, 16, 16, 8, 4)),
    (4, 256): (Tiles(16, 16, 16, 8, 4), Tiles(16, 16, 16, 8, 4)),
    **{(8, d): (Tiles(16, 16, 16, 4), Tiles(16, 16, 16, 4)) for d in (16, 32)},
    (8, 64): (Tiles(16, 16, 16, 4), Tiles(16, 16, 16, 4, 4)),
    **{(8, d): (Tiles(16, 16, 16, 8, 4), Tiles(16, 16, 16, 8, 4)) for d in (128, 256)},
}


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Launch `_forward_kernel`."""
    return ragged_attention_general(
        q, k, v, None, None, q_offsets, k_offsets, causal, scale, 0.0, False
    )[:2]


def ragged_attention_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `_backward_kernel`."""
    return ragged_attention_general_bwd(
        grad, grad_lse, None, q, k, v, None, None, lse, q_offsets, k_offsets, causal, scale, 0.0
    )[:3]


def ragged_attention_general(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    return_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `_forward_kernel`, behind `_pair_offsets_kernel` where there are pairs."""
    q, k, v = map(_readable, (q, k, v))
    q_offsets, k_offsets = dense(q_offsets), dense(k_offsets)
    bias = None if bias is None else dense(bias)
    pair_offsets = None
    if bias is not None or return_scores:
        pair_offsets = _pair_offsets(q_offsets, k_offsets)
    if not return_scores:
        pairs = 0
    elif bias is not None:
        pairs = bias.shape[0]
    else:
        pairs = int(pair_offsets[-1])  # a size that only the offsets know: this call waits
    rows, heads = q.shape[:2]
    molecules = q_offsets.shape[0] - 1
    out = q.new_empty(q.shape)
    lse = q.new_empty(rows, heads, dtype=accumulation_dtype(q.dtype))
    scores = q.new_empty(pairs, heads)
    tail = tail_programs(max(out.numel(), scores.numel()), 1024)
    launch(
        _forward_kernel,
        (molecules * heads + tail,),
        *(q, k, v, bias, _seed(seed, dropout_p), q_offsets, k_offsets, pair_offsets),
        *(out, lse, scores if return_scores else None),
        *(q.stride(1), k.stride(1), v.stride(1)),
        *(molecules, rows, pairs),
        **_options(_FORWARD, q, k, v, pair_offsets is None, causal, scale, seed, dropout_p),
        INDEX=_index(bias, scores),
    )
    return out, lse, scores


def ragged_attention_general_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    grad_scores: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `_backward_kernel`, behind `_pair_offsets_kernel` where there are pairs."""
    grad, q, k, v = map(_readable, (grad, q, k, v))
    q_offsets, k_offsets, lse = dense(q_offsets), dense(k_offsets), dense(lse)
    grad_lse, grad_scores, bias = (
        None if x is None else dense(x) for x in (grad_lse, grad_scores, bias)
    )
    pair_offsets = None
    if bias is not None or grad_scores is not None:
        pair_offsets = _pair_offsets(q_offsets, k_offsets)
    rows, heads = q.shape[:2]
    key_rows, kv_heads = k.shape[:2]
    pairs = 0 if bias is None else bias.shape[0]
    molecules = q_offsets.shape[0] - 1
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dbias = q.new_empty(pairs, heads)
    tail = tail_programs(max(x.numel() for x in (dq, dk, dbias)), 1024)
    launch(
        _backward_kernel,
        (molecules * kv_heads + tail,),
        *(grad, grad_lse, grad_scores, q, k, v, bias, _seed(seed, dropout_p), lse),
        *(q_offsets, k_offsets, pair_offsets),
        *(dq, dk, dv, None if bias is None else dbias, lse.new_empty(rows, 2, heads)),
        *(grad.stride(1), q.stride(1)),
        *(k.stride(1), v.stride(1)),
        *(molecules, rows, key_rows, pairs),
        **_options(_BACKWARD, q, k, v, pair_offsets is None, causal, scale, seed, dropout_p),
        INDEX=_index(bias, grad_scores),
        GRAD_ROW=grad.stride(0),
    )
    return dq, dk, dv, dbias


def _pair_offsets(q_offsets: Tensor, k_offsets: Tensor) -> Tensor:
    out = q_offsets.new_empty(q_offsets.shape, dtype=torch.int64)
    molecules = out.shape[0] - 1
    launch(_pair_offsets_kernel, (1,), q_offsets, k_offsets, out, molecules, BLOCK_B=1024)
    return out


def _readable(x: Tensor) -> Tensor:
    """Heads of a packed projection are read in place, as long as a head's numbers are neighbours.

    Another alignment is another compiled kernel, which may sum in another order.
    """
    return x if x.stride(2) == 1 and x.data_ptr() % 16 == 0 else dense(x)


def _index(*pairs: Tensor | None) -> tl.dtype:
    """What counts pairs within a molecule: 64 bits cost registers, so only where it takes them."""
    return tl.int64 if any(x is not None and x.numel() >= 2**31 for x in pairs) else tl.int32


def _seed(seed: Tensor | None, dropout_p: float) -> Tensor | None:
    return dense(seed) if dropout_p > 0 else None


def _options(
    table: dict[tuple[int, int], tuple[Tiles, Tiles]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    no_pairs: bool,
    causal: bool,
    scale: float | None,
    seed: Tensor | None,
    dropout_p: float,
) -> dict[str, object]:
    """What both kernels take by name."""
    heads, width = q.shape[1:]
    if width > WIDEST_ON_GPU:
        raise ValueError(
            f"q must have shape [Tq, H, D] with D <= {WIDEST_ON_GPU} on a GPU, got {width}"
        )
    # Tensor cores take 64 at a time, the units of wider numbers one.
    block_d = max(64 if q.element_size() == 2 else 16, triton.next_power_of_2(width))
    plain, general = table[q.element_size(), block_d]
    tiles = plain if no_pairs and dropout_p == 0 else general
    return {
        "scale": 1 / math.sqrt(width) if scale is None else float(scale),
        "drop_below": int(dropout_p * 2**32),
        "keep_scale": 1 / (1 - dropout_p),
        "HEADS": heads,
        "GROUP": heads // k.shape[1],
        "D": width,
        "Q_ROW": q.stride(0),
        "K_ROW": k.stride(0),
        "V_ROW": v.stride(0),
        "CAUSAL": causal,
        "SEED_PER_MOLECULE": dropout_p > 0 and seed.numel() > 1,
        "ACC": accumulator(q.dtype),
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys,
        "LOOP_N": tiles.loop_keys,
        "SLICES": tiles.slices,
        "BLOCK_D": block_d,
        "num_warps": tiles.warps,
        "num_stages": 1,
    }


def configurations(device: torch.device, dtype: torch.dtype) -> Iterator[Configuration]:
    """Heads of every width that has tiles of its own; every option; 12 heads of 64 come last."""
    offsets, seed = (torch.zeros(n, dtype=torch.int64, device=device) for n in (2, 1))

    def calls(
        name: str, width: int, kv_heads: int = 12, causal: bool = False, pairs: bool = False
    ) -> Iterator[Configuration]:
        q, k = (torch.zeros(16, n, width, dtype=dtype, device=device) for n in (12, kv_heads))
        lse = q.new_zeros(16, 12, dtype=accumulation_dtype(dtype))
        bias = q.new_zeros(16, 12) if pairs else None
        operands = (q, k, k, bias, seed)
        options = (offsets, offsets, causal, None, 0.1)
        yield Configuration(name, ragged_attention_general, (*operands, *options, pairs))
        call = (q, lse, bias, *operands, lse, *options)
        yield Configuration(name, ragged_attention_general_bwd, call)
        if not pairs:
            yield Configuration(name, ragged_attention, (q, k, k, *options[:-1]))
            call = (q, None, q, k, k, lse, *options[:-1])
            yield Configuration(name, ragged_attention_bwd, call)

    yield from calls("causal-64", 64, causal=True)
    yield from calls("grouped-64", 64, kv_heads=4)
    widths = {width for size, width in _FORWARD if size == dtype.itemsize}
    for width in (*sorted(widths - {64}), 64):
        yield from calls(f"pairs-{width}", width, pairs=True)
        yield from calls(str(width), width)
