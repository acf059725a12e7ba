"""Molecule tokens and trained embeddings of new tokens, spliced into a prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edt_kernels.ops.splice import splice


class Splice(nn.Module):
    """`edt_kernels.splice` with the trained embeddings `new_rows` of tokens that were added.

    The table of a frozen language model stays as it is: new tokens, such as one that opens a
    molecule, have their embeddings here.

    Args:
        num_new: K >= 1, added tokens.
        width: E, of the language model's embeddings.

    Raises:
        ValueError: there are no new rows; `edt_kernels.splice` itself needs no module.

    Example:
        >>> import torch
        >>> from edt_kernels.nn import Splice
        >>> splice = Splice(1, 4)
        >>> embeds, tokens = torch.zeros(1, 3, 4), torch.ones(1, 4)
        >>> slots, new_ids = torch.tensor([[False, True, False]]), torch.tensor([[0, -1, -1]])
        >>> out = splice(embeds, tokens, torch.tensor([0, 1]), slots, new_ids)
        >>> torch.equal(out[0, 0], splice.new_rows[0]), out[0, 1:].tolist()
        (True, [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    """

    def __init__(
        self,
        num_new: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_new < 1:
            raise ValueError(f"num_new must be at least 1, got {num_new}")
        self.new_rows = nn.Parameter(torch.empty(num_new, width, device=device, dtype=dtype))
        nn.init.normal_(self.new_rows, std=0.02)

    def forward(
        self,
        embeds: Tensor,
        tokens: Tensor,
        token_offsets: Tensor,
        slots: Tensor,
        new_ids: Tensor,
    ) -> Tensor:
        """Input embeddings with tokens in their slots and new rows where `new_ids` names one.

        Args:
            embeds: [B, S, E] or packed [T, E]. `new_rows` are cast to its dtype, so they may be
                trained in float32 beside a half-precision language model.
            tokens: [M, E], the dtype of `embeds`.
            token_offsets: [B + 1] ([2] for packed `embeds`), int32 or int64.
            slots: bool, [B, S] or [T], True at the placeholders.
            new_ids: int64, [B, S] or [T], the new row of a position, or -1.

        Returns:
            A new tensor like `embeds`.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: shapes, devices or contents do not fit (see `edt_kernels.splice`).
        """
        new_rows = self.new_rows.to(embeds.dtype)
        return splice(embeds, tokens, token_offsets, slots, new_rows=new_rows, new_ids=new_ids)
