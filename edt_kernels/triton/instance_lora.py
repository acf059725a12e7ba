"""Low-rank adapters of every molecule: rows are shrunk to the rank, then expanded beside the base.

Blocks of rows do not cross molecules. How many blocks a molecule has only the offsets know, so
there are slots for them: those of molecule m begin at offsets[m] // BLOCK_N + m, which leaves room
for its blocks whatever its rows, and a program finds its molecule by bisection. A step of decoding
has one row per molecule, so the width of the input is cut into spans, each a program of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from edt_kernels.reference.entropy import accumulation_dtype
from edt_kernels.triton.launch import Configuration, launch
from edt_kernels.triton.primitives import (
    accumulator,
    dense,
    precision,
    tail_programs,
    zero_rows,
)

SPAN = 1024  # columns of the input that a program multiplies


@triton.jit
def _block_of(slot, offsets_ptr, molecules, steps, BLOCK_N: tl.constexpr):
    """The molecule of a slot, the first row of its block, and the end of the molecule's rows.

    `steps` is the bit length of `molecules`. A slot without rows begins at or behind the end.
    """
    low = slot * 0
    high = low + molecules
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        begins = tl.load(offsets_ptr + middle).to(tl.int64) // BLOCK_N + middle <= slot
        low = tl.where(searching & begins, middle + 1, low)
        high = tl.where(searching & (begins == 0), middle, high)
    molecule = low - 1
    begin = tl.load(offsets_ptr + molecule).to(tl.int64)
    end = tl.load(offsets_ptr + molecule + 1).to(tl.int64)
    return molecule, begin + (slot - begin // BLOCK_N - molecule) * BLOCK_N, end


@triton.jit
def _shrink_rows(
    x_ptr,  # [rows, width]
    down_ptr,  # [width, rank]
    out_ptr,  # [rows, rank] of a span
    row,
    exists,
    begin,
    end,
    width,
    rank,
    r,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    total = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    for first in range(begin, tl.minimum(end, width), BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        from_x = x_ptr + row[:, None] * width + k[None, :]
        x = tl.load(from_x, exists[:, None] & (k < width)[None, :], 0.0)
        from_down = down_ptr + k[:, None] * rank + r[None, :]
        d = tl.load(from_down, (k < width)[:, None] & (r < rank)[None, :], 0.0)
        total = tl.dot(x, d, total, input_precision=PRECISION, out_dtype=ACC)
    place = row[:, None] * rank + r[None, :]
    tl.store(out_ptr + place, total, exists[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["rows", "molecules", "steps"])
def _shrink_kernel(
    xs,  # by layer, [rows, width]
    downs,  # [width, rank] for every molecule, or one for all
    outs,  # [spans, rows, rank]
    widths,
    ranks,
    offsets_ptr,  # [molecules + 1]
    rows,
    molecules,
    steps,
    PER_MOLECULE: tl.constexpr,
    RANKS: tl.constexpr,  # blocks of a rank
    SPAN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    molecule, first, end = _block_of(slot, offsets_ptr, molecules, steps, BLOCK_N)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_N)
    span = (tl.program_id(1) // RANKS).to(tl.int64)
    r = tl.program_id(1) % RANKS * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = tl.program_id(1) // RANKS * SPAN
    own = molecule if PER_MOLECULE else molecule * 0
    for k in tl.static_range(len(xs)):
        if tl.program_id(2) == k:
            _shrink_rows(
                *(xs[k], downs[k] + own * widths[k] * ranks[k], outs[k] + span * rows * ranks[k]),
                *(row, row < end, begin, begin + SPAN, widths[k], ranks[k], r),
                *(ACC, PRECISION, BLOCK_N, BLOCK_R, BLOCK_K),
            )


@triton.jit
def _sum_spans(
    parts_ptr,  # [spans, rows, rank]
    row,
    exists,
    r,
    rows,
    rank,
    SPANS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rows that were shrunk [BLOCK_N, BLOCK_R], and where they stand in [rows, rank]."""
    place = row[:, None] * rank + r[None, :]
    inside = exists[:, None] & (r < rank)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    for span in tl.static_range(SPANS):
        total += tl.load(parts_ptr + rows * rank * span + place, inside, 0.0)
    return total, place, inside


