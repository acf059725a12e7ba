"""Cutting molecules into patches: one program cuts a molecule, then the patches are numbered."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from edt_kernels.triton.launch import Configuration, launch
from edt_kernels.triton.primitives import accumulator, dense, tail_programs

# As `edt_kernels.reference.find_patches.Rule` numbers them.
LOCAL_MAX = tl.constexpr(0)
RISING_EDGE = tl.constexpr(1)
THRESHOLD = tl.constexpr(2)

BLOCK = 128  # atoms that a program looks at at a time
GROUP = 64  # molecules whose patches one program numbers


@triton.jit
def _look(entropy_ptr, atom, begin, end, ACC: tl.constexpr):
    """Entropies of atoms, NaN outside the molecule."""
    inside = (atom >= begin) & (atom < end)
    return tl.load(entropy_ptr + atom, inside, float("nan")).to(ACC)


@triton.jit
def _candidates(entropy_ptr, opens_ptr, atom, begin, end, BACK: tl.constexpr, ACC: tl.constexpr):
    """Entropies to choose from, and which exist.

    Those of all atoms; or with `opens_ptr` those that decided boundaries, BACK atoms before them,
    where NaN ranks last.
    """
    if opens_ptr is None:
        return _look(entropy_ptr, atom, begin, end, ACC), atom < end
    else:
        h = _look(entropy_ptr, atom - BACK, begin, end, ACC)
        valid = tl.load(opens_ptr + atom, atom < end, 0) != 0
        return tl.where(h == h, h, float("-inf")), valid


@triton.jit
def _select(
    entropy_ptr,
    opens_ptr,
    begin,
    end,
    k,
    BACK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The k-th smallest candidate, counted from 0; there are more than k, and none is NaN.

    Four bits at a time of the unsigned integers that are ordered as the floats are.
    """
    BITS: tl.constexpr = ACC.primitive_bitwidth
    KEY: tl.constexpr = tl.uint64 if BITS == 64 else tl.uint32
    top = tl.full((), 1, KEY) << (BITS - 1)
    chosen = tl.full((), 0, KEY)
    for step in range(BITS // 4):
        shift = tl.full((), BITS - 4 - 4 * step, KEY)
        trial = chosen | (tl.arange(0, 16).to(KEY) << shift)
        smaller = tl.zeros((16,), tl.int32)
        for first in range(begin, end, BLOCK_N):
            atom = first + tl.arange(0, BLOCK_N)
            h, valid = _candidates(entropy_ptr, opens_ptr, atom, begin, end, BACK, ACC)
            bits = h.to(KEY, bitcast=True)
            key = tl.where(bits >= top, ~bits, bits | top)
            counts = valid[:, None] & (key[:, None] < trial[None, :])
            smaller += tl.sum(counts.to(tl.int32), 0)
        digit = tl.sum((smaller <= k).to(tl.int32), 0) - 1
        chosen = chosen | (digit.to(KEY) << shift)
    bits = tl.where(chosen >= top, chosen ^ top, ~chosen)
    return bits.to(ACC, bitcast=True)


@triton.jit
def _quantile(entropy_ptr, begin, end, q, ACC: tl.constexpr, BLOCK_N: tl.constexpr):
    """`torch.quantile` of the entropies of a molecule that has atoms."""
    unknown = tl.zeros((), tl.int32)
    for first in range(begin, end, BLOCK_N):
        atom = first + tl.arange(0, BLOCK_N)
        h = _look(entropy_ptr, atom, begin, end, ACC)
        unknown += tl.sum(((atom < end) & (h != h)).to(tl.int32), 0)
    rank = q * (end - begin - 1).to(ACC)
    # The number of atoms may round up.
    below = tl.minimum(rank.to(tl.int64), end - begin - 1)
    above = below + (rank > below.to(ACC)).to(tl.int64)
    low = _select(entropy_ptr, None, begin, end, below, 0, ACC, BLOCK_N)

    at_most = tl.zeros((), tl.int64)
    following = tl.full((), float("inf"), ACC)
    for first in range(begin, end, BLOCK_N):
        h = _look(entropy_ptr, first + tl.arange(0, BLOCK_N), begin, end, ACC)
        at_most += tl.sum((h <= low).to(tl.int64), 0)
        following = tl.minimum(following, tl.min(tl.where(h > low, h, float("inf")), 0))
    high = tl.where(above < at_most, low, following)
    weight = rank - below.to(ACC)
    near_low = tl.fma(weight, high - low, low)
    near_high = tl.fma(weight - 1.0, high - low, high)
    value = tl.where(weight < 0.5, near_low, near_high)
    return tl.where(unknown > 0, float("nan"), value)


@triton.jit
def _opens(entropy_ptr, atom, begin, end, threshold, RULE: tl.constexpr, ACC: tl.constexpr):
    """Which atoms open a patch by the rule alone; the first of the molecule is none of them."""
    h = _look(entropy_ptr, atom, begin, end, ACC)
    before = _look(entropy_ptr, atom - 1, begin, end, ACC)
    if RULE == LOCAL_MAX:
        rises = h > before
        following = atom + 1
        beyond = _look(entropy_ptr, following, begin, end, ACC)
        plateau = rises & (beyond == h)
        while tl.max(plateau.to(tl.int32), 0) > 0:
            following += plateau.to(tl.int64)
            beyond = _look(entropy_ptr, following, begin, end, ACC)
            plateau = plateau & (beyond == h)
        return rises & ((beyond < h) | (following >= end))
    elif RULE == RISING_EDGE:
        earlier = _look(entropy_ptr, atom - 2, begin, end, ACC)
        return (before > threshold) & ((earlier > threshold) == 0) & (atom < end)
    elif RULE == THRESHOLD:
        return (h > threshold) & (atom > begin)
    else:
        return h - before > threshold


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def cut_molecule(
    entropy_ptr,
    begin,
    end,
    level,
    ids_ptr,
    opens_ptr,
    min_size,
    max_size,
    max_patches,
    RULE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Cut the atoms `begin` to `end`: their ids, which open a patch, how many do, the threshold.

    Limits may be None.
    """
    BACK: tl.constexpr = 1 if RULE == RISING_EDGE else 0  # the edge lies before its boundary
    level = tl.full((), level, tl.float64).to(ACC)
    threshold = level
    if RULE == LOCAL_MAX:
        threshold = tl.full((), float("nan"), ACC)
    if RULE == RISING_EDGE:
        threshold = tl.full((), float("nan"), ACC)
        if begin < end:
            threshold = _quantile(entropy_ptr, begin, end, level, ACC, BLOCK_N)

    last = begin  # the last boundary that min_size kept
    start = begin  # the last patch so far, for max_size
    patches = tl.zeros((), tl.int64)
    for first in range(begin, end, BLOCK_N):
        atom = first + tl.arange(0, BLOCK_N)
        opens = _opens(entropy_ptr, atom, begin, end, threshold, RULE, ACC)
        if min_size is not None:
            # From left to right, the next boundary that is far enough.
            kept = tl.zeros((BLOCK_N,), tl.int32)
            following = tl.min(tl.where(opens & (atom - last >= min_size), atom, end), 0)
            while following < end:
                kept += (atom == following).to(tl.int32)
                last = following
                following = tl.min(tl.where(opens & (atom - last >= min_size), atom, end), 0)
            opens = kept > 0
        if max_size is not None:
            starts = tl.associative_scan(tl.where(opens, atom, start), 0, _larger)
            starts = tl.maximum(starts, start)
            opens = (atom > begin) & (atom < end) & ((atom - starts) % max_size == 0)
            start = tl.max(starts, 0)
        if max_patches is None:
            opens = opens | (atom == begin)
            number = patches + tl.cumsum(opens.to(tl.int32), 0) - 1
            tl.store(ids_ptr + atom, number, atom < end)
        tl.store(opens_ptr + atom, opens.to(tl.int8), atom < end)
        patches += tl.sum(opens.to(tl.int32), 0)
    if max_patches is not None:
        patches = _keep_highest(
            *(entropy_ptr, begin, end, patches, ids_ptr, opens_ptr, max_patches),
            *(BACK, ACC, BLOCK_N),
        )
    return patches, threshold


@triton.jit
def _keep_highest(
    entropy_ptr,
    begin,
    end,
    boundaries,
    ids_ptr,
    opens_ptr,
    max_patches,
    BACK: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keep the boundaries that the highest entropies decided, of equals the first."""
    tl.debug_barrier()  # every thread sees which atoms open
    keep = max_patches - 1
    # Those above `lowest` stay, and as many that equal it, the first, as there is room for.
    lowest = tl.full((), float("-inf"), ACC)
    room = boundaries
    if boundaries > keep:
        lowest = tl.full((), float("inf"), ACC)
        room = keep.to(tl.int64)
        if keep > 0:
            lowest = _select(
                entropy_ptr, opens_ptr, begin, end, boundaries - keep, BACK, ACC, BLOCK_N
            )
        for first in range(begin, end, BLOCK_N):
            atom = first + tl.arange(0, BLOCK_N)
            h, valid = _candidates(entropy_ptr, opens_ptr, atom, begin, end, BACK, ACC)
            room -= tl.sum((valid & (h > lowest)).to(tl.int64), 0)

    patches = tl.zeros((), tl.int64)
    for first in range(begin, end, BLOCK_N):
        atom = first + tl.arange(0, BLOCK_N)
        h, valid = _candidates(entropy_ptr, opens_ptr, atom, begin, end, BACK, ACC)
        equal = (valid & (h == lowest)).to(tl.int32)
        opens = valid & ((h > lowest) | ((equal > 0) & (tl.cumsum(equal, 0) <= room)))
        room -= tl.sum(equal, 0)
        opens = opens | (atom == begin)
        number = patches + tl.cumsum(opens.to(tl.int32), 0) - 1
        tl.store(ids_ptr + atom, number, atom < end)
        tl.store(opens_ptr + atom, opens.to(tl.int8), atom < end)
        patches += tl.sum(opens.to(tl.int32), 0)
    return patches


@triton.jit(do_not_specialize=["min_size", "max_size", "max_patches"])
def _cut_kernel(
    entropy_ptr,  # [rows]
    offsets_ptr,  # [molecules + 1]
    ids_ptr,  # [rows]
    opens_ptr,  # [rows]
    counts_ptr,  # [molecules]
    threshold_ptr,  # [molecules]
    level: tl.float64,
    min_size,
    max_size,
    max_patches,
    RULE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    molecule = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + molecule).to(tl.int64)
    end = tl.load(offsets_ptr + molecule + 1).to(tl.int64)
    patches, threshold = cut_molecule(
        *(entropy_ptr, begin, end, level, ids_ptr, opens_ptr, min_size, max_size, max_patches),
        *(RULE, ACC, BLOCK_N),
    )
    tl.store(counts_ptr + molecule, patches)
    tl.store(threshold_ptr + molecule, threshold)


@triton.jit
def _patches_before(counts_ptr, molecule):
    """Patches of the molecules before one."""
    total = tl.zeros((1024,), tl.int64)
    for first in range(0, molecule, 1024):
        index = first + tl.arange(0, 1024)
        total += tl.load(counts_ptr + index, index < molecule, 0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["rows", "molecules", "capacity"])
def _number_kernel(
    offsets_ptr,  # [molecules + 1]
    counts_ptr,  # [molecules]
    opens_ptr,  # [rows]
    ids_ptr,  # [rows]
    atom_offsets_ptr,  # [capacity + 1]
    patch_offsets_ptr,  # [molecules + 1]
    count_ptr,  # []
    rows,
    molecules,
    capacity,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    groups = tl.cdiv(molecules, GROUP)
    lane = tl.arange(0, BLOCK_N)
    if group < groups:
        patch = _patches_before(counts_ptr, group * GROUP)
        molecule = group * GROUP + tl.arange(0, GROUP)
        own = tl.load(counts_ptr + molecule, molecule < molecules, 0)
        before = patch + tl.cumsum(own, 0) - own
        tl.store(patch_offsets_ptr + molecule, before, molecule < molecules)
        begin = tl.load(offsets_ptr + group * GROUP).to(tl.int64)
        end = tl.load(offsets_ptr + tl.minimum((group + 1) * GROUP, molecules)).to(tl.int64)
        for first in range(begin, end, BLOCK_N):
            atom = first + lane
            opens = tl.load(opens_ptr + atom, atom < end, 0).to(tl.int32)
            place = patch + tl.cumsum(opens, 0) - 1
            tl.store(atom_offsets_ptr + place, atom, (opens > 0) & (place < capacity))
            patch += tl.sum(opens, 0)
    else:
        # What stands behind the last patch and the last atom.
        total = _patches_before(counts_ptr, molecules)
        end = tl.load(offsets_ptr + molecules).to(tl.int64)
        program = group - groups
        programs = tl.num_programs(0) - groups
        if program == 0:
            tl.store(patch_offsets_ptr + molecules, total)
            tl.store(count_ptr, total)
        for first in range(total + program * BLOCK_N, capacity + 1, programs * BLOCK_N):
            place = first + lane
            tl.store(atom_offsets_ptr + place, end, place <= capacity)
        for first in range(end + program * BLOCK_N, rows, programs * BLOCK_N):
            tl.store(ids_ptr + first + lane, 0, first + lane < rows)


class Cut:
    """Outputs of a cut, and how they are made once molecules are cut."""

    def __init__(self, like: Tensor, offsets: Tensor, capacity: int):
        rows, molecules = like.shape[0], offsets.shape[0] - 1
        wide = torch.promote_types(like.dtype, torch.float32)
        self.offsets, self.capacity = dense(offsets), capacity
        self.ids = like.new_empty(rows, dtype=torch.int64)
        self.opens = like.new_empty(rows, dtype=torch.int8)
        self.counts = like.new_empty(molecules, dtype=torch.int64)
        self.threshold = like.new_empty(molecules, dtype=wide)

    def numbered(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Launch `_number_kernel` and return what `find_patches` returns."""
        rows, molecules = self.ids.shape[0], self.counts.shape[0]
        atom_offsets = self.ids.new_empty(self.capacity + 1)
        patch_offsets, count = self.ids.new_empty(molecules + 1), self.ids.new_empty(())
        tail = max(1, tail_programs(rows + self.capacity, 1024))
        launch(
            _number_kernel,
            (triton.cdiv(molecules, GROUP) + tail,),
            *(self.offsets, self.counts, self.opens),
            *(self.ids, atom_offsets, patch_offsets, count),
            *(rows, molecules, self.capacity),
            GROUP=GROUP,
            BLOCK_N=1024,
            num_warps=4,
        )
        return self.ids, atom_offsets, patch_offsets, count, self.threshold


def find_patches(
    entropy: Tensor,
    offsets: Tensor,
    rule: int,
    level: float,
    min_size: int,
    max_size: int | None,
    max_patches: int | None,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch `_cut_kernel`, then `_number_kernel`."""
    cut = Cut(entropy, offsets, capacity)
    launch(
        _cut_kernel,
        (cut.counts.shape[0],),
        *(dense(entropy), cut.offsets, cut.ids, cut.opens, cut.counts, cut.threshold),
        *(level, None if min_size == 1 else min_size, max_size, max_patches),
        RULE=int(rule),
        ACC=accumulator(entropy.dtype),
        BLOCK_N=BLOCK,
        num_warps=4,
    )
    return cut.numbered()


def configurations(device: torch.device, dtype: torch.dtype) -> Iterator[Configuration]:
    """Every rule, without limits and with all."""
    offsets = torch.zeros(2, dtype=torch.int64, device=device)
    entropy = torch.zeros(16, dtype=dtype, device=device)
    for rule in range(4):
        for limits in ((1, None, None), (2, 5, 4)):
            name = f"rule{rule}{'-limits' * (limits[0] > 1)}"
            call = (entropy, offsets, rule, 0.75, *limits, 16)
            yield Configuration(name, find_patches, call)
