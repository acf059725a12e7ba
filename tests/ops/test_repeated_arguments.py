"""Compiled code with gradients, where one tensor is given in two places."""

from __future__ import annotations

import pytest
import torch

import edt_kernels as ek

OFFSETS = torch.tensor([0, 3, 5])
CALLS = {
    "self-attention": lambda x, o: ek.ragged_attention(x, x, x, o, o),
    "pair bias": lambda x, o: ek.ragged_attention(x, x, x, o, o, bias=x.new_ones(13, 2)),
    "ragged_cat": lambda x, o: ek.ragged_cat([x, x], [o, o])[0],
    "insert": lambda x, o: ek.insert(x[:, 0], o, x[:, 0], o, o[:-1]).embeds,
    "splice": lambda x, o: ek.splice(x[:, 0], x[:, 0], o[:1].repeat(2), o.new_zeros(5).bool()),
    "instance_lora": lambda x, o: ek.instance_lora(
        x[:, 0], x.new_ones(2, 4, 4), x[:, 0], o, base=x.new_ones(5, 5)
    ),
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
