"""Molecules cut into patches where the next atom was hard to predict."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from edt_kernels import _check, reference
from edt_kernels._library import define, kernel_checks
from edt_kernels.reference.entropy import accumulation_dtype
from edt_kernels.reference.find_patches import Rule

# Plain ints: the dispatcher takes 0.8 us longer to read an IntEnum.
LOCAL_MAX, RISING_EDGE, THRESHOLD, MONOTONIC = map(int, Rule)
RULES = {
    "local_max": LOCAL_MAX,
    "rising_edge": RISING_EDGE,
    "published": RISING_EDGE,
    "threshold": THRESHOLD,
    "monotonic": MONOTONIC,
}
PUBLISHED_Q = 0.75


class Patches(NamedTuple):
    """A batch of molecules cut into patches.

    Attributes:
        ids: [N] int64, the patch of every atom, counted from 0 within its molecule; 0 in the tail.
        atom_offsets: [P + 1] int64, where in the packed atoms each patch starts. P is a capacity
            that shapes and options decide; patches beyond `count` are empty, at the last offset.
        patch_offsets: [B + 1] int64, the patches of every molecule.
        count: 0-d int64, the number of patches that exist.
        order: None where every patch is a contiguous run of atoms; otherwise [N] int64, the atoms
            patch by patch, which `atom_offsets` then counts.
        threshold: [B], the entropy that the rule compared with, NaN where there is none.
    """

    ids: Tensor
    atom_offsets: Tensor
    patch_offsets: Tensor
    count: Tensor
    order: Tensor | None
    threshold: Tensor

    def trim(self) -> Patches:
        """The same with exactly `count + 1` entries in `atom_offsets`; on a GPU this waits."""
        return self._replace(atom_offsets=self.atom_offsets[: int(self.count) + 1])


class Options(NamedTuple):
    """The checked options of a cut, as the ops take them."""

    rule: int
    level: float
    min_size: int
    max_size: int | None
    max_patches: int | None

    def capacity(self, rows: int, molecules: int) -> int:
        """The most patches that `rows` atoms in `molecules` molecules can give."""
        rule, level, min_size, max_size, max_patches = self
        most = rows
        if rule in (LOCAL_MAX, RISING_EDGE):
            most = min(most, molecules + rows // 2)
        if rule == RISING_EDGE:
            # Strictly above the quantile lie at most ceil((1 - q)(L - 1)) of L atoms; rounding
            # of the rank can add one.
            share = math.ceil((1 - level) * 65536)
            most = min(most, 2 * molecules + rows * share // 65536)
        if min_size > 1:
            most = min(most, molecules + rows // min_size)
        if max_size is not None:
            most = min(rows, most + rows // max_size)
        if max_patches is not None:
            most = min(most, molecules * max_patches)
        return most


def options(
    rule: str,
    q: float,
    threshold: float | None,
    min_size: int,
    max_size: int | None,
    max_patches: int | None,
) -> Options:
    """Check the options of a cut against each other."""
    _check.choice("rule", rule, tuple(RULES))
    _check.number("q", q)
    _check.number("min_size", min_size, whole=True)
    if threshold is not None:
        _check.number("threshold", threshold)
    for name, value in (("max_size", max_size), ("max_patches", max_patches)):
        if value is not None:
            _check.number(name, value, whole=True)
    if q != PUBLISHED_Q and rule != "rising_edge":
        raise ValueError(f"q belongs to rule 'rising_edge', got q={q!r} with rule {rule!r}")
    if not 0 <= q <= 1:
        raise ValueError(f"q must lie in [0, 1], got {q!r}")
    absolute = rule in ("threshold", "monotonic")
    if absolute and threshold is None:
        raise ValueError(f"rule {rule!r} requires a threshold, got None")
    if absolute and math.isnan(threshold):
        raise ValueError("threshold must be a number, got nan")
    if threshold is not None and not absolute:
        raise ValueError(
            f"threshold belongs to the rules 'threshold' and 'monotonic', got threshold="
            f"{threshold!r} with rule {rule!r}"
        )
    if min_size < 1:
        raise ValueError(f"min_size must be at least 1, got {min_size}")
    if max_size is not None and max_size < min_size:
        raise ValueError(f"max_size must be at least min_size = {min_size}, got {max_size}")
    if max_patches is not None and max_patches < 1:
        raise ValueError(f"max_patches must be at least 1, got {max_patches}")
    level = threshold if absolute else q
    return Options(RULES[rule], level, min_size, max_size, max_patches)


known_options = lru_cache(maxsize=256)(options)


def empty_patches(like: Tensor, offsets: Tensor, capacity: int) -> tuple[Tensor, ...]:
    """Outputs of the right shapes for entropies like `like` [N]."""
    return (
        like.new_empty(like.shape, dtype=torch.int64),
        like.new_empty((capacity + 1,), dtype=torch.int64),
        like.new_empty(offsets.shape, dtype=torch.int64),
        like.new_empty((), dtype=torch.int64),
        like.new_empty((offsets.shape[0] - 1,), dtype=accumulation_dtype(like.dtype)),
    )


def _fake(entropy, offsets, rule, level, min_size, max_size, max_patches, capacity):
    return empty_patches(entropy, offsets, capacity)


SCHEMA = "int rule, float level, int min_size, int? max_size, int? max_patches, SymInt capacity"
_find_patches = define(
    f"find_patches(Tensor entropy, Tensor offsets, {SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.find_patches,
    fake=_fake,
    triton="find_patches:find_patches",
)


def find_patches(
    entropy: Tensor,
    offsets: Tensor,
    *,
    rule: str = "local_max",
    q: float = 0.75,
    threshold: float | None = None,
    min_size: int = 1,
    max_size: int | None = None,
    max_patches: int | None = None,
) -> Patches:
    """Cut every molecule into patches of consecutive atoms.

    H_i is the uncertainty of atom i given the atoms before it. The first atom of a molecule always
    opens a patch; further patches open by `rule`:

    - "local_max": at every peak, H_(i-1) < H_i >= H_(i+1). A run of equal values peaks at its first
      atom when the values on both sides are lower; the last atom needs only the left side.
    - "rising_edge": after every atom that exceeds the q-quantile of its molecule while the atom
      before it does not. The quantile is `torch.quantile`'s, linearly interpolated.
    - "published": "rising_edge" with q = 0.75, as EDT-Former (arXiv:2602.02742) runs it; hand it
      the n uncertainties *after* each atom, the last one that of the end of the sequence.
    - "threshold": at every atom with H_i > threshold.
    - "monotonic": at every atom with H_i - H_(i-1) > threshold, as the Byte Latent Transformer
      (arXiv:2412.09871).

    No comparison with NaN holds, so a NaN opens no patch (and makes a quantile NaN).

    Args:
        entropy: [N], float32, bfloat16, float16 or float64; half types are compared in float32.
        offsets: [B + 1] int32 or int64, the atoms of every molecule. Empty molecules have no patch.
        rule: see above.
        q: quantile of "rising_edge", 0 to 1.
        threshold: of "threshold" and "monotonic", in the unit of `entropy`; required there.
        min_size: from left to right, a boundary that would end a patch of fewer atoms is dropped.
            The last patch of a molecule may be shorter.
        max_size: then longer patches are cut every `max_size` atoms.
        max_patches: then a molecule keeps the `max_patches - 1` boundaries that the highest
            entropies decided, of equals the first. This limit wins over `max_size`.

    Returns:
        `Patches`, not differentiable. Capacity P: N at most; B + N // 2 with "local_max";
        2 B + ceil(1 - q) N with quantiles, rounded up; N // max_size more with `max_size`;
        B * max_patches at most with `max_patches`.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device, options or contents of `offsets`.

    A molecule's patches do not depend on the other molecules.

    Example:
        >>> import torch, edt_kernels
        >>> h = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, 4.0, 1.0])
        >>> patches = edt_kernels.find_patches(h, torch.tensor([0, 5, 7]))
        >>> patches.ids
        tensor([0, 1, 1, 1, 2, 0, 0])
        >>> patches.trim().atom_offsets, patches.patch_offsets
        (tensor([0, 1, 4, 5, 7]), tensor([0, 3, 4]))
    """
    checked = kernel_checks(entropy)
    if not checked:
        _check_entropy(entropy, offsets)
    make_options = known_options if checked else options
    try:
        cut = make_options(rule, q, threshold, min_size, max_size, max_patches)
        capacity = cut.capacity(entropy.shape[0], offsets.shape[0] - 1)
        if entropy.requires_grad:
            entropy = entropy.detach()
        ids, atom_offsets, patch_offsets, count, levels = _find_patches(
            entropy, offsets, *cut, capacity
        )
    except Exception:
        _check_entropy(entropy, offsets)
        _check.offsets_content("offsets", offsets, entropy.shape[0])
        raise
    return Patches(ids, atom_offsets, patch_offsets, count, None, levels)


def _check_entropy(entropy: object, offsets: object) -> None:
    _check.tensor("entropy", entropy, dims=1)
    _check.offsets("offsets", offsets, entropy)
