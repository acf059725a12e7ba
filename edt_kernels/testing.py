"""What tests of ragged kernels need: packed inputs, and a bound on the error of a kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from edt_kernels import _library, _native


def ragged(
    lengths: Sequence[int],
    *shape: int,
    tail: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Normal values [sum(lengths) + tail, *shape] and their offsets [B + 1].

    Drawn in float64 and rounded, so that every dtype gets the same numbers up to its rounding.

    Example:
        >>> values, offsets = ragged([2, 0, 3], 4, tail=1)
        >>> values.shape, offsets
        (torch.Size([6, 4]), tensor([0, 2, 2, 5]))
    """
    generator = torch.Generator().manual_seed(seed)
    rows = sum(lengths) + tail
    values = torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
    return values.to(dtype), torch.tensor([0, *lengths]).cumsum(0)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, of torch and of the native kernels: what is not written shows.

    Example:
        >>> with poisoned():
        ...     print(torch.empty(2))
        tensor([nan, nan])
    """
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    _native.poison(True)
    try:
        yield
    finally:
        _native.poison(False)
        torch.use_deterministic_algorithms(before, warn_only=warned)


class OnReferences(TorchDispatchMode):
    """Inside, every op of this package runs its reference, backward too.

    Example:
        >>> import torch, edt_kernels
        >>> with OnReferences():
        ...     edt_kernels.entropy(torch.zeros(1, 2), unit="bits")
        tensor([1.])
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """The reference of an op of this package; every other op as it is."""
        if func.namespace == "edt":
            func = _library.REFERENCES[func.__name__.split(".")[0]]
        return func(*args, **(kwargs or {}))


def assert_within_budget(
    ours: Tensor, same_dtype: Tensor, fp64: Tensor, *, eps: float | None = None
) -> None:
    """The largest error of `ours` is at most twice that of torch in the same dtype, plus `eps`.

    Args:
        ours: the kernel's result.
        same_dtype: torch's result, of the dtype of `ours`.
        fp64: the truth, computed in float64 from the same inputs.
        eps: half a unit in the last place of the largest number, unless given.

    Raises:
        AssertionError: the error is larger, or infinities and NaN are not where they must be.

    Example:
        >>> truth = torch.tensor([1.0, 2.0]).double()
        >>> assert_within_budget(truth.float(), truth.float(), truth)
    """
    if not ours.dtype == same_dtype.dtype or not ours.shape == same_dtype.shape == fp64.shape:
        raise AssertionError(
            f"got {ours.dtype} {tuple(ours.shape)}, torch {same_dtype.dtype} "
            f"{tuple(same_dtype.shape)}, truth {tuple(fp64.shape)}"
        )
    finite = fp64.isfinite()
    torch.testing.assert_close(ours[~finite].double(), fp64[~finite], equal_nan=True)
    if not finite.any():
        return
    truth = fp64[finite]
    error = (ours[finite].double() - truth).abs().max().item()
    theirs = (same_dtype[finite].double() - truth).abs().max().item()
    if eps is None:
        eps = torch.finfo(ours.dtype).eps / 2 * truth.abs().max().item()
    if not error <= 2 * theirs + eps:
        raise AssertionError(
            f"the largest error is {error:.3g}, allowed is {2 * theirs + eps:.3g}: "
            f"twice torch's {theirs:.3g} plus {eps:.3g}"
        )
