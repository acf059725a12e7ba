"""Low-rank adapters of a linear layer that every molecule has of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from edt_kernels import _check, reference
from edt_kernels._library import (
    composite_backward,
    define,
    distinct,
    kernel_checks,
    needs_grad,
    second_order,
)
from edt_kernels.reference.entropy import accumulation_dtype


def _fake(x, a, b, offsets, scale, base):
    rows = math.prod(x.shape[:-1])
    shrunk = x.new_empty(rows, b.shape[1], dtype=accumulation_dtype(x.dtype))
    return x.new_empty(*x.shape[:-1], b.shape[0]), shrunk


def _fake_bwd(grad, x, a, b, shrunk, offsets, scale, need_x, need_a, need_b):
    return (
        x.new_empty(x.shape if need_x else (0, x.shape[-1])),
        a.new_empty(a.shape[0] if need_a else 0, *a.shape[1:]),
        b.new_empty(b.shape[0] if need_b else 0, b.shape[1]),
    )


def _fake_many(x, a, b, offsets, scale, base):
    return [x.new_empty(*x.shape[:-1], b.shape[0]) for x, b in zip(x, b, strict=True)]


_lora = define(
    "instance_lora(Tensor x, Tensor a, Tensor b, Tensor offsets, float scale, Tensor? base)"
    " -> (Tensor, Tensor)",
    reference=reference.instance_lora,
    fake=_fake,
    triton="instance_lora:instance_lora",
)
_lora_bwd = define(
    "instance_lora_bwd(Tensor grad, Tensor x, Tensor a, Tensor b, Tensor shrunk, Tensor offsets,"
    " float scale, bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
    reference=reference.instance_lora_bwd,
    fake=_fake_bwd,
    triton="instance_lora:instance_lora_bwd",
)
_lora_many = define(
    "instance_lora_many(Tensor[] x, Tensor[] a, Tensor[] b, Tensor offsets, float scale,"
    " Tensor?[] base) -> Tensor[]",
    reference=reference.instance_lora_many,
    fake=_fake_many,
    triton="instance_lora:instance_lora_many",
)


class _InstanceLoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, a: Tensor, b: Tensor, base: Tensor | None, rest: tuple[Tensor, float]
    ) -> Tensor:
        offsets, scale = rest
        out, shrunk = _lora(x, a, b, offsets, scale, base)
        ctx.save_for_backward(x, a, b, shrunk, offsets)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, shrunk, offsets = ctx.saved_tensors
        *wanted, need_base, _ = ctx.needs_input_grad
        of_base = grad if need_base else None
        if second_order():
            inputs = (x, a, b, offsets, ctx.scale, None)
            found = composite_backward(reference.instance_lora, inputs, (grad,))[:3]
        elif any(wanted):
            found = _lora_bwd(grad, x, a, b, shrunk, offsets, ctx.scale, *wanted)
        else:
            found = (None, None, None)
        grads = (g if want else None for g, want in zip(found, wanted, strict=True))
        return *grads, of_base, None


def instance_lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    *,
    scale: float = 1.0,
    base: Tensor | None = None,
) -> Tensor:
    """base + scale (x A_m) B^T: the adapter of row t is that of the molecule m that owns the row.

    MoRA (arXiv:2510.12245) makes A_m from the molecule while the language model stays frozen; B is
    learned and shared. The base, usually the output of the frozen linear layer, is added where the
    product is written.

    Args:
        x: [..., d_in], float32, bfloat16, float16 or float64: T rows, counted in their order. A
            padded batch [B, L, d_in] has offsets 0, L, 2 L, ...; a step of decoding [B, d_in] has
            0, 1, 2, ...
        a: [B, d_in, r], the dtype of `x`; d_in and r are at least 1. Several molecules of one text:
            their A summed, or, where their B differ, side by side along r as the B are. A text
            without a molecule has zeros, which leave its rows of the base as they are, to the bit,
            where `x` and `b` are finite.
        b: [d_out, r], the dtype of `x`.
        offsets: [B + 1], int32 or int64: rows offsets[m] to offsets[m+1] have A_m. Rows beyond the
            last have no adapter: `x` is not read there, its gradient is 0, and the output is the
            base. A molecule may own no rows.
        scale: alpha / r of LoRA (arXiv:2106.09685).
        base: [..., d_out], the dtype of `x`, or None for 0.

    Returns:
        [..., d_out]. Differentiable twice, in `x`, `a`, `b` and `base`; half types are summed in
        float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices disagree, or the offsets are malformed.

    A molecule's rows and gradients do not depend on the others, to the bit; the gradient of `b` is
    summed in an order that shapes and offsets decide, the same for any number of threads.

    Example:
        >>> import torch, edt_kernels
        >>> x, a, b = torch.ones(3, 2), torch.tensor([[[1.0], [1.0]], [[0.0], [5.0]]]), torch.eye(1)
        >>> edt_kernels.instance_lora(x, a, b, torch.tensor([0, 2, 3]), base=torch.ones(3, 1))
        tensor([[3.],
                [3.],
                [6.]])
    """
    if not kernel_checks(x):
        _check_arguments(x, a, b, offsets, scale, base)
    try:
        return _adapt(x, a, b, offsets, scale, base)
    except Exception:
        _check_arguments(x, a, b, offsets, scale, base)
        _check.offsets_content("offsets", offsets, math.prod(x.shape[:-1]))
        raise


def instance_lora_many(
    x: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    offsets: Tensor,
    *,
    scale: float = 1.0,
    base: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """`instance_lora` of several linear layers that read the same rows, in one call of the kernel.

    For steps of decoding, where a call costs more than the numbers: q, k and v of a layer, or the
    adapters of several layers. The results have the bits of single calls. Where a gradient is
    recorded they are single calls.

    Args:
        x: one tensor [..., d_in] per layer, or one tensor again and again; at least one. Every one
            has the T rows of `offsets`.
        a: one tensor [B, d_in, r] per layer; widths and ranks may differ from layer to layer.
        b: one tensor [d_out, r] per layer.
        offsets: [B + 1], of all layers.
        scale: of all layers.
        base: one tensor [..., d_out] or None per layer, or None for no base at all.

    Returns:
        One tensor [..., d_out] per layer.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: numbers of layers, shapes or devices disagree, or the offsets are malformed.

    Example:
        >>> import torch, edt_kernels
        >>> x, a = torch.ones(1, 2), torch.ones(1, 2, 1)
        >>> q, k = torch.ones(3, 1), torch.zeros(2, 1)
        >>> edt_kernels.instance_lora_many([x, x], [a, a], [q, k], torch.tensor([0, 1]))
        [tensor([[2., 2., 2.]]), tensor([[0., 0.]])]
    """
    x, a, b = tuple(x), tuple(a), tuple(b)
    base = (None,) * len(x) if base is None else tuple(base)
    if not (x and kernel_checks(x[0])):
        _check_layers(x, a, b, offsets, scale, base)
    try:
        if needs_grad(*x, *a, *b, *base):
            layers = zip(x, a, b, base, strict=True)
            return [_adapt(x, a, b, offsets, scale, base) for x, a, b, base in layers]
        return _lora_many(x, a, b, offsets, scale, base)
    except Exception:
        _check_layers(x, a, b, offsets, scale, base)
        _check.offsets_content("offsets", offsets, math.prod(x[0].shape[:-1]))
        raise


def _adapt(
    x: Tensor, a: Tensor, b: Tensor, offsets: Tensor, scale: float, base: Tensor | None
) -> Tensor:
    if needs_grad(x, a, b, base):
        return _InstanceLoRA.apply(*distinct(x, a, b, base), (offsets, scale))
    return _lora(x, a, b, offsets, scale, base)[0]


def _check_arguments(
    x: object, a: object, b: object, offsets: object, scale: object, base: object, layer: str = ""
) -> None:
    _check.tensor(f"x{layer}", x)
    _check.tensor(f"a{layer}", a, dims=3)
    _check.tensor(f"b{layer}", b, dims=2)
    if x.dim() == 0 or x.shape[-1] != a.shape[1]:
        raise ValueError(
            f"x{layer} must have shape [..., d_in] with d_in = {a.shape[1]} as in a{layer} "
            f"[B, d_in, r], got shape {tuple(x.shape)}"
        )
    if 0 in a.shape[1:]:
        raise ValueError(
            f"a{layer} must have shape [B, d_in, r] with d_in, r >= 1, got {tuple(a.shape)}"
        )
    if b.shape[1] != a.shape[2]:
        raise ValueError(
            f"b{layer} must have shape [d_out, r] with r = {a.shape[2]} as in a{layer} "
            f"[B, d_in, r], got shape {tuple(b.shape)}"
        )
    _check.offsets("offsets", offsets, x)
    if offsets.shape[0] != a.shape[0] + 1:
        raise ValueError(
            f"offsets must have shape [B + 1] with B = {a.shape[0]} as in a{layer} [B, d_in, r], "
            f"got shape {tuple(offsets.shape)}"
        )
    for name, value in ((f"a{layer}", a), (f"b{layer}", b), (f"base{layer}", base)):
        if value is not None:
            _check.tensor(name, value)
            _check.same_dtype(name, value, x)
            _check.same_device(name, value, x)
    if base is not None and base.shape != (*x.shape[:-1], b.shape[0]):
        raise ValueError(
            f"base{layer} must have shape {(*x.shape[:-1], b.shape[0])}, got {tuple(base.shape)}"
        )
    if not isinstance(scale, Real):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")


def _check_layers(
    x: tuple, a: tuple, b: tuple, offsets: object, scale: object, base: tuple
) -> None:
    if not x:
        raise ValueError("x must have at least one layer, got none")
    for name, value in (("a", a), ("b", b), ("base", base)):
        if len(value) != len(x):
            raise ValueError(
                f"{name} must have one entry per layer, got {len(value)} for {len(x)} of x"
            )
    for k, layer in enumerate(zip(x, a, b, base, strict=True)):
        *tensors, own = layer
        _check_arguments(*tensors, offsets, scale, own, layer=f"[{k}]")
        _check.same_dtype(f"x[{k}]", x[k], x[0])
        _check.same_device(f"x[{k}]", x[k], x[0])
        if math.prod(x[k].shape[:-1]) != math.prod(x[0].shape[:-1]):
            raise ValueError(
                f"x[{k}] must have as many rows as x[0] of shape {tuple(x[0].shape)}, "
                f"got shape {tuple(x[k].shape)}"
            )
