"""Next-token entropy: how uncertain a distribution over V tokens is."""

from __future__ import annotations

import math

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
from edt_kernels.reference.entropy import accumulation_dtype

UNITS = {"nats": 1.0, "bits": 1 / math.log(2)}


def _fake(logits: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    row = logits.new_empty(logits.shape[:-1], dtype=accumulation_dtype(logits.dtype))
    return row, torch.empty_like(row), torch.empty_like(row)


def _fake_bwd(grad, logits, h, top, log_total, scale, offsets):
    return logits.new_empty(logits.shape)


_entropy = define(
    "entropy(Tensor logits, float scale) -> (Tensor, Tensor, Tensor)",
    reference=reference.entropy,
    fake=_fake,
    triton="entropy:entropy",
)
entropy_bwd = define(
    "entropy_bwd(Tensor grad, Tensor logits, Tensor h, Tensor top, Tensor log_total, float scale,"
    " Tensor? offsets) -> Tensor",
    reference=reference.entropy_bwd,
    fake=_fake_bwd,
    triton="entropy:entropy_bwd",
)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, scale: float) -> Tensor:
        h, top, log_total = _entropy(logits, scale)
        ctx.save_for_backward(logits, h, top, log_total)
        ctx.scale = scale
        return h

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None]:
        logits, h, top, log_total = ctx.saved_tensors
        if second_order():
            return composite_backward(reference.entropy, (logits, ctx.scale), (grad,))
        return entropy_bwd(grad, logits, h, top, log_total, ctx.scale, None), None


def check_logits(logits: object, unit: object) -> None:
    """The arguments that every entropy of logits takes."""
    _check.tensor("logits", logits)
    _check.choice("unit", unit, tuple(UNITS))
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must have shape [..., V] with V >= 1, got shape {tuple(logits.shape)}"
        )


def entropy(logits: Tensor, *, unit: str = "nats") -> Tensor:
    """Entropy of softmax(logits) over the last dimension.

    H = ln S - T / S with m the row maximum, S = sum e^(x-m), T = sum e^(x-m) (x-m); the gradient
    is -g p (ln p + H). Logits of -inf have probability 0 and contribute nothing.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64, any V >= 1.
        unit: "nats" or "bits".

    Returns:
        H [...], in the dtype of `logits`, 0 <= H <= ln V. Differentiable twice. NaN for a row that
        is no distribution: with a NaN, a +inf, or nothing but -inf.

    Raises:
        TypeError: `logits` is no float tensor.
        ValueError: V is 0, or the unit is unknown.

    A row's result does not depend on the other rows. Next-atom entropy cuts molecules into patches
    in EDT-Former, arXiv:2602.02742.

    Example:
        >>> import torch, edt_kernels
        >>> edt_kernels.entropy(torch.zeros(2, 4), unit="bits")
        tensor([2., 2.])
    """
    if not kernel_checks(logits):
        check_logits(logits, unit)
    try:
        scale = UNITS[unit]
        h = _Entropy.apply(logits, scale) if needs_grad(logits) else _entropy(logits, scale)[0]
    except Exception:
        check_logits(logits, unit)
        raise
    return h if h.dtype == logits.dtype else h.to(logits.dtype)
