from __future__ import annotations

import pytest
import torch

from edt_kernels import entropy, entropy_patches, find_patches
from edt_kernels.testing import ragged

OPTIONS = [
    pytest.param({}, id="local_max"),
    pytest.param({"rule": "published", "unit": "bits"}, id="published-bits"),
    pytest.param({"rule": "threshold", "threshold": 2.0, "max_patches": 3}, id="threshold"),
    pytest.param({"rule": "monotonic", "threshold": 0.1, "max_size": 4}, id="monotonic-max4"),
]


def batch(width=38, dtype=torch.float32, lengths=(0, 7, 1, 31, 0, 33)):
    """Logits with NaN in the tail, and offsets."""
    logits, offsets = ragged(lengths, width, tail=3, dtype=dtype)
    logits[offsets[-1] :] = torch.nan
    return logits * 2, offsets


@pytest.mark.parametrize("width", [38, 1025])
@pytest.mark.parametrize("options", OPTIONS)
def test_is_entropy_and_find_patches(options, width):
    logits, offsets = batch(width)
    h, patches = entropy_patches(logits, offsets.int(), **options)
    unit, end = options.get("unit", "nats"), offsets[-1]
    rule = {name: value for name, value in options.items() if name != "unit"}
    assert torch.equal(h[:end], entropy(logits[:end], unit=unit))
    assert not h[end:].any()
    for ours, right in zip(patches, find_patches(h, offsets, **rule), strict=True):
        assert ours is right is None or torch.allclose(ours, right, 0, 0, equal_nan=True)


@pytest.mark.parametrize("width", [38, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_is_that_of_entropy_and_0_in_the_tail(dtype, width):
    logits, offsets = batch(width, dtype, (5, 0, 2))
    x, y = logits.clone().requires_grad_(), logits[: offsets[-1]].clone().requires_grad_()
    g = torch.linspace(0.5, 2, len(x)).to(dtype)
    g[offsets[-1] :] = torch.nan
    entropy_patches(x, offsets, unit="bits")[0].backward(g)
    entropy(y, unit="bits").backward(g[: offsets[-1]])
    assert torch.equal(x.grad[: offsets[-1]], y.grad)
    assert not x.grad[offsets[-1] :].any()


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=str)
def test_nothing_but_a_tail(lengths):
    logits, offsets = batch(lengths=lengths)
    for x in (logits, logits[:0]):
        h, patches = entropy_patches(x, offsets)
        assert not h.any() and patches.count == 0
