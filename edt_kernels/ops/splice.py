"""Splicing of molecule tokens into the input embeddings of a language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edt_kernels import _check, reference
from edt_kernels._library import define, distinct, kernel_checks, needs_grad, second_order


def _fake(
    embeds: Tensor,
    tokens: Tensor,
    token_offsets: Tensor,
    slots: Tensor,
    new_rows: Tensor | None,
    new_ids: Tensor | None,
) -> Tensor:
    return embeds.new_empty(embeds.shape)


def _fake_bwd(
    grad: Tensor,
    token_offsets: Tensor,
    slots: Tensor,
    new_ids: Tensor | None,
    tokens: int,
    added: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    width = grad.shape[-1]
    shapes = (grad.shape, (tokens, width), (added, width))
    return tuple(
        grad.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)
    )


_splice = define(
    "splice(Tensor embeds, Tensor tokens, Tensor token_offsets, Tensor slots, Tensor? new_rows,"
    " Tensor? new_ids) -> Tensor",
    reference=reference.splice,
    fake=_fake,
    triton="splice:splice",
)
_splice_bwd = define(
    "splice_bwd(Tensor grad, Tensor token_offsets, Tensor slots, Tensor? new_ids, SymInt tokens,"
    " SymInt added, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    reference=reference.splice_bwd,
    fake=_fake_bwd,
    triton="splice:splice_bwd",
)


class _Splice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        embeds: Tensor,
        tokens: Tensor,
        new_rows: Tensor | None,
        places: tuple[Tensor, Tensor, Tensor | None],
    ) -> Tensor:
        token_offsets, slots, new_ids = places
        ctx.save_for_backward(token_offsets, slots, new_ids)
        ctx.sizes = tokens.shape[0], 0 if new_rows is None else new_rows.shape[0]
        return _splice(embeds, tokens, token_offsets, slots, new_rows, new_ids)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        bwd = reference.splice_bwd if second_order() else _splice_bwd
        wanted = ctx.needs_input_grad[:3]
        found = bwd(grad, *ctx.saved_tensors, *ctx.sizes, wanted)
        return *(g if want else None for g, want in zip(found, wanted, strict=True)), None


def splice(
    embeds: Tensor,
    tokens: Tensor,
    token_offsets: Tensor,
    slots: Tensor,
    *,
    new_rows: Tensor | None = None,
    new_ids: Tensor | None = None,
) -> Tensor:
    """Input embeddings of a language model with molecule tokens in their slots.

    The n-th slot of row b becomes tokens[token_offsets[b] + n]; elsewhere a position with
    new_ids >= 0 becomes new_rows[new_ids], and every other position keeps its text embedding.

    Args:
        embeds: [B, S, E], or packed [T, E], which counts as one row: what the model itself computed
            for the prompt, so scaled, quantised and sharded tables work. float32, bfloat16,
            float16 or float64.
        tokens: [M, E], the dtype of `embeds`.
        token_offsets: [B + 1] ([2] for packed `embeds`), int32 or int64: row b owns tokens
            token_offsets[b] to token_offsets[b+1]. Tokens beyond the last are tail: never read,
            gradient 0. A row may own none.
        slots: bool, [B, S] or [T]: True at the placeholders, as many in every row as the row owns
            tokens.
        new_rows: [K, E] with K >= 1, the dtype of `embeds`: trained embeddings of added tokens.
        new_ids: int64, [B, S] or [T]: the row of `new_rows` that a position takes, or -1.

    Returns:
        A new tensor of the shape of `embeds`. Differentiable twice in `embeds`, `tokens` and
        `new_rows`; the gradient of a new row is the sum over its positions in their order.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices disagree; a row has more or fewer slots than tokens; one of
            `new_rows` and `new_ids` comes alone; `token_offsets` or `new_ids` is malformed.

    Example:
        >>> import torch, edt_kernels
        >>> embeds, tokens = torch.zeros(2, 3, 1), torch.tensor([[1.0], [2.0], [3.0]])
        >>> slots = torch.tensor([[False, True, True], [True, False, False]])
        >>> edt_kernels.splice(embeds, tokens, torch.tensor([0, 2, 3]), slots).squeeze(-1)
        tensor([[0., 1., 2.],
                [3., 0., 0.]])
    """
    if not kernel_checks(embeds):
        _check_tokens(embeds, tokens, token_offsets, slots)
        _check_new(embeds, new_rows, new_ids)
    try:
        if needs_grad(embeds, tokens, new_rows):
            places = (token_offsets, slots, new_ids)
            return _Splice.apply(*distinct(embeds, tokens, new_rows), places)
        return _splice(embeds, tokens, token_offsets, slots, new_rows, new_ids)
    except Exception:
        _check_tokens(embeds, tokens, token_offsets, slots)
        _check_new(embeds, new_rows, new_ids)
        _check.offsets_content("token_offsets", token_offsets, tokens.shape[0])
        _slots_content(slots, token_offsets)
        if new_rows is not None and new_ids is not None:
            _ids_content(new_ids, new_rows.shape[0])
        raise


def _check_tokens(embeds: object, tokens: object, token_offsets: object, slots: object) -> None:
    _check.tensor("embeds", embeds)
    if embeds.dim() not in (2, 3):
        raise ValueError(f"embeds must have shape [B, S, E] or [T, E], got {tuple(embeds.shape)}")
    _check.tensor("tokens", tokens, dims=2)
    _check_rows("tokens", tokens, embeds)
    _check.offsets("token_offsets", token_offsets, embeds)
    rows = embeds.shape[0] if embeds.dim() == 3 else 1
    if token_offsets.shape[0] != rows + 1:
        raise ValueError(
            f"token_offsets must have shape [B + 1] with B = {rows} rows of embeds, "
            f"got shape {tuple(token_offsets.shape)}"
        )
    _check.tensor("slots", slots, dtypes=(torch.bool,))
    _per_position("slots", slots, embeds)


def _check_new(embeds: Tensor, new_rows: object, new_ids: object) -> None:
    if (new_rows is None) != (new_ids is None):
        missing = "new_rows" if new_rows is None else "new_ids"
        raise ValueError(f"new_rows and new_ids must come together, got {missing}=None")
    if new_rows is None or new_ids is None:
        return
    _check.tensor("new_rows", new_rows, dims=2)
    _check_rows("new_rows", new_rows, embeds)
    if new_rows.shape[0] == 0:
        raise ValueError(f"new_rows must have at least one row, got {tuple(new_rows.shape)}")
    _check.tensor("new_ids", new_ids, dtypes=(torch.int64,))
    _per_position("new_ids", new_ids, embeds)


def _check_rows(name: str, value: Tensor, embeds: Tensor) -> None:
    """Rows that may stand beside those of `embeds`."""
    _check.same_dtype(name, value, embeds)
    _check.same_device(name, value, embeds)
    if value.shape[1] != embeds.shape[-1]:
        raise ValueError(
            f"{name} must have rows of width E = {embeds.shape[-1]}, got {tuple(value.shape)}"
        )


def _per_position(name: str, value: Tensor, embeds: Tensor) -> None:
    """One entry per position of `embeds`."""
    _check.same_device(name, value, embeds)
    if value.shape != embeds.shape[:-1]:
        raise ValueError(
            f"{name} must have shape {tuple(embeds.shape[:-1])}, one entry per position of embeds, "
            f"got {tuple(value.shape)}"
        )


def _slots_content(slots: Tensor, token_offsets: Tensor) -> None:
    """Raise for the first row whose numbers of slots and tokens differ."""
    counts = slots.reshape(token_offsets.shape[0] - 1, -1).sum(1).tolist()
    for row, (slot, token) in enumerate(zip(counts, token_offsets.diff().tolist(), strict=True)):
        if slot != token:
            raise ValueError(
                f"slots must mark as many positions as the row has tokens, got {slot} slots and "
                f"{token} tokens in row {row}"
            )


def _ids_content(new_ids: Tensor, added: int) -> None:
    """Raise for the first id that names no new row."""
    bad = (new_ids >= added).nonzero()
    if len(bad):
        where = tuple(bad[0].tolist())
        raise ValueError(
            f"new_ids must be below {added}, the number of new_rows, "
            f"got {int(new_ids[where])} at {where}"
        )
