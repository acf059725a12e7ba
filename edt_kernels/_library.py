"""The operator library `edt`: one place that knows how an op is registered and differentiated.

An op is a schema, a fake (shapes only), a reference in plain torch that serves every device, and
kernels that the dispatcher prefers: native code on the CPU where it is loaded; on NVIDIA GPUs
Triton where it is installed, or CUDA C++ where EDT_CUDA_NATIVE=1 asks for it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from edt_kernels import _native

_LIBRARY = torch.library.Library("edt", "DEF")
NAMES: list[str] = []  # of every op defined, in order
REFERENCES: dict[str, Callable] = {}  # by op
LAUNCHERS: dict[str, Callable[[], Callable]] = {}  # by op, imports and returns its Triton launcher
_PLAIN = (Tensor, torch.nn.Parameter)


def define(
    schema: str, *, reference: Callable, fake: Callable, triton: str | None = None
) -> torch._ops.OpOverload:
    """Define `edt::NAME(...)` and return it, bound.

    Args:
        schema: `"name(Tensor x) -> Tensor"`. Fixed arity: ops always return all they compute.
        reference: plain torch, registered for every device.
        fake: the same signature, returns empty outputs of the right shapes and dtypes.
        triton: `"module:function"` below `edt_kernels.triton`, the same signature, serves CUDA
            tensors; imported by the first call.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    REFERENCES[name] = reference
    if triton is not None:
        launcher = LAUNCHERS[name] = _imported_once(*triton.split(":"))
        in_cuda = _native.cuda_asked and name in _native.CUDA_OPS
        if has_triton() and not in_cuda:
            _LIBRARY.impl(name, lambda *args: launcher()(*args), "CUDA")
    # Gradients live in the autograd.Function of the public function: the raw op has none.
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"edt::{name}", fake, lib=_LIBRARY)
    NAMES.append(name)
    return getattr(torch.ops.edt, name).default


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, which importing this package does not import."""
    found = importlib.util.find_spec("triton")
    return found is not None and found.origin is not None  # a folder of that name has none


def _imported_once(module: str, function: str) -> Callable[[], Callable]:
    @functools.cache
    def launcher() -> Callable:
        return getattr(importlib.import_module(f"edt_kernels.triton.{module}"), function)

    return launcher


def kernel_checks(x: object) -> bool:
    """Whether a native kernel will serve a call with `x` and refuse what it cannot take.

    Then Python's checks wait for the refusal, and say in the user's words what was wrong: done
    first they would cost more than a small kernel.
    """
    return _native.loaded and type(x) in _PLAIN and x.is_cpu and not is_compiling()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records this call: without it the raw op is called, 8 us cheaper.

    A raw op would drop the tangents of forward-mode differentiation, which are refused.
    """
    if forward_ad._current_level >= 0 and not is_compiling():
        for t in tensors:
            if t is not None and forward_ad.unpack_dual(t).tangent is not None:
                raise NotImplementedError(
                    "edt_kernels differentiates backwards (torch.autograd.grad, .backward()); an "
                    "input carries a forward-mode tangent (torch.func.jvp, forward_ad.make_dual)"
                )
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def distinct(*arguments: Tensor | None) -> tuple[Tensor | None, ...]:
    """Arguments of an `autograd.Function`, which compiled code must not give one tensor twice.

    Where keys are their own values, the second is a view. Offsets and options come behind them as
    one tuple: every argument costs 0.4 us, and what has no gradient needs to be none.
    """
    if not is_compiling():
        return arguments
    seen: list[Tensor | None] = []
    for x in arguments:
        again = x is not None and any(x is other for other in seen)
        seen.append(x.view_as(x) if again else x)
    return tuple(seen)


def second_order() -> bool:
    """Inside a backward: will it be differentiated again (`create_graph=True`)?

    Double backward is an eager feature, so a compiled backward always takes the kernel.
    """
    return torch.is_grad_enabled() and not is_compiling()


def composite_backward(
    reference: Callable, inputs: Sequence[object], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of `reference(*inputs)` for every input, themselves differentiable.

    `reference` returns a tensor or a tuple whose entries pair with `grads`; entries of `inputs`
    that are no float tensors, or require no gradient, get None.
    """
    result: list[Tensor | None] = [None] * len(inputs)
    wanted = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
    if not wanted:
        return tuple(result)
    # One tensor may be two inputs, or one input be made of another: what flows into the one is not
    # what flows into the other.
    inputs = [x.view_as(x) if i in wanted else x for i, x in enumerate(inputs)]
    outputs = reference(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=False) if g is not None]
    found = torch.autograd.grad(
        [output for output, _ in pairs],
        [inputs[i] for i in wanted],
        [grad for _, grad in pairs],
        create_graph=True,
        allow_unused=True,
    )
    for i, grad in zip(wanted, found, strict=True):
        result[i] = grad
    return tuple(result)
