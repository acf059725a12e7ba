"""Gradients where one tensor is given in two places, or one argument is made of another."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradgradcheck

import edt_kernels as ek

OFFSETS = torch.tensor([0, 3, 5])
CALLS = {
    "self-attention": lambda x, o: ek.ragged_attention(x, x, x, o, o),
    "keys made of queries": lambda x, o: ek.ragged_attention(x, x.sin(), x.sin().exp(), o, o),
    "pair bias": lambda x, o: ek.ragged_attention(x, x, x, o, o, bias=x.new_ones(13, 2)),
    "ragged_cat": lambda x, o: ek.ragged_cat([x, x], [o, o])[0],
    "insert": lambda x, o: ek.insert(x[:, 0], o, x[:, 0], o, o[:-1]).embeds,
    "splice": lambda x, o: ek.splice(x[:, 0], x[:, 0], o[:1].repeat(2), o.new_zeros(5).bool()),
    "instance_lora": lambda x, o: ek.instance_lora(
        x[:, 0], x.new_ones(2, 4, 4), x[:, 0], o, base=x.new_ones(5, 5)
    ),
    "linear_entropy": lambda x, o: ek.linear_entropy(x[:, 0].sin(), x[:, 0]),
    "segment_pool": lambda x, o: ek.segment_pool(x[:, 0, 0], o, weight=x[:, 0, 0], reduce="sum"),
}


@pytest.mark.parametrize("call", CALLS)
def test_compiled_with_a_tensor_in_two_places(call):
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[call], fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(5, 2, 4)
    grads = []
    for function in (compiled, CALLS[call]):
        leaf = x.clone().requires_grad_()
        out = function(leaf, OFFSETS)
        grads.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    assert grads[1].any()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("call", CALLS)
def test_a_gradient_that_is_differentiated_again_is_the_same(call):
    x = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    out = CALLS[call](x, OFFSETS).square().sum()
    once, again = (
        torch.autograd.grad(out, x, create_graph=again, retain_graph=True)[0]
        for again in (False, True)
    )
    torch.testing.assert_close(again, once)
    assert gradgradcheck(lambda x: CALLS[call](x, OFFSETS), x, fast_mode=True)


def test_hooks_of_what_no_gradient_is_asked_for_stay_silent():
    q, k = torch.randn(2, 5, 2, 4, dtype=torch.float64).unbind()
    q.requires_grad_(), k.requires_grad_()
    key = k * 1
    called = []
    key.register_hook(called.append)
    out = ek.ragged_attention(q, key, key, OFFSETS, OFFSETS)
    torch.autograd.grad(out.sum(), q, create_graph=True)
    assert not called
