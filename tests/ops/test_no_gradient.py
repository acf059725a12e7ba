"""Gradients that do not come: a step behind an op that hands it none, and forward mode."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import edt_kernels as ek

OFFSETS = torch.tensor([0, 3, 5])
CALLS = {
    "entropy_patches": lambda x, o: ek.entropy_patches(x, o)[0],
    "insert": lambda x, o: ek.insert(x, o, x, o, o[:-1]).embeds,
    "ragged_attention": lambda x, o: ek.ragged_attention(*[x.unsqueeze(1)] * 3, o, o),
    "ragged_cat": lambda x, o: ek.ragged_cat([x, x], [o, o])[0],
}


class _Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("call", CALLS)
def test_no_gradient_is_a_gradient_of_nothing(call):
    x = torch.randn(5, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(_Stop.apply(CALLS[call](x, OFFSETS)).sum(), x, allow_unused=True)
    assert grad is None or not grad.any()


FORWARD = CALLS | {
    "entropy": lambda x, o: ek.entropy(x),
    "linear_entropy": lambda x, o: ek.linear_entropy(x, x),
    "instance_lora": lambda x, o: ek.instance_lora(x, x.new_ones(2, 4, 4), x, o),
    "segment_pool": lambda x, o: ek.segment_pool(x, o),
    "segment_pool max": lambda x, o: ek.segment_pool(x, o, reduce="max"),
    "segment_softmax": lambda x, o: ek.segment_softmax(x, o),
    "splice": lambda x, o: ek.splice(x, x, o[:1].repeat(2), o.new_zeros(5).bool()),
}


@pytest.mark.parametrize("call", FORWARD)
def test_forward_mode_is_refused_not_dropped(call):
    x, v = torch.randn(2, 5, 4).unbind()
    with pytest.raises(NotImplementedError, match="forward-mode tangent"):
        torch.func.jvp(lambda x: FORWARD[call](x, OFFSETS), (x,), (v,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode tangent"):
        FORWARD[call](forward_ad.make_dual(x, v), OFFSETS)
    with forward_ad.dual_level():
        FORWARD[call](x, OFFSETS)
