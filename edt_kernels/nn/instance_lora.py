"""Low-rank adapters that every molecule has of its own, as a module with the half they share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edt_kernels.nn._autocast import autocast
from edt_kernels.ops.instance_lora import instance_lora


class InstanceLoRA(nn.Module):
    """`edt_kernels.instance_lora` with the learned B of one linear layer, as in MoRA.

    B is 0 at first (arXiv:2510.12245), so an adapted layer starts as it was.

    Args:
        width: d_out, of the linear layer's output.
        rank: r.
        alpha: the adapter is scaled by alpha / r; None for 1.

    Raises:
        ValueError: `width` or `rank` is below 1.

    Example:
        >>> import torch
        >>> from edt_kernels.nn import InstanceLoRA
        >>> frozen, adapter = torch.nn.Linear(8, 6), InstanceLoRA(6, 2, alpha=4)
        >>> x, a, offsets = torch.randn(5, 8), torch.randn(2, 8, 2), torch.tensor([0, 2, 5])
        >>> out = adapter(x, a, offsets, base=frozen(x))
        >>> torch.equal(out, frozen(x)), adapter
        (True, InstanceLoRA(6, rank=2, scale=2))
    """

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        alpha: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("rank", rank)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.scale = 1.0 if alpha is None else alpha / rank
        self.b = nn.Parameter(torch.zeros(width, rank, device=device, dtype=dtype))

    def forward(
        self, x: Tensor, a: Tensor, offsets: Tensor, *, base: Tensor | None = None
    ) -> Tensor:
        """base + scale (x A_m) B^T, the rows of molecule m by its A_m.

        Args:
            x: [..., d_in], the input of the linear layer. B is cast to its dtype, so it may be
                trained in float32 beside a half-precision language model.
            a: [B, d_in, r], the dtype of `x`.
            offsets: [B + 1], int32 or int64.
            base: [..., d_out], the dtype of `x`: the output of the linear layer; None for 0.

        Returns:
            [..., d_out].

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: shapes, devices or contents do not fit (see `edt_kernels.instance_lora`).
        """
        x, a, base = autocast(x, a, base)
        return instance_lora(x, a, self.b.to(x.dtype), offsets, scale=self.scale, base=base)

    def extra_repr(self) -> str:
        """What `print` shows beside the parts."""
        width, rank = self.b.shape
        return f"{width}, rank={rank}, scale={self.scale:g}"
