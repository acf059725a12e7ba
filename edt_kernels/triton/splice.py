"""Molecule tokens in their slots: a scan finds where rows come from, then every row is copied once.

Where a row of the output comes from is one number: -1 - t for token t, k for new row k, and the
number of new rows for the text itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from edt_kernels.triton.launch import Configuration, launch
from edt_kernels.triton.primitives import copy_rows, dense
from edt_kernels.triton.segment_pool import segment_pool
from edt_kernels.triton.sort_ids import sort_ids


@triton.jit(do_not_specialize=["rows", "length", "tokens", "added"])
def _scan_kernel(
    token_offsets_ptr,  # [rows + 1]
    slots_ptr,  # [rows, length]
    new_ids_ptr,  # [rows, length] or None
    sources_ptr,  # [rows, length]
    places_ptr,  # [tokens], where tokens go, or -1; or None
    rows,
    length,
    tokens,
    added,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_S)
    token = tl.load(token_offsets_ptr + row).to(tl.int64)
    end = tl.zeros((), tl.int64) + tokens
    if row < rows:
        end = tl.load(token_offsets_ptr + row + 1).to(tl.int64)
        for first in range(0, length, BLOCK_S):
            exists = first + lane < length
            place = row * length + first + lane
            slot = tl.load(slots_ptr + place, exists, 0) != 0
            counted = tl.cumsum(slot.to(tl.int32), 0)
            taken = token + counted - 1
            filled = slot & (taken < end)
            source = tl.zeros_like(place) + added
            if new_ids_ptr is not None:
                new_id = tl.load(new_ids_ptr + place, exists, -1)
                is_new = (slot == 0) & (new_id >= 0) & (new_id < added)
                source = tl.where(is_new, new_id, source)
            tl.store(sources_ptr + place, tl.where(filled, -1 - taken, source), exists)
            if places_ptr is not None:
                tl.store(places_ptr + taken, place, filled)
            token += tl.sum(slot.to(tl.int32), 0)
    if places_ptr is not None:
        # Tokens that found no slot: those of the tail, and of rows with too few slots.
        for first in range(token, end, BLOCK_S):
            tl.store(places_ptr + first + lane, -1, first + lane < end)


@triton.jit(do_not_specialize=["positions", "tokens", "added"])
def _splice_kernel(
    embeds_ptr,  # [positions, width]
    tokens_ptr,  # [tokens, width]
    new_rows_ptr,  # [added, width] or None
    sources_ptr,  # [positions]
    out_ptr,  # [positions, width]
    positions,
    tokens,
    added,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = place < positions
    source = tl.load(sources_ptr + place, exists, added)
    token = -1 - source
    is_token = (token >= 0) & (token < tokens)
    kept = exists & (source == added)
    for column in range(0, width, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        known = (columns < width)[None, :]
        from_text = embeds_ptr + place[:, None] * width + columns[None, :]
        x = tl.load(from_text, kept[:, None] & known, 0.0)
        from_token = tokens_ptr + token[:, None] * width + columns[None, :]
        x = tl.where(is_token[:, None], tl.load(from_token, is_token[:, None] & known, 0.0), x)
        if new_rows_ptr is not None:
            is_new = ((source >= 0) & (source < added))[:, None]
            from_new = new_rows_ptr + source[:, None] * width + columns[None, :]
            x = tl.where(is_new, tl.load(from_new, is_new & known, 0.0), x)
        out = out_ptr + place[:, None] * width + columns[None, :]
        tl.store(out, x, exists[:, None] & known)


@triton.jit(do_not_specialize=["positions", "added"])
def _text_bwd_kernel(
    grad_ptr,  # [positions, width]
    sources_ptr,  # [positions]
    out_ptr,  # [positions, width]
    positions,
    added,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = place < positions
    kept = exists & (tl.load(sources_ptr + place, exists, 0) == added)
    copy_rows(grad_ptr, place, kept, out_ptr, place, exists, width, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["tokens"])
def _tokens_bwd_kernel(
    grad_ptr,  # [positions, width]
    places_ptr,  # [tokens]
    out_ptr,  # [tokens, width]
    tokens,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = token < tokens
    place = tl.load(places_ptr + token, exists, -1)
    copy_rows(grad_ptr, place, place >= 0, out_ptr, token, exists, width, BLOCK_N, BLOCK_D)


def _scan(
    token_offsets: Tensor,
    slots: Tensor,
    new_ids: Tensor | None,
    tokens: int,
    added: int,
    with_places: bool,
) -> tuple[Tensor, Tensor | None]:
    """Where every position comes from, and where every token goes if that is wanted."""
    rows = token_offsets.shape[0] - 1
    length = slots.numel() // rows if rows else 0
    sources = token_offsets.new_empty(slots.numel(), dtype=torch.int64)
    places = sources.new_empty(tokens) if with_places else None
    launch(
        _scan_kernel,
        (rows + (1 if with_places else 0),),
        *(dense(token_offsets), dense(slots), None if new_ids is None else dense(new_ids)),
        *(sources, places, rows, length, tokens, added),
        BLOCK_S=1024 if length <= 1024 else 2048,
        num_warps=4 if length <= 1024 else 8,
    )
    return sources, places


def splice(
    embeds: Tensor,
    tokens: Tensor,
    token_offsets: Tensor,
    slots: Tensor,
    new_rows: Tensor | None,
    new_ids: Tensor | None,
) -> Tensor:
    """Launch `_scan_kernel`, then `_splice_kernel`."""
    out = embeds.new_empty(embeds.shape)
    added = 0 if new_rows is None else new_rows.shape[0]
    count, width = slots.numel(), embeds.shape[-1]
    sources, _ = _scan(token_offsets, slots, new_ids, tokens.shape[0], added, False)
    block = _tile(width)
    launch(
        _splice_kernel,
        (triton.cdiv(count, block["BLOCK_N"]),),
        *(dense(embeds), dense(tokens), None if new_rows is None else dense(new_rows)),
        *(sources, out, count, tokens.shape[0], added, width),
        **block,
    )
    return out


def splice_bwd(
    grad: Tensor,
    token_offsets: Tensor,
    slots: Tensor,
    new_ids: Tensor | None,
    tokens: int,
    added: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `_scan_kernel`, then per gradient its kernel; new rows are summed in order."""
    grad, width = dense(grad), grad.shape[-1]
    sources, places = _scan(token_offsets, slots, new_ids, tokens, added, wanted[1])
    block = _tile(width)
    of_embeds = of_tokens = of_new_rows = grad.new_empty(0)
    if wanted[0]:
        of_embeds = grad.new_empty(grad.shape)
        grid = (triton.cdiv(len(sources), block["BLOCK_N"]),)
        arguments = (grad, sources, of_embeds, len(sources), added, width)
        launch(_text_bwd_kernel, grid, *arguments, **block)
    if wanted[1]:
        of_tokens = grad.new_empty(tokens, width)
        grid = (triton.cdiv(tokens, block["BLOCK_N"]),)
        launch(_tokens_bwd_kernel, grid, grad, places, of_tokens, tokens, width, **block)
    if wanted[2]:
        order, offsets = sort_ids(sources, added)
        of_new_rows = segment_pool(grad.view(-1, width), offsets, order, None, False)
    return of_embeds, of_tokens, of_new_rows


def _tile(width: int) -> dict[str, int]:
    """Rows of a program and the columns that it copies at a time."""
    columns = min(512, triton.next_power_of_2(max(width, 1)))
    return {"BLOCK_N": min(128, 2048 // columns), "BLOCK_D": columns, "num_warps": 4}


def configurations(device: torch.device, dtype: torch.dtype) -> Iterator[Configuration]:
    """Embeddings of a language model, short and long rows, with and without new rows."""
    offsets = torch.zeros(2, dtype=torch.int64, device=device)
    tokens = torch.zeros(16, 512, dtype=dtype, device=device)
    for length in (16, 1040):
        embeds = torch.zeros(1, length, 512, dtype=dtype, device=device)
        slots = torch.zeros(1, length, dtype=torch.bool, device=device)
        for kind, rows, ids in (("", None, None), ("-new", tokens, slots.long() - 1)):
            name, new = f"{length}x512{kind}", rows is not None
            yield Configuration(name, splice, (embeds, tokens, offsets, slots, rows, ids))
            call = (embeds, offsets, slots, ids, 16, 16 * new, (True, True, new))
            yield Configuration(name, splice_bwd, call)
