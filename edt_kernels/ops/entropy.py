"""Next-token entropy: how uncertain a distribution over V tokens is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edt_kernels import _check, reference
from edt_kernels._library import composite_backward, define, needs_grad, second_order
from edt_kernels.reference.entropy import accumulation_dtype

UNITS = {"nats": 1.0, "bits": 1 / math.log(2)}


def _fake(logits: Tensor) -> tuple[Tensor, Tensor]:
    shape = logits.shape[:-1]
    return logits.new_empty(shape), logits.new_empty(shape, dtype=accumulation_dtype(logits.dtype))


def _fake_bwd(grad: Tensor, logits: Tensor, lse: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


_entropy = define(
    "entropy(Tensor logits) -> (Tensor, Tensor)", reference=reference.entropy, fake=_fake
)
_entropy_bwd = define(
    "entropy_bwd(Tensor grad, Tensor logits, Tensor lse) -> Tensor",
    reference=reference.entropy_bwd,
    fake=_fake_bwd,
)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        h, lse = _entropy(logits)
        ctx.save_for_backward(logits, lse)
        return h

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor | None:
        logits, lse = ctx.saved_tensors
        if second_order():
            return composite_backward(reference.entropy, (logits,), (grad,))[0]
        return _entropy_bwd(grad, logits, lse)


def entropy(logits: Tensor, *, unit: str = "nats") -> Tensor:
    """Entropy of softmax(logits) over the last dimension.

    H = ln S - T / S with m the row maximum, S = sum e^(x-m), T = sum e^(x-m) (x-m); the gradient
    is -g p (ln p + H). Logits of -inf have probability 0 and contribute nothing.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64, any V >= 1.
        unit: "nats" or "bits".

    Returns:
        H [...], in the dtype of `logits`, 0 <= H <= ln V. Differentiable twice.

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
    _check.tensor("logits", logits)
    _check.choice("unit", unit, tuple(UNITS))
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must have shape [..., V] with V >= 1, got shape {tuple(logits.shape)}"
        )
    h = _Entropy.apply(logits) if needs_grad(logits) else _entropy(logits)[0]
    return h if unit == "nats" else h * UNITS[unit]
