from __future__ import annotations

import doctest
import sys

import pytest
import torch

from edt_kernels import instance_lora
from edt_kernels.nn import InstanceLoRA
from edt_kernels.testing import ragged


def batch(dtype=torch.float32):
    """x, a, offsets and base."""
    lengths = (3, 0, 4)
    x, offsets = ragged(lengths, 6, tail=1, dtype=dtype)
    base, _ = ragged(lengths, 5, tail=1, dtype=dtype, seed=1)
    a, _ = ragged((), 6, 2, tail=3, dtype=dtype, seed=2)
    return x, a, offsets, base


def test_it_is_the_op_with_its_own_b():
    module = InstanceLoRA(5, 2, alpha=3)
    torch.nn.init.normal_(module.b)
    x, a, offsets, base = batch()
    found = module(x, a, offsets, base=base)
    assert torch.equal(found, instance_lora(x, a, module.b, offsets, scale=1.5, base=base))
    assert torch.equal(module(x, a, offsets), instance_lora(x, a, module.b, offsets, scale=1.5))
    assert list(module.state_dict()) == ["b"]
    assert InstanceLoRA(5, 2).scale == 1


def test_it_starts_as_the_layer_was_and_learns():
    module = InstanceLoRA(5, 2)
    x, a, offsets, base = batch()
    a.requires_grad_()
    found = module(x, a, offsets, base=base)
    assert torch.equal(found, base)
    found.square().sum().backward()
    assert module.b.grad.any() and a.grad.eq(0).all()


def test_b_learns_in_float32_beside_half_precision():
    module = InstanceLoRA(5, 2)
    x, a, offsets, base = batch(torch.bfloat16)
    found = module(x, a, offsets, base=base)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert module.b.grad.dtype == torch.float32 and module.b.grad.any()


def test_compiles():
    module = InstanceLoRA(5, 2)
    torch.nn.init.normal_(module.b)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    x, a, offsets, base = batch()
    for rows in (8, 11):
        x, base = (t.repeat(2, 1)[:rows] for t in (x, base))
        torch.testing.assert_close(
            compiled(x, a, offsets, base=base), module(x, a, offsets, base=base)
        )


def test_errors():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        InstanceLoRA(5, 0)
    x, a, offsets, base = batch()
    with pytest.raises(ValueError, match=r"b must have .* with r = 2 as in a"):
        InstanceLoRA(5, 3)(x, a, offsets, base=base)


def test_the_example_runs():
    result = doctest.testmod(sys.modules["edt_kernels.nn.instance_lora"])
    assert result.attempted > 0
    assert result.failed == 0