@triton.jit
def _expand_rows(
    parts_ptr,  # [spans, rows, rank]
    up_ptr,  # [width, rank]
    base_ptr,  # [rows, width] or None
    out_ptr,  # [rows, width]
    row,
    exists,
    column,
    rows,
    width,
    rank,
    scale: tl.float64,
    RANKS: tl.constexpr,
    SPANS: tl.constexpr,
    FACTOR: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = column + tl.arange(0, BLOCK_D)
    less = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for block in tl.static_range(RANKS):
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        shrunk, _, _ = _sum_spans(
            parts_ptr, row, exists, r, rows, rank, SPANS, ACC, BLOCK_N, BLOCK_R
        )
        shrunk = shrunk * tl.full((), -scale, ACC)
        from_up = up_ptr + columns[None, :] * rank + r[:, None]
        u = tl.load(from_up, (r < rank)[:, None] & (columns < width)[None, :], 0.0)
        less = tl.dot(
            shrunk.to(FACTOR), u.to(FACTOR), less, input_precision=PRECISION, out_dtype=ACC
        )
    place = row[:, None] * width + columns[None, :]
    inside = exists[:, None] & (columns < width)[None, :]
    # A sum of products with zeros is +0, and base - 0 is the base, also where that is -0.
    base = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    if base_ptr is not None:
        base = tl.load(base_ptr + place, inside, 0.0).to(ACC)
    tl.store(out_ptr + place, (base - less).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _copy_tail(
    base_ptr,  # [rows, width] or None
    out_ptr,  # [rows, width]
    begin,
    rows,
    width,
    program,
    programs,
    column,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows `begin` to `rows`, which have no adapter; shared by `programs`."""
    if base_ptr is None:
        zero_rows(out_ptr, begin, rows, width, program, programs, column, BLOCK_N, BLOCK_D)
    else:
        columns = column + tl.arange(0, BLOCK_D)
        for first in range(begin + program * BLOCK_N, rows, programs * BLOCK_N):
            row = first + tl.arange(0, BLOCK_N)
            place = row[:, None].to(tl.int64) * width + columns[None, :]
            inside = (row < rows)[:, None] & (columns < width)[None, :]
            tl.store(out_ptr + place, tl.load(base_ptr + place, inside, 0.0), inside)


@triton.jit(do_not_specialize=["rows", "molecules", "steps", "slots"])
def _expand_kernel(
    parts,  # by layer, [spans, rows, rank]
    ups,  # [width, rank] for every molecule, or one for all
    bases,  # [rows, width] or None
    outs,  # [rows, width]
    shrunks,  # [rows, rank], or None for all layers
    widths,
    ranks,
    offsets_ptr,  # [molecules + 1]
    rows,
    molecules,
    steps,
    slots,
    scale: tl.float64,
    PER_MOLECULE: tl.constexpr,
    RANKS: tl.constexpr,
    SPANS: tl.constexpr,
    FACTOR: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D
    if slot >= slots:
        tail = tl.load(offsets_ptr + molecules).to(tl.int64)
        program, programs = slot - slots, tl.num_programs(0) - slots
        for k in tl.static_range(len(outs)):
            if tl.program_id(2) == k:
                _copy_tail(
                    *(bases[k], outs[k], tail, rows, widths[k], program, programs, column),
                    *(BLOCK_N, BLOCK_D),
                )
                if shrunks is not None:  # by the programs of the first columns
                    begin = tl.where(column == 0, tail, rows)
                    for block in tl.static_range(RANKS):
                        zero_rows(
                            *(shrunks[k], begin, rows, ranks[k], program, programs),
                            *(block * BLOCK_R, BLOCK_N, BLOCK_R),
                        )
        return
    molecule, first, end = _block_of(slot, offsets_ptr, molecules, steps, BLOCK_N)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_N)
    own = molecule if PER_MOLECULE else molecule * 0
    for k in tl.static_range(len(outs)):
        if tl.program_id(2) == k:
            if column < widths[k]:
                _expand_rows(
                    *(parts[k], ups[k] + own * widths[k] * ranks[k], bases[k], outs[k]),
                    *(row, row < end, column, rows, widths[k], ranks[k], scale),
                    *(RANKS, SPANS, FACTOR, ACC, PRECISION, BLOCK_N, BLOCK_R, BLOCK_D),
                )
            if shrunks is not None:
                stored = row < tl.where(column == 0, end, first)
                for block in tl.static_range(RANKS):
                    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
                    shrunk, place, inside = _sum_spans(
                        *(parts[k], row, stored, r, rows, ranks[k], SPANS, ACC, BLOCK_N, BLOCK_R)
                    )
                    tl.store(shrunks[k] + place, shrunk, inside)


@triton.jit(do_not_specialize=["molecules", "part_rows"])
def _outer_kernel(
    left_ptr,  # [rows, width]
    right_ptr,  # [rows, rank]
    out_ptr,  # [molecules, width, rank], or [parts, width, rank] for parts of all rows
    offsets_ptr,  # [molecules + 1]
    molecules,
    part_rows,
    width,
    rank,
    scale: tl.float64,
    PER_MOLECULE: tl.constexpr,
    FACTOR: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if PER_MOLECULE:
        begin = tl.load(offsets_ptr + part).to(tl.int64)
        end = tl.load(offsets_ptr + part + 1).to(tl.int64)
    else:
        begin = part * part_rows
        end = tl.minimum(begin + part_rows, tl.load(offsets_ptr + molecules).to(tl.int64))
    total = tl.zeros((BLOCK_D, BLOCK_R), ACC)
    for first in range(begin, end, BLOCK_K):
        row = first + tl.arange(0, BLOCK_K)
        from_left = left_ptr + row[None, :] * width + columns[:, None]
        x = tl.load(from_left, (row < end)[None, :] & (columns < width)[:, None], 0.0)
        from_right = right_ptr + row[:, None] * rank + r[None, :]
        u = tl.load(from_right, (row < end)[:, None] & (r < rank)[None, :], 0.0)
        total = tl.dot(x.to(FACTOR), u.to(FACTOR), total, input_precision=PRECISION, out_dtype=ACC)
    total = total * tl.full((), scale, ACC)
    place = (part * width + columns)[:, None] * rank + r[None, :]
    inside = (columns < width)[:, None] & (r < rank)[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), inside)


def instance_lora(
    x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, scale: float, base: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch `_shrink_kernel` and `_expand_kernel`."""
    shrunk = _sums(x, a.shape[2])
    (out,) = _adapt([x], [a], [b], offsets, scale, [base], shrunk=shrunk)
    return out, shrunk


def instance_lora_many(
    x: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    offsets: Tensor,
    scale: float,
    base: Sequence[Tensor | None],
) -> list[Tensor]:
    """Launch `_shrink_kernel` and `_expand_kernel`, each once for all layers."""
    return _adapt(x, a, b, offsets, scale, base)


def instance_lora_bwd(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    shrunk: Tensor,
    offsets: Tensor,
    scale: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels of the forward with A and B exchanged, and `_outer_kernel`."""
    dx = x.new_empty(0, x.shape[-1])
    of_a, of_b = a.new_empty(0, *a.shape[1:]), b.new_empty(0, b.shape[1])
    grad, x, offsets = dense(grad), dense(x), dense(offsets)
    if need_x or need_a:
        u = _sums(x, a.shape[2])
        (expanded,) = _adapt([grad], [b], [a], offsets, scale, [None], shrunk=u)
        dx = expanded if need_x else dx
    if need_a:
        of_a = a.new_empty(a.shape)
        _outer(x, u, of_a, offsets, scale, per_molecule=True)
    if need_b:
        rows = math.prod(x.shape[:-1])
        parts, part_rows = _parts(rows, *b.shape)
        sums = b.new_empty(parts, *b.shape, dtype=accumulation_dtype(b.dtype))
        _outer(grad, dense(shrunk), sums, offsets, scale, per_molecule=False, part_rows=part_rows)
        of_b = sums.sum(0).to(b.dtype)
    return dx, of_a, of_b


def _adapt(
    xs: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    offsets: Tensor,
    scale: float,
    bases: Sequence[Tensor | None],
    shrunk: Tensor | None = None,
) -> list[Tensor]:
    """base + scale (x D) U^T of every layer; the one of D and U that has three dimensions is the
    molecules' own. `shrunk` receives x D."""
    rows, molecules = math.prod(xs[0].shape[:-1]), offsets.shape[0] - 1
    outs = [x.new_empty(*x.shape[:-1], up.shape[-2]) for x, up in zip(xs, ups, strict=True)]
    if rows == 0:
        return outs
    dtype = xs[0].dtype
    ins, widths = ([x.shape[-1] for x in of] for of in (xs, outs))
    ranks = [down.shape[-1] for down in downs]
    block, ranked = _tile(dtype), _rank_tile(max(ranks), dtype)
    spans, blocks = triton.cdiv(max(ins), SPAN), triton.cdiv(max(ranks), ranked["BLOCK_R"])
    columns, depth = block.pop("BLOCK_D"), block.pop("BLOCK_K")
    parts = tuple(
        x.new_empty(spans, rows, rank, dtype=accumulation_dtype(dtype))
        for x, rank in zip(xs, ranks, strict=True)
    )
    slots = rows // block["BLOCK_N"] + molecules if molecules else 0
    offsets, steps = dense(offsets), molecules.bit_length()
    shared = {"ACC": accumulator(dtype), "PRECISION": precision(dtype), "RANKS": blocks}
    if slots:
        launch(
            _shrink_kernel,
            (slots, spans * blocks, len(xs)),
            *(tuple(map(dense, xs)), tuple(map(dense, downs)), parts, tuple(ins), tuple(ranks)),
            *(offsets, rows, molecules, steps),
            PER_MOLECULE=downs[0].dim() == 3,
            SPAN=SPAN,
            BLOCK_K=depth,
            **shared,
            **ranked,
            **block,
        )
    launch(
        _expand_kernel,
        (slots + tail_programs(rows, block["BLOCK_N"]), _blocks(max(widths), columns), len(xs)),
        *(parts, tuple(map(dense, ups))),
        tuple(None if base is None else dense(base) for base in bases),
        *(tuple(outs), None if shrunk is None else (shrunk,), tuple(widths), tuple(ranks)),
        *(offsets, rows, molecules, steps, slots, scale),
        PER_MOLECULE=ups[0].dim() == 3,
        SPANS=spans,
        FACTOR=_factor(dtype),
        BLOCK_D=columns,
        **shared,
        **ranked,
        **block,
    )
    return outs


def _outer(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    offsets: Tensor,
    scale: float,
    *,
    per_molecule: bool,
    part_rows: int = 0,
) -> None:
    """out [.., width, rank] = scale left^T right, over the rows of every molecule or part."""
    if out.numel() == 0:
        return
    _, width, rank = out.shape
    ranked, block = _rank_tile(rank, left.dtype), _tile(left.dtype)
    launch(
        _outer_kernel,
        (out.shape[0], _blocks(width, block["BLOCK_N"]), _blocks(rank, ranked["BLOCK_R"])),
        *(left, right, out, dense(offsets), offsets.shape[0] - 1, part_rows, width, rank, scale),
        PER_MOLECULE=per_molecule,
        FACTOR=_factor(left.dtype),
        ACC=accumulator(left.dtype),
        PRECISION=precision(left.dtype),
        BLOCK_D=block["BLOCK_N"],
        BLOCK_K=block["BLOCK_K"],
        num_warps=block["num_warps"],
        **ranked,
    )


def _parts(rows: int, width: int, rank: int) -> tuple[int, int]:
    """Into how many parts all rows fall for the gradient of B, which are summed in order, and
    their size; as many as keep a GPU busy."""
    programs = triton.cdiv(width, 64) * triton.cdiv(rank, 64)
    parts = max(1, min(256 // max(programs, 1), rows // 256))
    return parts, triton.cdiv(triton.cdiv(rows, parts), 32) * 32


def _sums(x: Tensor, rank: int) -> Tensor:
    """Room for the rows of x [..., d_in] shrunk to the rank."""
    return x.new_empty(math.prod(x.shape[:-1]), rank, dtype=accumulation_dtype(x.dtype))


def _blocks(width: int, block: int) -> int:
    return max(1, triton.cdiv(width, block))


def _factor(dtype: torch.dtype) -> tl.dtype:
    """What sums are multiplied as; in float16 small gradients would vanish."""
    if dtype == torch.bfloat16:
        return tl.bfloat16
    return accumulator(dtype)


def _tile(dtype: torch.dtype) -> dict[str, int]:
    """Rows, columns and depth of a product."""
    rows, columns, depth = 64, 128, 64
    if dtype == torch.float64:
        rows, columns, depth = 16, 32, 16
    elif dtype != torch.bfloat16:
        rows, columns, depth = 32, 64, 32
    return {"BLOCK_N": rows, "BLOCK_D": columns, "BLOCK_K": depth, "num_warps": 4}


def _rank_tile(rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Columns of a rank; float32, multiplied exactly, would not fit the registers with more."""
    most = 64 if dtype == torch.bfloat16 else 32
    return {"BLOCK_R": min(most, max(16, triton.next_power_of_2(rank)))}


def configurations(device: torch.device, dtype: torch.dtype) -> Iterator[Configuration]:
    """Layers of a language model at two ranks, with and without a base, and q, k, v at once."""
    offsets = torch.zeros(2, dtype=torch.int64, device=device)
    for rank in (16,) if dtype == torch.float64 else (16, 64):
        x = torch.zeros(16, 2048, dtype=dtype, device=device)
        a = torch.zeros(1, 2048, rank, dtype=dtype, device=device)
        b = torch.zeros(1024, rank, dtype=dtype, device=device)
        base = torch.zeros(16, 1024, dtype=dtype, device=device)
        shrunk = _sums(x, rank)
        call = (x, a, b, offsets, 1.0)
        yield Configuration(f"r={rank}", instance_lora, (*call, base))
        yield Configuration(f"r={rank}-no-base", instance_lora, (*call, None))
        backward = (base, x, a, b, shrunk, offsets, 1.0, True, True, True)
        yield Configuration(f"r={rank}", instance_lora_bwd, backward)
        layers = ([x] * 3, [a] * 3, [b] * 3, offsets, 1.0, [base] * 3)
        yield Configuration(f"r={rank}-qkv", instance_lora_many, layers)
