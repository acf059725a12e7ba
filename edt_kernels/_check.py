"""Argument checks: every message names the argument, what is required and what came."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(name: str, value: object, *, dims: int | None = None, dtypes: tuple = FLOATS) -> None:
    """A tensor of one of `dtypes`, with `dims` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {str(value.dtype).removeprefix('torch.')}")
    if dims is not None and value.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(value.shape)}")


def rows(name: str, value: Tensor) -> None:
    """A tensor [N, ...], not a scalar."""
    if value.dim() == 0:
        raise ValueError(f"{name} must have shape [N, ...], got shape ()")


def offsets(name: str, value: object, like: Tensor) -> None:
    """Offsets [B + 1], int32 or int64, on the device of `like`. Contents: see `offsets_content`."""
    tensor(name, value, dims=1, dtypes=(torch.int64, torch.int32))
    if value.shape[0] == 0:
        raise ValueError(f"{name} must have shape [B + 1] with B >= 0, got shape (0,)")
    same_device(name, value, like)


def same_device(name: str, value: Tensor, like: Tensor) -> None:
    """Two tensors that one op reads lie on one device."""
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")


def same_dtype(name: str, value: Tensor, like: Tensor) -> None:
    """Operands of one op have one dtype: nothing is cast in silence."""
    if value.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype}, got {value.dtype}")


def number(name: str, value: object, *, whole: bool = False, scalar: bool = False) -> None:
    """A number, of numpy's too, or an int if `whole`; with `scalar` also a tensor of shape ()."""
    kinds = (Integral, torch.SymInt) if whole else (Real, torch.SymInt, torch.SymFloat)
    if scalar and isinstance(value, Tensor) and value.dim() == 0:
        return
    if not isinstance(value, kinds):
        wanted = "an int" if whole else "a number"
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")


def choice(name: str, value: object, options: tuple) -> None:
    """One of a few names."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def offsets_content(name: str, value: Tensor, rows: int) -> None:
    """Raise for the first bad entry of `value`, whose last may be at most `rows`.

    Reads the contents, so it is called after a kernel refused them, or on request.
    """
    entries = value.tolist()
    if entries[0] != 0:
        raise ValueError(f"{name}[0] must be 0, got {entries[0]}")
    for i in range(1, len(entries)):
        if entries[i] < entries[i - 1]:
            raise ValueError(
                f"{name} must not decrease, got {name}[{i}] = {entries[i]} after {entries[i - 1]}"
            )
    if entries[-1] > rows:
        raise ValueError(f"{name}[-1] must be at most the number of rows {rows}, got {entries[-1]}")
