"""How kernels are launched, and what a launcher would launch, without launching it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Configuration(NamedTuple):
    """A call of a launcher whose launches ship.

    Attributes:
        name: sizes and options, as in "768-order".
        launcher: takes what the raw op takes.
        arguments: of the launcher, all tensors 0 on one device.
    """

    name: str
    launcher: Callable
    arguments: tuple


class Launch(NamedTuple):
    """A kernel with everything that its compilation depends on.

    Attributes:
        kernel: the decorated function.
        arguments: by the names of its parameters, constants included.
        options: of the compiler, such as `num_warps`.
    """

    kernel: Any
    arguments: dict[str, object]
    options: dict[str, int]


_recorded: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    """Run `kernel` on the device of its first argument, a tensor or several.

    Args:
        kernel: a function that `triton.jit` decorates.
        grid: number of programs, 1 to 3 dimensions, a function of shapes and options only.
        arguments: tensors and numbers, by position.
        constants: `tl.constexpr` parameters and options of the compiler, by name.
    """
    constants.setdefault("enable_fp_fusion", True)  # Triton 3.10 changes the default
    if _recorded is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        options = {name: named.pop(name) for name in constants if name not in kernel.arg_names}
        _recorded.append(Launch(kernel, named, options))
        return
    first = arguments[0]
    device = (first[0] if isinstance(first, tuple) else first).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def record(configuration: Configuration) -> list[Launch]:
    """What a configuration on the device "meta" launches.

    A launcher that read the contents of a tensor would fail here: there are none.
    """
    global _recorded
    _recorded = []
    try:
        configuration.launcher(*configuration.arguments)
        return _recorded
    finally:
        _recorded = None
