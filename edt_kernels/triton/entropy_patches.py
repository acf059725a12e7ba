"""From logits to patches: where a row fits a block, the program that cuts a molecule reads them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from edt_kernels.triton.entropy import empty_rows, entropy, entropy_of_rows, tile
from edt_kernels.triton.find_patches import BLOCK, Cut, cut_molecule, find_patches
from edt_kernels.triton.launch import Configuration, launch
from edt_kernels.triton.primitives import accumulator, dense, tail_programs, zero_rows


@triton.jit(do_not_specialize=["rows", "molecules", "min_size", "max_size", "max_patches"])
def _entropy_cut_kernel(
    logits_ptr,  # [rows, width]
    offsets_ptr,  # [molecules + 1]
    h_ptr,  # [rows]
    top_ptr,  # [rows]
    log_total_ptr,  # [rows]
    ids_ptr,  # [rows]
    opens_ptr,  # [rows]
    counts_ptr,  # [molecules]
    threshold_ptr,  # [molecules]
    rows,
    molecules,
    width,
    scale: tl.float64,
    level: tl.float64,
    min_size,
    max_size,
    max_patches,
    RULE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_CUT: tl.constexpr,
):
    molecule = tl.program_id(0).to(tl.int64)
    if molecule >= molecules:
        tail = tl.load(offsets_ptr + molecules).to(tl.int64)
        programs = tl.num_programs(0) - molecules
        program = molecule - molecules
        zero_rows(h_ptr, tail, rows, 1, program, programs, 0, BLOCK_CUT, 1)
        zero_rows(top_ptr, tail, rows, 1, program, programs, 0, BLOCK_CUT, 1)
        zero_rows(log_total_ptr, tail, rows, 1, program, programs, 0, BLOCK_CUT, 1)
        return
    begin = tl.load(offsets_ptr + molecule).to(tl.int64)
    end = tl.load(offsets_ptr + molecule + 1).to(tl.int64)
    for first in range(begin, end, BLOCK_N):
        row = first + tl.arange(0, BLOCK_N)
        exists = row < end
        h, top, log_total = entropy_of_rows(
            logits_ptr, row, exists, width, scale, ACC, BLOCK_N, BLOCK_V
        )
        tl.store(h_ptr + row, h, exists)
        tl.store(top_ptr + row, top, exists)
        tl.store(log_total_ptr + row, log_total, exists)
    tl.debug_barrier()  # every thread sees the entropies
    patches, threshold = cut_molecule(
        *(h_ptr, begin, end, level, ids_ptr, opens_ptr, min_size, max_size, max_patches),
        *(RULE, ACC, BLOCK_CUT),
    )
    tl.store(counts_ptr + molecule, patches)
    tl.store(threshold_ptr + molecule, threshold)


def entropy_patches(
    logits: Tensor,
    offsets: Tensor,
    scale: float,
    rule: int,
    level: float,
    min_size: int,
    max_size: int | None,
    max_patches: int | None,
    capacity: int,
) -> tuple[Tensor, ...]:
    """Launch `_entropy_cut_kernel`, then number the patches; for long rows three launches."""
    rows, width = logits.shape
    if width > 1024:
        h, top, log_total = entropy(logits, scale, offsets)
        limits = (min_size, max_size, max_patches, capacity)
        return h, top, log_total, *find_patches(h, offsets, rule, level, *limits)
    h, top, log_total = empty_rows(logits)
    cut = Cut(logits, offsets, capacity)
    molecules = cut.counts.shape[0]
    launch(
        _entropy_cut_kernel,
        (molecules + tail_programs(rows, BLOCK),),
        *(dense(logits), cut.offsets, h, top, log_total),
        *(cut.ids, cut.opens, cut.counts, cut.threshold),
        *(rows, molecules, width, scale, level),
        *(None if min_size == 1 else min_size, max_size, max_patches),
        RULE=int(rule),
        ACC=accumulator(logits.dtype),
        BLOCK_CUT=BLOCK,
        **tile(width, logits.dtype),
    )
    return h, top, log_total, *cut.numbered()


def configurations(device: torch.device, dtype: torch.dtype) -> Iterator[Configuration]:
    """Every rule with a vocabulary of atoms, and that of a language model."""
    offsets = torch.zeros(2, dtype=torch.int64, device=device)
    for rule, width in ((0, 38), (1, 38), (2, 38), (3, 38), (0, 32000)):
        logits = torch.zeros(2, width, dtype=dtype, device=device)
        call = (logits, offsets, 1.0, rule, 0.75, 1, None, None, 2)
        yield Configuration(f"{width}-rule{rule}", entropy_patches, call)
