"""From next-atom logits to patches in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from edt_kernels import _check, reference
from edt_kernels._library import (
    composite_backward,
    define,
    kernel_checks,
    needs_grad,
    second_order,
)
from edt_kernels.ops.entropy import UNITS, check_logits, entropy_bwd
from edt_kernels.ops.find_patches import SCHEMA, Patches, empty_patches, known_options, options
from edt_kernels.reference.entropy import accumulation_dtype


def _fake(logits, offsets, scale, rule, level, min_size, max_size, max_patches, capacity):
    h = logits.new_empty(logits.shape[:-1], dtype=accumulation_dtype(logits.dtype))
    return h, torch.empty_like(h), torch.empty_like(h), *empty_patches(h, offsets, capacity)


_entropy_patches = define(
    f"entropy_patches(Tensor logits, Tensor offsets, float scale, {SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.entropy_patches,
    fake=_fake,
    triton="entropy_patches:entropy_patches",
)


class _EntropyPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, rest: tuple[object, ...]) -> tuple[Tensor, ...]:
        h, top, log_total, *patches = _entropy_patches(logits, *rest)
        offsets, *ctx.cut = rest
        ctx.save_for_backward(logits, h, top, log_total, offsets)
        ctx.mark_non_differentiable(*patches)
        ctx.set_materialize_grads(False)
        return h, *patches

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None
        logits, h, top, log_total, offsets = ctx.saved_tensors
        if second_order():
            inputs = (logits, offsets, *ctx.cut)
            return composite_backward(reference.entropy_patches, inputs, (grad,))[0], None
        return entropy_bwd(grad, logits, h, top, log_total, ctx.cut[0], offsets), None


def entropy_patches(
    logits: Tensor,
    offsets: Tensor,
    *,
    unit: str = "nats",
    rule: str = "local_max",
    q: float = 0.75,
    threshold: float | None = None,
    min_size: int = 1,
    max_size: int | None = None,
    max_patches: int | None = None,
) -> tuple[Tensor, Patches]:
    """`entropy` of every row and `find_patches` of the result, read once.

    Patches are cut before the entropies are rounded to the dtype of `logits`, which matters for
    half types.

    Args:
        logits: [N, V], float32, bfloat16, float16 or float64. Row i is the distribution that
            predicts atom i from the atoms before it.
        offsets: [B + 1] int32 or int64, the atoms of every molecule.
        unit: "nats" or "bits", of the entropies and of `threshold`.
        rule, q, threshold, min_size, max_size, max_patches: as in `find_patches`.

    Returns:
        H [N] in the dtype of `logits`, 0 in the tail, differentiable twice; and `Patches`, not
        differentiable.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device, options or contents of `offsets`.

    Example:
        >>> import torch, edt_kernels
        >>> logits = torch.tensor([[9.0, 0.0], [1.0, 0.0], [9.0, 0.0]])
        >>> h, patches = edt_kernels.entropy_patches(logits, torch.tensor([0, 3]))
        >>> patches.ids
        tensor([0, 1, 1])
    """
    checked = kernel_checks(logits)
    if not checked:
        _check_arguments(logits, offsets, unit)
    make_options = known_options if checked else options
    try:
        cut = make_options(rule, q, threshold, min_size, max_size, max_patches)
        capacity = cut.capacity(logits.shape[0], offsets.shape[0] - 1)
        arguments = (offsets, UNITS[unit], *cut, capacity)
        if needs_grad(logits):
            h, *patches = _EntropyPatches.apply(logits, arguments)
        else:
            h, _, _, *patches = _entropy_patches(logits, *arguments)
    except Exception:
        _check_arguments(logits, offsets, unit)
        _check.offsets_content("offsets", offsets, logits.shape[0])
        raise
    ids, atom_offsets, patch_offsets, count, levels = patches
    h = h if h.dtype == logits.dtype else h.to(logits.dtype)
    return h, Patches(ids, atom_offsets, patch_offsets, count, None, levels)


def _check_arguments(logits: object, offsets: object, unit: object) -> None:
    check_logits(logits, unit)
    _check.tensor("logits", logits, dims=2)
    _check.offsets("offsets", offsets, logits)
