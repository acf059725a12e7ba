"""Borders of the packed form: to and from padded, nested, PyTorch Geometric and per-molecule data.

Plain torch, differentiable. Inside the library batches stay packed; these serve the neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edt_kernels import _check
from edt_kernels.reference.ragged import segment_ids


def offsets_from_lengths(lengths: Tensor) -> Tensor:
    """Offsets [B + 1] of molecules with `lengths` [B] rows, in the dtype of `lengths`.

    Args:
        lengths: [B], int32 or int64, each at least 0.

    Raises:
        TypeError: `lengths` is no integer tensor.
        ValueError: it is not one-dimensional or, checked on the CPU, holds a negative length or
            int32 lengths whose sum is none.

    Example:
        >>> import torch
        >>> from edt_kernels import offsets_from_lengths
        >>> offsets_from_lengths(torch.tensor([2, 0, 3]))
        tensor([0, 2, 2, 5])
    """
    _check.tensor("lengths", lengths, dims=1, dtypes=(torch.int64, torch.int32))
    ends = lengths.cumsum(0, dtype=lengths.dtype)
    if _readable(lengths) and lengths.shape[0] > 0:
        if (least := int(lengths.min())) < 0:
            raise ValueError(f"lengths must be at least 0, got {least}")
        if lengths.dtype == torch.int32 and int(ends.min()) < 0:
            raise ValueError(f"lengths must be int64 for a sum of {int(lengths.sum())}, got int32")
    return torch.cat([lengths.new_zeros(1), ends])


def offsets_from_batch(batch: Tensor, num_molecules: int | None = None) -> Tensor:
    """Offsets [B + 1] of the sorted `batch` vector that PyTorch Geometric gives every atom.

    Args:
        batch: [N] int64, the molecule of every atom, not decreasing. Atoms of a molecule from
            `num_molecules` on are tail.
        num_molecules: B; None reads it from the last atom, which misses empty molecules at the
            end and waits for a GPU.

    Raises:
        TypeError: `batch` is not int64.
        ValueError: it is not one-dimensional or, checked on the CPU, decreases or is negative.

    Example:
        >>> import torch
        >>> from edt_kernels import offsets_from_batch
        >>> offsets_from_batch(torch.tensor([0, 0, 2]), 4)
        tensor([0, 2, 2, 3, 3])
    """
    _check.tensor("batch", batch, dims=1, dtypes=(torch.int64,))
    if _readable(batch) and batch.shape[0] > 0:
        if batch[0] < 0:
            raise ValueError(f"batch must hold molecules from 0 on, got {int(batch[0])}")
        falls = (batch.diff() < 0).nonzero()
        if len(falls):
            raise ValueError(f"batch must not decrease, got a fall after atom {int(falls[0])}")
    if num_molecules is None:
        num_molecules = int(batch[-1]) + 1 if batch.shape[0] else 0
    return torch.searchsorted(batch, torch.arange(num_molecules + 1, device=batch.device))


def pad(
    values: Tensor, offsets: Tensor, *, length: int | None = None, fill: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A padded batch and its mask, for consumers that take no packed input.

    Args:
        values: [N, ...], any dtype. Rows beyond offsets[-1] are left out, with gradient 0.
        offsets: [B + 1], int32 or int64.
        length: S, at least the longest molecule; None reads that from `offsets` and waits for a
            GPU. With a length it compiles with `fullgraph=True`.
        fill: what the padding holds.

    Returns:
        `(padded [B, S, ...], mask [B, S])`, the mask True where a row of `values` lies.
        Differentiable in `values`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: `offsets` is malformed or, checked on the CPU, a molecule is longer than S.

    Example:
        >>> import torch, edt_kernels
        >>> edt_kernels.pad(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 3]))[0]
        tensor([[1., 0.],
                [2., 3.]])
    """
    lengths = _lengths(values, offsets)
    longest = None
    if length is None or _readable(offsets):
        longest = int(lengths.max()) if lengths.shape[0] else 0
    if length is None:
        length = longest
    elif longest is not None and longest > length:
        raise ValueError(f"length must be at least {longest}, the longest molecule, got {length}")
    place = _places(offsets, values.shape[0], length)
    size = lengths.shape[0] * length
    padded = values.new_full((size + 1, *values.shape[1:]), fill).index_copy(0, place, values)
    mask = torch.arange(length, device=offsets.device) < lengths.unsqueeze(1)
    return padded[:size].unflatten(0, (lengths.shape[0], length)), mask


