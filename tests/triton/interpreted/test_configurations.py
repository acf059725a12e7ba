"""What `warmup` runs: every configuration on tensors of zeros, outputs as the op declares."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

from edt_kernels import _library
from edt_kernels.triton import configurations

CASES = [
    pytest.param(configuration, id=f"{configuration.launcher.__name__}-{configuration.name}")
    for configuration in configurations("cpu", torch.float32)
]


@pytest.mark.parametrize("configuration", CASES)
def test_runs_and_returns_what_the_op_declares(configuration):
    names = {launcher(): name for name, launcher in _library.LAUNCHERS.items()}
    op = getattr(torch.ops.edt, names[configuration.launcher])
    meta = tree_map(
        lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, configuration.arguments
    )
    outputs, _ = tree_flatten(configuration.launcher(*configuration.arguments))
    declared, _ = tree_flatten(op(*meta))
    assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, x.dtype) for x in declared]
