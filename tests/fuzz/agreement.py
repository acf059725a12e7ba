"""A call on the native kernels against the references: equal, or refused for a reason."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor

from edt_kernels.testing import OnReferences, poisoned
from tests.fuzz.batches import Call, Tensors

REFUSALS = (TypeError, ValueError)


class Disagreement(AssertionError):
    """A native kernel is wrong."""


def check(call: Call, rng: Random) -> None:
    """A legal call: outputs and gradients agree.

    Raises:
        Disagreement: they do not, or the call raises.
    """
    upstream = rng.getrandbits(32)
    try:
        with poisoned():
            ours = _answers(call, upstream)
    except Exception as error:
        raise Disagreement(f"raises {error!r}\n{call}") from error
    with OnReferences():
        theirs = _answers(call, upstream)
    _compare(call, ours, theirs)


def check_spoiled(call: Call, rng: Random) -> bool:
    """A call with something wrong in it: refused in words, or legal after all. Whether refused.

    A moved offset lets the NaN of a tail into a molecule: it may spread less than in the reference.

    Raises:
        Disagreement: an error that tells nothing, or a result for nonsense.
    """
    upstream = rng.getrandbits(32)
    try:
        with poisoned():
            ours = _answers(call, upstream)
    except REFUSALS as error:
        if not str(error):
            raise Disagreement(f"refuses without a word\n{call}") from error
        return True
    except Exception as error:
        raise Disagreement(f"raises {error!r}\n{call}") from error
    try:
        with OnReferences():
            theirs = _answers(call, upstream)
    except Exception as error:
        raise Disagreement(f"returns what the reference refuses: {error!r}\n{call}") from error
    for name, wanted in theirs.items():
        if wanted.is_floating_point() and ours[name].shape == wanted.shape:
            ours[name] = ours[name].masked_fill(wanted.isnan(), torch.nan)
    _compare(call, ours, theirs)
    return False


def _answers(call: Call, upstream: int) -> Tensors:
    """Outputs, and gradients as "d" and the input's name."""
    tensors = {
        name: x.detach().requires_grad_(name in call.grads) if x.is_floating_point() else x
        for name, x in call.tensors.items()
    }
    outputs = call.run(tensors)
    leaves = {name: tensors[name] for name in call.grads if tensors[name].requires_grad}
    ends = {name: x for name, x in outputs.items() if x.requires_grad}
    found = {name: x.detach() for name, x in outputs.items()}
    if leaves and ends:
        generator = torch.Generator().manual_seed(upstream)
        grads = []
        for x in ends.values():
            grad = torch.randn(x.shape, generator=generator).to(x)
            grads.append(grad.t().contiguous().t() if x.dim() == 2 and upstream % 2 else grad)
        taken = torch.autograd.grad(
            list(ends.values()), list(leaves.values()), grads, materialize_grads=True
        )
        found |= {f"d{name}": grad for name, grad in zip(leaves, taken, strict=True)}
    return found


def _compare(call: Call, ours: Tensors, theirs: Tensors) -> None:
    for name, wanted in theirs.items():
        got = ours[name]
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            what = f"{got.dtype} {tuple(got.shape)}, not {wanted.dtype} {tuple(wanted.shape)}"
            raise Disagreement(f"{name} is {what}\n{call}")
        fault = _fault(got, wanted)
        if fault:
            raise Disagreement(f"{name} {fault}\n{call}")


def _fault(got: Tensor, wanted: Tensor) -> str | None:
    """What is wrong; integers are exact, floats as near as two orders of a sum."""
    if not wanted.is_floating_point():
        return None if torch.equal(got, wanted) else f"= {got.tolist()}, not {wanted.tolist()}"
    finite = wanted.isfinite()
    same = torch.equal(got[~finite].nan_to_num(2e4), wanted[~finite].nan_to_num(2e4))
    if not same or not got[finite].isfinite().all():
        return "is not finite elsewhere than the reference"
    if not finite.any():
        return None
    error = (got[finite].double() - wanted[finite].double()).abs().max().item()
    # Float64 is compared with sums of float64; half types also round what lies between two sums.
    allowed = 64 * torch.finfo(got.dtype).eps * (1 + wanted[finite].abs().max().item())
    return None if error <= allowed else f"differs by {error:.3g}, allowed is {allowed:.3g}"
