from __future__ import annotations

import pytest
import torch

from edt_kernels import splice as op
from edt_kernels.nn import Splice


def prompt(dtype=torch.float32):
    embeds, tokens = torch.randn(2, 5, 3).to(dtype), torch.randn(3, 3).to(dtype)
    slots = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    new_ids = torch.tensor([[1, -1, -1, 0, -1], [-1, 0, -1, -1, 1]])
    return embeds, tokens, torch.tensor([0, 2, 3]), slots, new_ids


def test_it_is_the_op_with_its_own_rows():
    module = Splice(2, 3)
    *arguments, new_ids = prompt()
    found = module(*arguments, new_ids)
    assert torch.equal(found, op(*arguments, new_rows=module.new_rows, new_ids=new_ids))
    assert torch.equal(found[0, 3], module.new_rows[0])
    assert list(module.state_dict()) == ["new_rows"]


def test_rows_learn_in_float32_beside_half_precision():
    module = Splice(2, 3)
    embeds, *rest = prompt(torch.bfloat16)
    found = module(embeds, *rest)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert module.new_rows.grad.dtype == torch.float32
    assert module.new_rows.grad.eq(2).all()  # each row stands at two positions


def test_compiles():
    module = Splice(2, 3)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for width in (5, 7):
        embeds, tokens, offsets, slots, new_ids = prompt()
        pad = width - 5
        embeds = torch.nn.functional.pad(embeds, (0, 0, 0, pad))
        slots = torch.nn.functional.pad(slots, (0, pad))
        new_ids = torch.nn.functional.pad(new_ids, (0, pad), value=-1)
        arguments = (embeds, tokens, offsets, slots, new_ids)
        out = compiled(*arguments)
        out.sum().backward()
        assert torch.equal(out, module(*arguments))
    assert module.new_rows.grad.eq(4).all()


def test_errors():
    with pytest.raises(ValueError, match="num_new must be at least 1, got 0"):
        Splice(0, 3)
    embeds, tokens, offsets, slots, new_ids = prompt()
    with pytest.raises(ValueError, match="got 1 slots and 2 tokens in row 1"):
        Splice(2, 3)(embeds, torch.randn(4, 3), torch.tensor([0, 2, 4]), slots, new_ids)
    with pytest.raises(ValueError, match="new_ids must be below 1, the number of new_rows, got 1"):
        Splice(1, 3)(embeds, tokens, offsets, slots, new_ids)
