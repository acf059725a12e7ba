"""Modules under autocast: their own products in bfloat16, values and gradients beside float32."""

from __future__ import annotations

import pytest
import torch

from edt_kernels import find_patches
from edt_kernels.nn import CrossAttention, DynamicQueries, InstanceLoRA, SegmentPool

OFFSETS = torch.tensor([0, 4, 7])


def cross_attention():
    module = CrossAttention(8, 2, kdim=6, vdim=6)
    return module, lambda x: module(
        module.out_proj.weight[:5], x, x, torch.tensor([0, 3, 5]), OFFSETS
    )


def attention_pooling():
    module = CrossAttention(8, 2, kdim=6, vdim=6)
    return module, lambda x: module.pool(module.out_proj.weight[:3], x, OFFSETS)


def dynamic_queries():
    module = DynamicQueries(2, 8, in_width=6)
    patches = find_patches(torch.tensor([0.0, 2.0, 1.0, 3.0, 0.0, 0.0, 1.0]), OFFSETS)
    return module, lambda x: module(x, patches)[0]


def instance_lora():
    module = InstanceLoRA(8, 2)
    torch.nn.init.normal_(module.b)
    linear = torch.nn.Linear(6, 8)
    return module, lambda x: module(x, x.new_ones(2, 6, 2), OFFSETS, base=linear(x))


def segment_pool():
    module = SegmentPool("attention", width=6)
    return module, lambda x: module(x, OFFSETS)


@pytest.mark.parametrize(
    "make", [cross_attention, attention_pooling, dynamic_queries, instance_lora, segment_pool]
)
def test_values_and_gradients(make):
    torch.manual_seed(0)
    module, call = make()
    leaves = [torch.randn(7, 6, requires_grad=True), *module.parameters()]

    def run():
        out = call(leaves[0]).float()
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    exact = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    for mine, true in zip(found, exact, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, true, rtol=0, atol=0.05 * true.abs().max().item() + 0.01)
    assert not torch.equal(found[0], exact[0])