def unpad(padded: Tensor, offsets: Tensor, *, rows: int | None = None) -> Tensor:
    """The packed rows of a padded batch: the inverse of `pad`.

    Args:
        padded: [B, S, ...], any dtype; the padding is never read and has gradient 0.
        offsets: [B + 1], int32 or int64, of molecules with at most S rows.
        rows: N, at least offsets[-1]; None reads that and waits for a GPU. With it the function
            compiles with `fullgraph=True`.

    Returns:
        [N, ...]; rows beyond offsets[-1] are 0. Differentiable in `padded`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes disagree, `offsets` is malformed or, checked on the CPU, a molecule is
            longer than S.

    Example:
        >>> import torch, edt_kernels
        >>> edt_kernels.unpad(torch.tensor([[1, 0], [2, 3]]), torch.tensor([0, 1, 3]))
        tensor([1, 2, 3])
    """
    _tensor("padded", padded)
    if padded.dim() < 2:
        raise ValueError(f"padded must have shape [B, S, ...], got {tuple(padded.shape)}")
    _check.offsets("offsets", offsets, padded)
    molecules, length = padded.shape[:2]
    if offsets.shape[0] != molecules + 1:
        raise ValueError(
            f"offsets must have shape [B + 1] with B = {molecules} rows of padded, "
            f"got shape {tuple(offsets.shape)}"
        )
    if rows is None:
        rows = int(offsets[-1])
    if _readable(offsets):
        _check.offsets_content("offsets", offsets, rows)
        longest = int(offsets.diff().max()) if molecules else 0
        if longest > length:
            raise ValueError(
                f"padded must have S >= {longest}, the longest molecule, got shape "
                f"{tuple(padded.shape)}"
            )
    nothing = padded.new_zeros(1, *padded.shape[2:])
    source = _places(offsets, rows, length)
    return torch.cat([padded.flatten(0, 1), nothing]).index_select(0, source)


def to_nested(values: Tensor, offsets: Tensor) -> Tensor:
    """A `torch.nested` jagged tensor of the molecules [B, *, ...], sharing memory with `values`.

    Args:
        values: [N, ...], any dtype. Rows beyond offsets[-1] are left out (waits for a GPU).
        offsets: [B + 1], int32 or int64.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: `offsets` is malformed.

    Example:
        >>> import torch, edt_kernels
        >>> nested = edt_kernels.to_nested(torch.arange(3.0), torch.tensor([0, 1, 3]))
        >>> [molecule.tolist() for molecule in nested.unbind()]
        [[0.0], [1.0, 2.0]]
    """
    _lengths(values, offsets)
    return torch.nested.nested_tensor_from_jagged(values[: int(offsets[-1])], offsets)


def from_nested(nested: Tensor) -> tuple[Tensor, Tensor]:
    """`(values [N, ...], offsets [B + 1])` of a jagged nested tensor, without a copy.

    Raises:
        TypeError: `nested` is no nested tensor of layout `torch.jagged`.
        ValueError: it has holes (a `lengths` of its own) or its ragged dimension is not the first
            after the batch.

    Example:
        >>> import torch, edt_kernels
        >>> nested = torch.nested.nested_tensor(
        ...     [torch.ones(1), torch.ones(2)], layout=torch.jagged
        ... )
        >>> edt_kernels.from_nested(nested)[1]
        tensor([0, 1, 3])
    """
    if not isinstance(nested, Tensor) or nested.layout != torch.jagged:
        came = nested.layout if isinstance(nested, Tensor) else type(nested).__name__
        raise TypeError(f"nested must be a nested tensor of layout torch.jagged, got {came}")
    if nested.lengths() is not None:
        raise ValueError("nested must be contiguous, got one with lengths of its own")
    if nested._ragged_idx != 1:
        raise ValueError(f"nested must be ragged in dimension 1, got {nested._ragged_idx}")
    return nested.values(), nested.offsets()


def ragged_split(values: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """The rows of every molecule as a view of `values`, B tensors. Waits for a GPU.

    Args:
        values: [N, ...], any dtype. Rows beyond offsets[-1] are in no molecule.
        offsets: [B + 1], int32 or int64.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: `offsets` is malformed.

    Example:
        >>> import torch, edt_kernels
        >>> edt_kernels.ragged_split(torch.arange(3), torch.tensor([0, 1, 3]))
        (tensor([0]), tensor([1, 2]))
    """
    lengths = _lengths(values, offsets).tolist()
    return values[: sum(lengths)].split(lengths) if lengths else ()


def _lengths(values: Tensor, offsets: Tensor) -> Tensor:
    """Lengths [B] of checked offsets of `values`."""
    _tensor("values", values)
    _check.rows("values", values)
    _check.offsets("offsets", offsets, values)
    if _readable(offsets):
        _check.offsets_content("offsets", offsets, values.shape[0])
    return offsets.diff()


def _places(offsets: Tensor, rows: int, length: int) -> Tensor:
    """The row of the flattened padded batch for every packed row; B * S for the tail."""
    molecules = offsets.shape[0] - 1
    ids = segment_ids(offsets, rows)
    index = torch.arange(molecules + 1, device=offsets.device)
    shift = (index * length - offsets).index_select(0, ids)
    place = torch.arange(rows, device=offsets.device) + shift
    return place.masked_fill(ids == molecules, molecules * length)


def _tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _readable(x: Tensor) -> bool:
    """Whether contents can be read without waiting for a device or breaking a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
