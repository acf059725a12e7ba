"""Insertion of molecule tokens into packed text, whose rows grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edt_kernels import _check, reference
from edt_kernels._library import define, distinct, kernel_checks, needs_grad, second_order


class Inserted(NamedTuple):
    """Packed text with molecule tokens between its embeddings, T + M rows.

    Attributes:
        embeds: [T + M, E]; 0 in the tail.
        offsets: [B + 1], the rows of text with what was inserted, in the dtype of `embed_offsets`.
        positions: [T + M] int64, counted from 0 in every row; 0 in the tail.
        labels: [T + M] int64, -100 at inserted tokens and in the tail; None without labels.
    """

    embeds: Tensor
    offsets: Tensor
    positions: Tensor
    labels: Tensor | None


def _fake(
    embeds: Tensor,
    embed_offsets: Tensor,
    tokens: Tensor,
    token_offsets: Tensor,
    at: Tensor,
    rows: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    capacity = embeds.shape[0] + tokens.shape[0]
    return (
        embeds.new_empty(capacity, embeds.shape[1]),
        torch.empty_like(embed_offsets),
        at.new_empty(capacity),
        at.new_empty(0 if labels is None else capacity),
    )


def _fake_bwd(
    grad: Tensor,
    embed_offsets: Tensor,
    token_offsets: Tensor,
    at: Tensor,
    rows: int,
    tokens: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    shapes = ((rows, grad.shape[1]), (tokens, grad.shape[1]))
    return tuple(
        grad.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)
    )


_insert = define(
    "insert(Tensor embeds, Tensor embed_offsets, Tensor tokens, Tensor token_offsets, Tensor at,"
    " Tensor? rows, Tensor? labels) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.insert,
    fake=_fake,
    triton="insert:insert",
)
_insert_bwd = define(
    "insert_bwd(Tensor grad, Tensor embed_offsets, Tensor token_offsets, Tensor at, SymInt rows,"
    " SymInt tokens, bool[] wanted) -> (Tensor, Tensor)",
    reference=reference.insert_bwd,
    fake=_fake_bwd,
    triton="insert:insert_bwd",
)


class _Insert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        embeds: Tensor,
        tokens: Tensor,
        places: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        embed_offsets, token_offsets, at, rows, labels = places
        out = _insert(embeds, embed_offsets, tokens, token_offsets, at, rows, labels)
        ctx.save_for_backward(embed_offsets, token_offsets, at)
        ctx.sizes = embeds.shape[0], tokens.shape[0]
        ctx.mark_non_differentiable(*out[1:])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        bwd = reference.insert_bwd if second_order() else _insert_bwd
        wanted = ctx.needs_input_grad[:2]
        embeds, tokens = bwd(grad, *ctx.saved_tensors, *ctx.sizes, wanted)
        return embeds if wanted[0] else None, tokens if wanted[1] else None, None


def insert(
    embeds: Tensor,
    embed_offsets: Tensor,
    tokens: Tensor,
    token_offsets: Tensor,
    at: Tensor,
    *,
    rows: Tensor | None = None,
    labels: Tensor | None = None,
) -> Inserted:
    """Packed input embeddings of a language model, made longer by molecule tokens.

    Group g, the tokens of one molecule, is inserted before text embedding at[g]; groups of one
    place stand in their order. A row of text takes any number of groups. For packed (padding-free)
    prompts with a placeholder per molecule, and tokenised without the placeholders, `at` is where
    the placeholders stood; between `<mol>` and `</mol>` it is where `</mol>` stands. Where the
    placeholders are already expanded to one per token, `splice` fills them.

    Args:
        embeds: [T, E], what the model computed for the text. float32, bfloat16, float16 or float64.
        embed_offsets: [B + 1], int32 or int64, the rows of text, which may be empty. Embeddings
            beyond the last offset are left out, with gradient 0.
        tokens: [M, E], the dtype of `embeds`.
        token_offsets: [G + 1], int32 or int64, the tokens of every group, which may be empty.
            Tokens beyond the last offset are left out, with gradient 0.
        at: [G] int64, places in the packed text, 0 <= at <= embed_offsets[-1], not decreasing.
        rows: [G] int64, the row of text of every group, not decreasing, where embed_offsets[rows]
            <= at <= embed_offsets[rows + 1]. It decides at a border: the end of one row is where
            the next begins. Unless given, a group belongs to the last row that begins at or before
            its place, so nothing is inserted at the end of a row but the last, nor in an empty row
            before others.
        labels: [T] int64, the targets of the text.

    Returns:
        `Inserted(embeds, offsets, positions, labels)`, ready for a packed forward: `offsets` are
        the `cu_seqlens` of attention kernels, `positions` the `position_ids`. T + M rows whatever
        the offsets say; what is left out makes the tail. `embeds` is differentiable twice, in
        `embeds` and `tokens`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices disagree, or the contents of offsets, `at` or `rows` are
            malformed.

    A row's result does not depend on the other rows.

    Example:
        >>> import torch, edt_kernels
        >>> text, offsets = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 2, 3])
        >>> tokens, token_offsets = torch.tensor([[7.0], [8.0], [9.0]]), torch.tensor([0, 2, 3])
        >>> at, rows = torch.tensor([1, 3]), torch.tensor([0, 1])
        >>> longer = edt_kernels.insert(text, offsets, tokens, token_offsets, at, rows=rows)
        >>> longer.embeds.squeeze(-1)
        tensor([1., 7., 8., 2., 3., 9.])
        >>> longer.offsets, longer.positions
        (tensor([0, 4, 6]), tensor([0, 1, 2, 3, 0, 1]))
    """
    if not kernel_checks(embeds):
        _check_arguments(embeds, embed_offsets, tokens, token_offsets, at, rows, labels)
    try:
        if needs_grad(embeds, tokens):
            places = (embed_offsets, token_offsets, at, rows, labels)
            inserted = _Insert.apply(*distinct(embeds, tokens), places)
        else:
            inserted = _insert(embeds, embed_offsets, tokens, token_offsets, at, rows, labels)
        longer, offsets, positions, targets = inserted
    except Exception:
        _check_arguments(embeds, embed_offsets, tokens, token_offsets, at, rows, labels)
        _check.offsets_content("embed_offsets", embed_offsets, embeds.shape[0])
        _check.offsets_content("token_offsets", token_offsets, tokens.shape[0])
        _check_places(embed_offsets.tolist(), at.tolist())
        if rows is not None:
            _check_groups(embed_offsets.tolist(), at.tolist(), rows.tolist())
        raise
    return Inserted(longer, offsets, positions, None if labels is None else targets)


def _check_arguments(
    embeds: object,
    embed_offsets: object,
    tokens: object,
    token_offsets: object,
    at: object,
    rows: object,
    labels: object,
) -> None:
    _check.tensor("embeds", embeds, dims=2)
    _check.offsets("embed_offsets", embed_offsets, embeds)
    _check.tensor("tokens", tokens, dims=2)
    _check.same_dtype("tokens", tokens, embeds)
    _check.same_device("tokens", tokens, embeds)
    if tokens.shape[1] != embeds.shape[1]:
        raise ValueError(
            f"tokens must have rows of width E = {embeds.shape[1]}, got {tuple(tokens.shape)}"
        )
    _check.offsets("token_offsets", token_offsets, embeds)
    groups = token_offsets.shape[0] - 1
    _check_integers("at", at, embeds, groups, "one place per group of token_offsets")
    if rows is not None:
        _check_integers("rows", rows, embeds, groups, "one row per group of token_offsets")
    if labels is not None:
        _check_integers("labels", labels, embeds, embeds.shape[0], "one label per row of embeds")


def _check_integers(name: str, value: object, like: Tensor, count: int, why: str) -> None:
    _check.tensor(name, value, dims=1, dtypes=(torch.int64,))
    _check.same_device(name, value, like)
    if value.shape[0] != count:
        raise ValueError(
            f"{name} must have shape ({count},), {why}, got shape {tuple(value.shape)}"
        )


def _check_places(offsets: list[int], at: list[int]) -> None:
    """Raise for the first group that stands outside the text or before the group before it."""
    if at and len(offsets) == 1:
        raise ValueError(f"at must be empty where embed_offsets has no rows, got {len(at)} groups")
    for g, place in enumerate(at):
        if not 0 <= place <= offsets[-1]:
            raise ValueError(
                f"at must lie between 0 and embed_offsets[-1] = {offsets[-1]}, "
                f"got at[{g}] = {place}"
            )
        if g and place < at[g - 1]:
            raise ValueError(f"at must not decrease, got at[{g}] = {place} after {at[g - 1]}")


def _check_groups(offsets: list[int], at: list[int], rows: list[int]) -> None:
    """Raise for the first group whose row does not exist, is out of order or lies elsewhere."""
    for g, (place, row) in enumerate(zip(at, rows, strict=True)):
        if not 0 <= row < len(offsets) - 1:
            raise ValueError(
                f"rows must lie between 0 and {len(offsets) - 2}, the last row of embed_offsets, "
                f"got rows[{g}] = {row}"
            )
        if g and row < rows[g - 1]:
            raise ValueError(f"rows must not decrease, got rows[{g}] = {row} after {rows[g - 1]}")
        if not offsets[row] <= place <= offsets[row + 1]:
            raise ValueError(
                f"at must lie in the row of its group, between {offsets[row]} and "
                f"{offsets[row + 1]} in row {row}, got at[{g}] = {place}"
            )
