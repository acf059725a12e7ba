"""Concatenation of packed batches, molecule by molecule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edt_kernels import _check, reference
from edt_kernels._library import define, distinct, kernel_checks, needs_grad, second_order
from edt_kernels.reference.ragged_cat import ragged_cat_capacity


def _fake(parts: Sequence[Tensor], offsets: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    rows = ragged_cat_capacity([part.shape[0] for part in parts], offsets)
    joined = torch.empty_like(next(own for own in offsets if own is not None))
    return parts[0].new_empty(rows, *parts[0].shape[1:]), joined


def _fake_bwd(
    grad: Tensor, offsets: Sequence[Tensor | None], rows: Sequence[int], wanted: Sequence[bool]
) -> list[Tensor]:
    return [
        grad.new_empty(count, *grad.shape[1:]) if want else grad.new_empty(0)
        for count, want in zip(rows, wanted, strict=True)
    ]


_ragged_cat = define(
    "ragged_cat(Tensor[] parts, Tensor?[] offsets) -> (Tensor, Tensor)",
    reference=reference.ragged_cat,
    fake=_fake,
    triton="ragged_cat:ragged_cat",
)
_ragged_cat_bwd = define(
    "ragged_cat_bwd(Tensor grad, Tensor?[] offsets, SymInt[] rows, bool[] wanted) -> Tensor[]",
    reference=reference.ragged_cat_bwd,
    fake=_fake_bwd,
    triton="ragged_cat:ragged_cat_bwd",
)


class _RaggedCat(torch.autograd.Function):
    @staticmethod
    def forward(ctx, offsets: tuple[Tensor | None, ...], *parts: Tensor) -> tuple[Tensor, Tensor]:
        out, joined = _ragged_cat(parts, offsets)
        ctx.save_for_backward(*offsets)
        ctx.rows = [part.shape[0] for part in parts]
        ctx.mark_non_differentiable(joined)
        ctx.set_materialize_grads(False)
        return out, joined

    @staticmethod
    def backward(ctx, grad: Tensor | None, _joined: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (1 + len(ctx.rows))
        bwd = reference.ragged_cat_bwd if second_order() else _ragged_cat_bwd
        wanted = ctx.needs_input_grad[1:]
        found = bwd(grad, ctx.saved_tensors, ctx.rows, wanted)
        return None, *(part if want else None for part, want in zip(found, wanted, strict=True))


def ragged_cat(parts: Sequence[Tensor], offsets: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Concatenate packed batches molecule by molecule.

    Molecule m of the result holds the rows of m of every part, in the order of the parts. A part
    whose offsets are None goes to every molecule: learned anchors [L, ...] beside the dynamic
    queries of EDT-Former, arXiv:2602.02742. It is read in place, not repeated first.

    Args:
        parts: at least one tensor [N_k, ...] of one dtype (float32, bfloat16, float16 or float64),
            alike in all dimensions but the first.
        offsets: for every part its offsets [B + 1] (int32 or int64, from 0, not decreasing, the
            last <= N_k; rows beyond it are left out, with gradient 0), or None. At least one part
            has offsets.

    Returns:
        `(values [T, ...], offsets [B + 1])`. T = the sum of N_k over the parts with offsets plus B
        L for every other part, a function of shapes alone; rows beyond the last offset are 0. The
        offsets have the dtype of the first offsets given. Differentiable twice; the gradient of a
        broadcast part is the sum over molecules in their order.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: numbers of parts, molecules, shapes or devices disagree, or offsets are
            malformed.

    Example:
        >>> import torch, edt_kernels
        >>> anchors, queries = torch.tensor([9.0]), torch.tensor([1.0, 2.0, 3.0])
        >>> edt_kernels.ragged_cat([anchors, queries], [None, torch.tensor([0, 2, 3])])
        (tensor([9., 1., 2., 9., 3.]), tensor([0, 3, 5]))
    """
    parts, offsets = tuple(parts), tuple(offsets)
    if not (parts and kernel_checks(parts[0])):
        _check_parts(parts, offsets)
    try:
        if needs_grad(*parts):
            return _RaggedCat.apply(offsets, *distinct(*parts))
        return _ragged_cat(parts, offsets)
    except Exception:
        _check_parts(parts, offsets)
        for k, (part, own) in enumerate(zip(parts, offsets, strict=True)):
            if own is not None:
                _check.offsets_content(f"offsets[{k}]", own, part.shape[0])
        raise


def _check_parts(parts: tuple[Tensor, ...], offsets: tuple[Tensor | None, ...]) -> None:
    if len(parts) != len(offsets):
        raise ValueError(
            f"offsets must have one entry per part, got {len(offsets)} for {len(parts)} parts"
        )
    ragged = [own for own in offsets if own is not None]
    if not ragged:
        raise ValueError("offsets must have at least one entry that is not None, got none")
    for k, (part, own) in enumerate(zip(parts, offsets, strict=True)):
        name = f"parts[{k}]"
        _check.tensor(name, part)
        _check.rows(name, part)
        _check.same_dtype(name, part, parts[0])
        _check.same_device(name, part, parts[0])
        if part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"{name} must have rows of shape {tuple(parts[0].shape[1:])} as parts[0], "
                f"got {tuple(part.shape[1:])}"
            )
        if own is None:
            continue
        _check.offsets(f"offsets[{k}]", own, part)
        if own.shape != ragged[0].shape:
            raise ValueError(
                f"offsets[{k}] must have shape {tuple(ragged[0].shape)} as the first offsets, "
                f"got {tuple(own.shape)}"
            )
