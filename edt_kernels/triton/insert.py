"""Groups of tokens between the rows of packed text: every output row finds where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from edt_kernels.triton.launch import Configuration, launch
from edt_kernels.triton.primitives import copy_rows, count_at_most, dense

IGNORED = tl.constexpr(-100)
"""The label that torch's losses leave out."""


@triton.jit(do_not_specialize=["text_rows", "groups", "steps"])
def _offsets_kernel(
    embed_offsets_ptr,  # [text_rows + 1]
    token_offsets_ptr,  # [groups + 1]
    at_ptr,  # [groups], or None where rows are given
    rows_ptr,  # [groups] or None
    out_ptr,  # [text_rows + 1]
    text_rows,
    groups,
    steps,
    BLOCK_N: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = index <= text_rows
    begin = tl.load(embed_offsets_ptr + index, exists, 0).to(tl.int64)
    if rows_ptr is None:
        # A group belongs to the last row that begins at or before its place.
        before = count_at_most(at_ptr, groups, begin - 1, steps)
        before = tl.where(index == text_rows, groups, before)
    else:
        before = count_at_most(rows_ptr, groups, index - 1, steps)
    inserted = tl.load(token_offsets_ptr + before, exists, 0)
    tl.store(out_ptr + index, begin + inserted, exists)


@triton.jit
def _groups_at(at_ptr, token_offsets_ptr, groups, place, steps):
    """How many groups begin at or before places of the output, a block."""
    low = tl.zeros_like(place)
    high = low + groups
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        begin = tl.load(at_ptr + middle, searching, 0)
        begin += tl.load(token_offsets_ptr + middle, searching, 0)
        counts = searching & (begin <= place)
        low = tl.where(counts, middle + 1, low)
        high = tl.where(searching & (counts == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["rows", "tokens", "text_rows", "groups", "row_steps", "group_steps"])
def _insert_kernel(
    embeds_ptr,  # [rows, width]
    tokens_ptr,  # [tokens, width]
    token_offsets_ptr,  # [groups + 1]
    at_ptr,  # [groups]
    offsets_ptr,  # [text_rows + 1], of the output
    labels_ptr,  # [rows] or None
    out_ptr,  # [rows + tokens, width]
    positions_ptr,  # [rows + tokens]
    out_labels_ptr,  # [rows + tokens], unless labels_ptr is None
    rows,
    tokens,
    text_rows,
    groups,
    row_steps,
    group_steps,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = place < tl.zeros_like(place) + rows + tokens
    inside = place < tl.load(offsets_ptr + text_rows)

    # Behind the group before it a row is a token of it, or the text that follows.
    before = _groups_at(at_ptr, token_offsets_ptr, groups, place, group_steps)
    some = inside & (before > 0)
    token = place - tl.load(at_ptr + before - 1, some, 0)
    inserted = tl.load(token_offsets_ptr + before, some, 0).to(tl.int64)
    is_token = some & (token < inserted)
    text = place - inserted
    is_text = inside & (is_token == 0)

    row = count_at_most(offsets_ptr, text_rows + 1, place, row_steps) - 1
    begin = tl.load(offsets_ptr + row, inside, 0).to(tl.int64)
    tl.store(positions_ptr + place, tl.where(inside, place - begin, 0), exists)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + text, is_text & (text < rows), IGNORED)
        tl.store(out_labels_ptr + place, tl.where(is_text, label, IGNORED), exists)

    for column in range(0, width, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        known = (columns < width)[None, :]
        of_text = (is_text & (text >= 0) & (text < rows))[:, None] & known
        of_token = (is_token & (token >= 0) & (token < tokens))[:, None] & known
        x = tl.load(embeds_ptr + text[:, None] * width + columns[None, :], of_text, 0.0)
        y = tl.load(tokens_ptr + token[:, None] * width + columns[None, :], of_token, 0.0)
        out = out_ptr + place[:, None] * width + columns[None, :]
        tl.store(out, tl.where(is_token[:, None], y, x), exists[:, None] & known)


@triton.jit(do_not_specialize=["rows", "capacity", "text_rows", "groups", "steps"])
def _text_bwd_kernel(
    grad_ptr,  # [capacity, width]
    embed_offsets_ptr,  # [text_rows + 1]
    token_offsets_ptr,  # [groups + 1]
    at_ptr,  # [groups]
    out_ptr,  # [rows, width]
    rows,
    capacity,
    text_rows,
    groups,
    steps,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < tl.load(embed_offsets_ptr + text_rows)
    before = count_at_most(at_ptr, groups, row, steps)
    place = row + tl.load(token_offsets_ptr + before, inside, 0)
    found = inside & (place >= 0) & (place < capacity)
    copy_rows(grad_ptr, place, found, out_ptr, row, row < rows, width, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "capacity", "groups", "steps"])
def _tokens_bwd_kernel(
    grad_ptr,  # [capacity, width]
    token_offsets_ptr,  # [groups + 1]
    at_ptr,  # [groups]
    out_ptr,  # [tokens, width]
    tokens,
    capacity,
    groups,
    steps,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = token < tl.load(token_offsets_ptr + groups)
    group = count_at_most(token_offsets_ptr, groups + 1, token, steps) - 1
    place = token + tl.load(at_ptr + group, inside, 0)
    found = inside & (place >= 0) & (place < capacity)
    copy_rows(grad_ptr, place, found, out_ptr, token, token < tokens, width, BLOCK_N, BLOCK_D)


def insert(
    embeds: Tensor,
    embed_offsets: Tensor,
    tokens: Tensor,
    token_offsets: Tensor,
    at: Tensor,
    rows: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch `_offsets_kernel`, then `_insert_kernel`."""
    capacity, width = embeds.shape[0] + tokens.shape[0], embeds.shape[1]
    out = embeds.new_empty(capacity, width)
    offsets = embed_offsets.new_empty(embed_offsets.shape)
    positions = at.new_empty(capacity)
    targets = at.new_empty(0 if labels is None else capacity)
    text_rows, groups = embed_offsets.shape[0] - 1, at.shape[0]
    token_offsets, at = dense(token_offsets), dense(at)
    launch(
        _offsets_kernel,
        (triton.cdiv(text_rows + 1, 128),),
        *(dense(embed_offsets), token_offsets),
        *((at, None) if rows is None else (None, dense(rows))),
        offsets,
        *(text_rows, groups, groups.bit_length()),
        BLOCK_N=128,
        num_warps=4,
    )
    block = _tile(width)
    launch(
        _insert_kernel,
        (triton.cdiv(capacity, block["BLOCK_N"]),),
        *(dense(embeds), dense(tokens), token_offsets, at, offsets),
        *((None, out, positions, None) if labels is None else (dense(labels), out, positions)),
        *(() if labels is None else (targets,)),
        *(embeds.shape[0], tokens.shape[0], text_rows, groups),
        *((text_rows + 1).bit_length(), groups.bit_length(), width),
        **block,
    )
    return out, offsets, positions, targets


def insert_bwd(
    grad: Tensor,
    embed_offsets: Tensor,
    token_offsets: Tensor,
    at: Tensor,
    rows: int,
    tokens: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Launch `_text_bwd_kernel` and `_tokens_bwd_kernel`, as wanted."""
    width, groups = grad.shape[1], at.shape[0]
    text_rows, block = embed_offsets.shape[0] - 1, _tile(width)
    grad, token_offsets, at = dense(grad), dense(token_offsets), dense(at)
    of_text, of_tokens = (
        grad.new_empty((count, width) if want else (0,))
        for count, want in zip((rows, tokens), wanted, strict=True)
    )
    if wanted[0]:
        launch(
            _text_bwd_kernel,
            (triton.cdiv(rows, block["BLOCK_N"]),),
            *(grad, dense(embed_offsets), token_offsets, at, of_text),
            *(rows, rows + tokens, text_rows, groups, groups.bit_length(), width),
            **block,
        )
    if wanted[1]:
        launch(
            _tokens_bwd_kernel,
            (triton.cdiv(tokens, block["BLOCK_N"]),),
            *(grad, token_offsets, at, of_tokens),
            *(tokens, rows + tokens, groups, (groups + 1).bit_length(), width),
            **block,
        )
    return of_text, of_tokens


def _tile(width: int) -> dict[str, int]:
    """Rows of a program and the columns that it copies at a time."""
    columns = min(512, triton.next_power_of_2(max(width, 1)))
    return {"BLOCK_N": min(128, 2048 // columns), "BLOCK_D": columns, "num_warps": 4}


def configurations(device: torch.device, dtype: torch.dtype) -> Iterator[Configuration]:
    """Embeddings of a language model, with and without rows and labels."""
    offsets, at = (torch.zeros(n, dtype=torch.int64, device=device) for n in (2, 1))
    labels = torch.zeros(16, dtype=torch.int64, device=device)
    rows = torch.zeros(16, 512, dtype=dtype, device=device)
    grad = torch.zeros(32, 512, dtype=dtype, device=device)
    call = (rows, offsets, rows, offsets, at)
    yield Configuration("512", insert, (*call, None, None))
    yield Configuration("512-rows-labels", insert, (*call, at, labels))
    call = (grad, offsets, offsets, at, 16, 16, (True, True))
    yield Configuration("512", insert_bwd, call)
