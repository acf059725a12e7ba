"""Entropy of a language model head's distribution, its logits made by tiles."""

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
from edt_kernels.ops.entropy import UNITS
from edt_kernels.reference.entropy import accumulation_dtype
from edt_kernels.reference.linear_entropy import kept_shape


def _fake(hidden, weight, bias, scale, keep):
    dtype = accumulation_dtype(hidden.dtype)
    row = hidden.new_empty(hidden.shape[:-1], dtype=dtype)
    kept = hidden.new_empty(kept_shape(hidden, weight, keep), dtype=dtype)
    return row, torch.empty_like(row), torch.empty_like(row), kept


def _fake_bwd(grad, hidden, weight, bias, h, top, log_total, kept, scale, need_hidden, need_weight):
    tokens, width = weight.shape
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0, width)),
        weight.new_empty(tokens if need_weight else 0, width),
        weight.new_empty(tokens if need_weight else 0),
    )


_linear_entropy = define(
    "linear_entropy(Tensor hidden, Tensor weight, Tensor? bias, float scale, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_entropy,
    fake=_fake,
    triton="linear_entropy:linear_entropy",
)
_linear_entropy_bwd = define(
    "linear_entropy_bwd(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor h,"
    " Tensor top, Tensor log_total, Tensor kept, float scale, bool need_hidden,"
    " bool need_weight)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.linear_entropy_bwd,
    fake=_fake_bwd,
    triton="linear_entropy:linear_entropy_bwd",
)


class _LinearEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        # Making logits again costs a product of three; keeping few of them, less than hidden does.
        row_bytes = accumulation_dtype(hidden.dtype).itemsize * weight.shape[0]
        keep = row_bytes <= hidden.dtype.itemsize * weight.shape[1]
        h, *saved = _linear_entropy(hidden, weight, bias, scale, keep)
        ctx.save_for_backward(hidden, weight, bias, h, *saved)
        ctx.scale = scale
        return h

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *_ = ctx.saved_tensors
        if second_order():
            inputs = (hidden, weight, bias, ctx.scale, False)
            return composite_backward(reference.linear_entropy, inputs, (grad,))[:4]
        need_hidden, *need_shared, _ = ctx.needs_input_grad
        options = (ctx.scale, need_hidden, any(need_shared))
        grads = _linear_entropy_bwd(grad, *ctx.saved_tensors, *options)
        wanted = (need_hidden, *need_shared)
        return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None


def linear_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, unit: str = "nats"
) -> Tensor:
    """Entropy of softmax(hidden weight^T + bias), the logits computed by tiles.

    The backward computes them again, so memory stays at a tile whatever N and V are. On the CPU
    they are kept for it where, in float32 or wider, they take no more memory than `hidden`.

    Args:
        hidden: [..., D], float32, bfloat16, float16 or float64; half types are multiplied and
            summed in float32.
        weight: [V, D], V >= 1, in the dtype of `hidden`.
        bias: [V], in the dtype of `hidden`, or None.
        unit: "nats" or "bits".

    Returns:
        H [...], in the dtype of `hidden`. Differentiable twice, in all three.

    Raises:
        TypeError: wrong type or dtype.
        ValueError: wrong shape, device or unit.

    A row's entropy and gradient do not depend on the other rows, to the bit; the gradients of
    weight and bias are the same for any number of threads.

    Example:
        >>> import torch, edt_kernels
        >>> edt_kernels.linear_entropy(torch.ones(1, 3), torch.zeros(4, 3), unit="bits")
        tensor([2.])
    """
    if not kernel_checks(hidden):
        _check_arguments(hidden, weight, bias, unit)
    try:
        scale = UNITS[unit]
        if needs_grad(hidden, weight, bias):
            h = _LinearEntropy.apply(hidden, weight, bias, scale)
        else:
            h = _linear_entropy(hidden, weight, bias, scale, False)[0]
    except Exception:
        _check_arguments(hidden, weight, bias, unit)
        raise
    return h if h.dtype == hidden.dtype else h.to(hidden.dtype)


def _check_arguments(hidden: object, weight: object, bias: object, unit: object) -> None:
    _check.tensor("hidden", hidden)
    _check.tensor("weight", weight, dims=2)
    _check.choice("unit", unit, tuple(UNITS))
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape [..., D] with D = {weight.shape[1]} as in weight [V, D], "
            f"got shape {tuple(hidden.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have shape [V, D] with V >= 1, got {tuple(weight.shape)}")
    _check.same_dtype("weight", weight, hidden)
    _check.same_device("weight", weight, hidden)
    if bias is not None:
        _check.tensor("bias", bias, dims=1)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        _check.same_dtype("bias", bias, hidden)
        _check.same_device("bias", bias, hidden)
