from __future__ import annotations

import doctest
import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from edt_kernels import entropy, entropy_patches, find_patches

OPTIONS = [
    pytest.param({}, id="local_max"),
    pytest.param({"rule": "published", "unit": "bits"}, id="published-bits"),
    pytest.param({"rule": "threshold", "threshold": 2.0, "unit": "bits"}, id="threshold-bits"),
    pytest.param({"rule": "monotonic", "threshold": 0.1, "max_size": 4}, id="monotonic-max4"),
    pytest.param({"min_size": 2, "max_patches": 5}, id="min2-patches5"),
]


def batch(lengths=(0, 7, 1, 30, 0, 500), v=38, tail=3, dtype=torch.float32, seed=0):
    """Logits with NaN in the tail, and offsets."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(lengths) + tail, v, generator=g, dtype=torch.float64) * 2
    logits[sum(lengths) :] = torch.nan
    return logits.to(dtype), torch.tensor([0, *lengths]).cumsum(0)


def flat(result):
    h, patches = result
    return [h, *(x for x in patches if x is not None)]


def assert_same(found, wanted):
    for a, b in zip(flat(found), flat(wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_is_entropy_and_find_patches(options, dtype):
    logits, offsets = batch(dtype=dtype)
    h, patches = entropy_patches(logits, offsets, **options)
    unit = options.get("unit", "nats")
    rule = {name: value for name, value in options.items() if name != "unit"}
    end = offsets[-1]
    assert torch.equal(h[:end], entropy(logits[:end], unit=unit))
    assert not h[end:].any()
    exact = logits if dtype == torch.float64 else logits.float()  # patches see no rounded entropy
    wide = entropy(exact.nan_to_num(0), unit=unit)
    wide[end:] = 0
    assert_same((h, patches), (h, find_patches(wide, offsets, **rule)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_that_of_entropy_and_0_in_the_tail(dtype):
    logits, offsets = batch(dtype=dtype)
    x, y = logits.clone().requires_grad_(), logits[: offsets[-1]].clone().requires_grad_()
    grad = torch.linspace(0.5, 2, len(x)).to(dtype)
    h, patches = entropy_patches(x, offsets, unit="bits")
    assert not any(out.requires_grad for out in flat((h, patches))[1:])
    h.backward(grad)
    entropy(y, unit="bits").backward(grad[: offsets[-1]])
    assert torch.equal(x.grad[: offsets[-1]], y.grad)
    assert not x.grad[offsets[-1] :].any()


def test_gradients():
    logits, offsets = batch(lengths=(2, 0, 1), v=5, tail=1, dtype=torch.float64)
    x = logits.nan_to_num(0).requires_grad_()
    assert gradcheck(lambda x: entropy_patches(x, offsets)[0], x)
    assert gradgradcheck(lambda x: entropy_patches(x, offsets, unit="bits")[0], x, fast_mode=True)


def test_second_gradient_of_a_nan_tail_is_0():
    logits, offsets = batch(lengths=(4,), v=5, dtype=torch.float64)
    x = logits.requires_grad_()
    (grad,) = torch.autograd.grad(entropy_patches(x, offsets)[0].sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad[:4].square().sum(), x)
    assert second.isfinite().all() and second[:4].any() and not second[4:].any()


@pytest.mark.parametrize("options", OPTIONS)
def test_a_molecule_has_the_same_bits_alone_and_with_any_threads(options):
    logits, offsets = batch(lengths=(30, 0, 17, 500) * 10)
    h, patches = entropy_patches(logits, offsets, **options)
    for m in (0, 2, 39):
        mine = slice(offsets[m], offsets[m + 1])
        alone = torch.tensor([0, offsets[m + 1] - offsets[m]])
        own_h, own = entropy_patches(logits[mine], alone, **options)
        assert torch.equal(own_h, h[mine]) and torch.equal(own.ids, patches.ids[mine])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_same(entropy_patches(logits, offsets, **options), (h, patches))
    finally:
        torch.set_num_threads(threads)


def test_permuted_logits_and_poisoned_memory():
    logits, offsets = batch()
    clean = entropy_patches(logits, offsets)
    assert_same(entropy_patches(logits.T.contiguous().T, offsets.int()), clean)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert_same(entropy_patches(logits, offsets), clean)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("lengths", [(), (0, 0), (1,)])
def test_little_or_nothing(lengths):
    for tail in (0, 2):
        logits, offsets = batch(lengths=lengths, tail=tail)
        h, patches = entropy_patches(logits.requires_grad_(), offsets)
        h.sum().backward()
        assert patches.count == len([n for n in lengths if n])
        assert not logits.grad[offsets[-1] :].any()


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(layout):
    logits, offsets = batch(lengths=(4, 1, 3), v=5)  # a threshold of NaN equals nothing
    logits = logits.nan_to_num(0)
    if layout == "permuted":
        logits = logits.T.contiguous().T
    args = (logits, offsets, 1.5, 1, 0.5, 2, 3, None, 10)
    torch.library.opcheck(torch.ops.edt.entropy_patches.default, args)


def test_compiles_forward_and_backward():
    def step(logits, offsets):
        h, patches = entropy_patches(logits, offsets, rule="published")
        return h.sum(), patches

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for lengths in ((7, 3, 20), (5, 0, 9, 30, 2)):
        logits, offsets = batch(lengths)
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        found, wanted = compiled(a, offsets), step(b, offsets)
        torch.testing.assert_close(found[0], wanted[0])
        assert_same((found[0].detach() * 0, found[1]), (wanted[0].detach() * 0, wanted[1]))
        found[0].backward()
        wanted[0].backward()
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("grad", [False, True])
def test_errors_say_what_came(grad):
    logits = torch.rand(4, 3, requires_grad=grad)
    with pytest.raises(ValueError, match=r"offsets\[2\] = 2 after 3"):
        entropy_patches(logits, torch.tensor([0, 3, 2]))
    with pytest.raises(ValueError, match=r"at most the number of rows 4, got 5"):
        entropy_patches(logits, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="logits must have 2 dimensions"):
        entropy_patches(logits[0], torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="requires a threshold"):
        entropy_patches(logits, torch.tensor([0, 4]), rule="threshold")


def test_the_example_runs():
    result = doctest.testmod(sys.modules["edt_kernels.ops.entropy_patches"])
    assert result.attempted > 0
    assert result.failed == 0
