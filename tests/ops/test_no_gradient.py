"""A step behind an op that hands it no gradient at all, as a custom backward may."""

from __future__ import annotations

import pytest
import torch

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
