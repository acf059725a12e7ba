"""Attention within every molecule of a packed batch, without padding."""

from __future__ import annotations

import torch
from torch import Tensor

from edt_kernels import _check
from edt_kernels._library import (
    composite_backward,
    define,
    distinct,
    kernel_checks,
    needs_grad,
    second_order,
)
from edt_kernels.reference.entropy import accumulation_dtype
from edt_kernels.reference.ragged_attention import ragged_attention as reference
from edt_kernels.reference.ragged_attention import ragged_attention_bwd as reference_bwd
from edt_kernels.reference.ragged_attention import ragged_attention_general as reference_general
from edt_kernels.reference.ragged_attention import (
    ragged_attention_general_bwd as reference_general_bwd,
)

WIDEST_ON_GPU = 256
"""Width of a head beyond which no GPU kernel reads it."""


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))


def _fake_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_general(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    return_scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _fake(q, k, v, q_offsets, k_offsets, causal, scale)
    if not return_scores:
        pairs = 0
    elif bias is not None:
        pairs = bias.shape[0]
    else:
        pairs = torch.library.get_ctx().new_dynamic_size()
    return out, lse, q.new_empty(pairs, q.shape[1])


def _fake_general_bwd(
    grad: Tensor,
    grad_lse: Tensor | None,
    grad_scores: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    causal: bool,
    scale: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = 0 if bias is None else bias.shape[0]
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(pairs, q.shape[1])


_attention = define(
    "ragged_attention(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor k_offsets, "
    "bool causal, float? scale) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    triton="ragged_attention:ragged_attention",
)
_attention_bwd = define(
    "ragged_attention_bwd(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor lse, "
    "Tensor q_offsets, Tensor k_offsets, bool causal, float? scale) -> (Tensor, Tensor, Tensor)",
    reference=reference_bwd,
    fake=_fake_bwd,
    triton="ragged_attention:ragged_attention_bwd",
)
_general = define(
    "ragged_attention_general(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? seed, "
    "Tensor q_offsets, Tensor k_offsets, bool causal, float? scale, float dropout_p, "
    "bool return_scores) -> (Tensor, Tensor, Tensor)",
    reference=reference_general,
    fake=_fake_general,
    triton="ragged_attention:ragged_attention_general",
)
_general_bwd = define(
    "ragged_attention_general_bwd(Tensor grad, Tensor? grad_lse, Tensor? grad_scores, Tensor q, "
    "Tensor k, Tensor v, Tensor? bias, Tensor? seed, Tensor lse, Tensor q_offsets, "
    "Tensor k_offsets, bool causal, float? scale, float dropout_p) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_general_bwd,
    fake=_fake_general_bwd,
    triton="ragged_attention:ragged_attention_general_bwd",
)


class _RaggedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, rest):
        out, lse = _attention(q, k, v, *rest)
        q_offsets, k_offsets, *ctx.options = rest
        ctx.save_for_backward(q, k, v, q_offsets, k_offsets, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        *inputs, lse = ctx.saved_tensors
        q, k, v, q_offsets, k_offsets = inputs
        if second_order():
            inputs = (*inputs, *ctx.options)
            return *composite_backward(reference, inputs, (grad, grad_lse))[:3], None
        grad = q.new_zeros(q.shape) if grad is None else grad
        grads = _attention_bwd(grad, grad_lse, q, k, v, lse, q_offsets, k_offsets, *ctx.options)
        return *grads, None


class _RaggedAttentionGeneral(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, rest):
        out, lse, scores = _general(q, k, v, bias, *rest)
        seed, q_offsets, k_offsets, *ctx.options = rest
        ctx.save_for_backward(q, k, v, bias, seed, q_offsets, k_offsets, lse)
        ctx.set_materialize_grads(False)
        return out, lse, scores

    @staticmethod
    def backward(ctx, grad, grad_lse, grad_scores):
        *inputs, lse = ctx.saved_tensors
        q, k, v, bias, seed, q_offsets, k_offsets = inputs
        if second_order():
            inputs = (*inputs, *ctx.options)
            grads = (grad, grad_lse, grad_scores)
            return *composite_backward(reference_general, inputs, grads)[:4], None
        causal, scale, dropout_p, return_scores = ctx.options
        grad = q.new_zeros(q.shape) if grad is None else grad
        grad_scores = grad_scores if return_scores else None  # compiled code gives one all the same
        dq, dk, dv, dbias = _general_bwd(
            *(grad, grad_lse, grad_scores, q, k, v, bias, seed, lse),
            *(q_offsets, k_offsets, causal, scale, dropout_p),
        )
        return dq, dk, dv, None if bias is None else dbias, None


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of every molecule's queries over its own keys: softmax(scale q k^T + bias) v.

    Molecule m owns query rows q_offsets[m] to q_offsets[m + 1] and key rows k_offsets[m] to
    k_offsets[m + 1]; Lq and Lk are their numbers. A query that sees no key has output 0, lse -inf
    and gradients 0; rows beyond the last offset are never read and get output and gradient 0.

    Args:
        q: [Tq, H, D], float32, bfloat16, float16 or float64.
        k: [Tk, Hkv, D], H a multiple of Hkv: query head h attends to key head h // (H / Hkv).
        v: [Tk, Hkv, D]. All three of one dtype; half types are computed in float32.
        q_offsets: [B + 1], int32 or int64, from 0, non-decreasing, at most Tq.
        k_offsets: [B + 1], likewise, at most Tk.
        causal: query i of a molecule sees keys j <= i + Lk - Lq, so the last one sees all.
        scale: factor of q k^T, 1 / sqrt(D) unless given.
        bias: [sum Lq Lk, H], added to the logits: per molecule all keys of its first query, then
            of the second; -inf hides a pair. More rows than pairs are allowed, and not read.
        dropout_p: chance to drop an attention weight, 0 <= dropout_p < 1.
        seed: int64, needed for dropout: [B], one per molecule, or one element, with which every
            molecule drops the same (head, query, key). The same seed drops the same pairs of a
            molecule whatever else is in the batch, in every call.
        return_lse: also return the log-sum-exp of the logits.
        return_scores: also return the logits.

    Returns:
        The output [Tq, H, D], or a tuple of it, lse [Tq, H] (float32, float64 for float64) and
        scores (as `bias`, -inf where causal hides the pair), the last two where asked for. All are
        differentiable, twice, with respect to q, k, v and bias.

    Raises:
        TypeError: an argument has the wrong type or dtype, or dtypes differ.
        ValueError: shapes, devices, offsets or options do not fit.

    A molecule's output and gradients do not depend on the rest of the batch, to the bit. Dynamic
    queries read a molecule's atoms this way in EDT-Former, arXiv:2602.02742; pair scores that one
    layer hands to the next as bias are Uni-Mol's. Under `torch.compile`, scores without a bias
    have a size that only the offsets know (`capture_dynamic_output_shape_ops`).

    Example:
        >>> import torch, edt_kernels
        >>> q, k = torch.zeros(3, 1, 2), torch.zeros(2, 1, 2)
        >>> v = torch.tensor([[[1.0, 3.0]], [[3.0, 5.0]]])
        >>> offsets = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 2])
        >>> edt_kernels.ragged_attention(q, k, v, *offsets).squeeze(1)
        tensor([[2., 4.],
                [2., 4.],
                [0., 0.]])
    """
    if not kernel_checks(q):
        _check_inputs(q, k, v, q_offsets, k_offsets)
        _check_options(q, scale, bias, dropout_p, seed, q_offsets.shape[0] - 1)
    try:
        if bias is None and not dropout_p and not return_scores:
            rest = (q_offsets, k_offsets, causal, scale)
            if needs_grad(q, k, v):
                out, lse = _RaggedAttention.apply(*distinct(q, k, v), rest)
            else:
                out, lse = _attention(q, k, v, *rest)
        else:
            rest = (seed, q_offsets, k_offsets, causal, scale, dropout_p, return_scores)
            if needs_grad(q, k, v, bias):
                out, lse, scores = _RaggedAttentionGeneral.apply(*distinct(q, k, v, bias), rest)
            else:
                out, lse, scores = _general(q, k, v, bias, *rest)
    except Exception:
        _check_inputs(q, k, v, q_offsets, k_offsets)
        _check_options(q, scale, bias, dropout_p, seed, q_offsets.shape[0] - 1)
        _check_contents(q, k, q_offsets, k_offsets, bias)
        raise
    if return_scores:
        return (out, lse, scores) if return_lse else (out, scores)
    return (out, lse) if return_lse else out


def _check_inputs(q: object, k: object, v: object, q_offsets: object, k_offsets: object) -> None:
    _check.tensor("q", q, dims=3)
    if 0 in q.shape[1:]:
        raise ValueError(f"q must have shape [Tq, H, D] with H, D >= 1, got {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        _check.tensor(name, x, dims=3)
        _check.same_dtype(name, x, q)
        _check.same_device(name, x, q)
    if k.shape[2] != q.shape[2] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k must have shape [Tk, Hkv, {q.shape[2]}] with Hkv a divisor of {q.shape[1]}, "
            f"got shape {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    _check.offsets("q_offsets", q_offsets, q)
    _check.offsets("k_offsets", k_offsets, q)
    if q_offsets.shape != k_offsets.shape:
        raise ValueError(
            f"k_offsets must have as many entries as q_offsets, {q_offsets.shape[0]}, "
            f"got {k_offsets.shape[0]}"
        )


def _check_contents(
    q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, bias: Tensor | None
) -> None:
    _check.offsets_content("q_offsets", q_offsets, q.shape[0])
    _check.offsets_content("k_offsets", k_offsets, k.shape[0])
    if bias is not None:
        pairs = int((q_offsets.diff().long() * k_offsets.diff().long()).sum())
        if pairs > bias.shape[0]:
            raise ValueError(
                f"bias must have one row per (query, key) pair, at least {pairs}, "
                f"got {bias.shape[0]}"
            )


def _check_options(
    q: Tensor, scale: object, bias: object, dropout_p: object, seed: object, molecules: int
) -> None:
    if scale is not None:
        _check.number("scale", scale, scalar=True)
    if bias is not None:
        _check.tensor("bias", bias, dims=2)
        _check.same_dtype("bias", bias, q)
        _check.same_device("bias", bias, q)
        if bias.shape[1] != q.shape[1]:
            raise ValueError(
                f"bias must have shape [sum Lq Lk, {q.shape[1]}], got shape {tuple(bias.shape)}"
            )
    _check.number("dropout_p", dropout_p, scalar=True)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {dropout_p}")
    if dropout_p > 0:
        _check.tensor("seed", seed, dtypes=(torch.int64,))
        _check.same_device("seed", seed, q)
        if seed.numel() not in (1, molecules):
            raise ValueError(
                f"seed must have one element, or one for each of {molecules} molecules, "
                f"got shape {tuple(seed.shape)}"
            )
