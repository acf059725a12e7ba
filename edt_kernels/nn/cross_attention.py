"""Multi-head attention over packed molecules, with the parameters of torch's module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edt_kernels.nn._autocast import autocast
from edt_kernels.ops.ragged_attention import WIDEST_ON_GPU, ragged_attention


class CrossAttention(nn.Module):
    """`torch.nn.MultiheadAttention` for packed rows: a molecule's queries read its own keys.

    out_proj(softmax(q k^T / sqrt(D)) v), with q, k and v projected from the inputs, molecule by
    molecule. Self-attention is the same module with one input and its offsets given twice. With
    `num_kv_heads=None` the parameters have the names, shapes and initial values of torch's module,
    so each loads the other's state dict strictly.

    Args:
        embed_dim: E, of queries and output.
        num_heads: H, a divisor of `embed_dim`; D = E / H.
        dropout: chance to drop an attention weight in training. Its seed is drawn from torch's
            generator in every call; all molecules of a call share one mask.
        bias: of the projections.
        kdim: width of the keys, E unless given.
        vdim: width of the values, E unless given.
        num_kv_heads: heads of keys and values, a divisor of H; None for H. Head h of the queries
            reads head h // (H / num_kv_heads).
        causal: query i of a molecule sees keys j <= i + Lk - Lq.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: sizes do not divide, or `dropout` is not in [0, 1).

    Example:
        >>> import torch
        >>> from edt_kernels.nn import CrossAttention
        >>> attention = CrossAttention(8, 2, kdim=6, vdim=6)
        >>> queries, atoms = torch.randn(5, 8), torch.randn(7, 6)
        >>> q_offsets, k_offsets = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 7])
        >>> attention(queries, atoms, atoms, q_offsets, k_offsets).shape
        torch.Size([5, 8])
        >>> torchs = torch.nn.MultiheadAttention(8, 2, kdim=6, vdim=6)
        >>> attention.load_state_dict(torchs.state_dict())
        <All keys matched successfully>
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        num_kv_heads: int | None = None,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads {num_heads}, got {embed_dim}"
            )
        if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
            raise ValueError(
                f"num_kv_heads must be a divisor of num_heads {num_heads}, got {num_kv_heads}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout}")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.dropout, self.causal = dropout, causal

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        rows = self._rows()
        fused = self.kdim == embed_dim == self.vdim
        for name, count, width in zip(
            ("q_proj_weight", "k_proj_weight", "v_proj_weight"),
            rows,
            (embed_dim, self.kdim, self.vdim),
            strict=True,
        ):
            self.register_parameter(name, None if fused else parameter(count, width))
        weight = parameter(sum(rows), embed_dim) if fused else None
        self.register_parameter("in_proj_weight", weight)
        self.register_parameter("in_proj_bias", parameter(sum(rows)) if bias else None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self._initialise()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_offsets: Tensor,
        k_offsets: Tensor,
    ) -> Tensor:
        """The queries' reading of the values of their molecule.

        Args:
            query: [Tq, E].
            key: [Tk, kdim].
            value: [Tk, vdim].
            q_offsets: [B + 1], int32 or int64.
            k_offsets: [B + 1], int32 or int64.

        Returns:
            [Tq, E]. A query that sees no key, and a row beyond q_offsets[-1], holds the bias of
            `out_proj`; rows of tail are projected like any other, so where weights are trained
            they must be finite.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: shapes, devices or offsets do not fit (see `edt_kernels.ragged_attention`).
        """
        _check_width("query", query, self.embed_dim)
        _check_width("key", key, self.kdim)
        _check_width("value", value, self.vdim)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (-1, self.head_dim))
            for x, weight, bias in zip((query, key, value), *self._projections(), strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        seed = torch.randint(2**63 - 1, (1,), device=query.device) if dropout else None
        read = ragged_attention(
            q, k, v, q_offsets, k_offsets, causal=self.causal, dropout_p=dropout, seed=seed
        )
        return self.out_proj(read.flatten(1))

    def pool(self, query: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """The reading of a few queries, as many for every molecule: attention pooling.

        What `forward` computes with `rows` as keys and values, by other products: the keys'
        projection goes into the queries, (Wk^T q) h = q (Wk h), and values are projected after
        they were summed. Rows are never projected, which pays while A H is less than the widths of
        keys and values together. A GPU, whose kernels read no wider heads than 256, projects wider
        rows as `forward` does.

        Args:
            query: [A, E], the same for every molecule, or [B, A, E].
            rows: [T, kdim], with kdim = vdim.
            offsets: [B + 1], int32 or int64.

        Returns:
            [B, A, E]; a molecule without rows has the bias of `out_proj`.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: shapes, devices or offsets do not fit; kdim is not vdim; it is causal.

        Example:
            >>> import torch
            >>> from edt_kernels.nn import CrossAttention
            >>> attention = CrossAttention(8, 2, kdim=6, vdim=6)
            >>> attention.pool(torch.randn(3, 8), torch.randn(7, 6), torch.tensor([0, 4, 7])).shape
            torch.Size([2, 3, 8])
        """
        if self.kdim != self.vdim or self.causal:
            raise ValueError(
                "pool needs kdim = vdim and no causal mask, "
                f"got kdim={self.kdim}, vdim={self.vdim}, causal={self.causal}"
            )
        count, molecules = query.shape[-2], offsets.shape[0] - 1
        if query.dim() == 3 and query.shape[0] != molecules:
            raise ValueError(
                f"query must have shape [A, E] or [{molecules}, A, E], got {tuple(query.shape)}"
            )
        _check_width("query", query.flatten(0, -2), self.embed_dim)
        _check_width("rows", rows, self.kdim)
        query, rows = autocast(query, rows)
        ends = count * torch.arange(molecules + 1, dtype=offsets.dtype, device=offsets.device)
        if self._must_project(rows):
            every = query.expand(molecules, -1, -1).flatten(0, 1)
            tail = torch.arange(len(rows), device=rows.device) >= offsets[-1]
            rows = rows.masked_fill(tail[:, None], 0)
            return self(every, rows, rows, ends, offsets).unflatten(0, (molecules, count))
        (w_q, w_k, w_v), (b_q, _, b_v) = self._projections()
        shared = self.num_heads // self.num_kv_heads
        w_k, w_v = (
            w.unflatten(0, (-1, self.head_dim)).repeat_interleave(shared, 0) for w in (w_k, w_v)
        )
        # A bias of the keys adds the same to all scores of a query: softmax does not see it.
        q = F.linear(query, w_q, b_q).unflatten(-1, (self.num_heads, -1))
        q = torch.einsum("...ahd,hdw->...ahw", q, w_k)
        dropout = self.dropout if self.training else 0.0
        seed = torch.randint(2**63 - 1, (1,), device=query.device) if dropout else None
        # Heads that read the same rows are as many queries of one head: one product for all.
        keys = rows.unsqueeze(1)
        read = ragged_attention(
            q.expand(molecules, -1, -1, -1).reshape(-1, 1, self.kdim),
            keys,
            keys,
            ends * self.num_heads,
            offsets,
            scale=self.head_dim**-0.5,
            dropout_p=dropout,
            seed=seed,
        )
        read = read.view(-1, self.num_heads, self.kdim)
        read = torch.einsum("thw,hdw->thd", read, w_v).flatten(1).unflatten(0, (molecules, count))
        if b_v is not None:
            bias = b_v.unflatten(0, (-1, self.head_dim)).repeat_interleave(shared, 0).flatten()
            read = read + (offsets.diff() > 0)[:, None, None] * bias
        return self.out_proj(read)

    def extra_repr(self) -> str:
        """What `print` shows beside the parts."""
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        widths = f"embed_dim={self.embed_dim}, kdim={self.kdim}, vdim={self.vdim}"
        return f"{widths}, {heads}, dropout={self.dropout}, causal={self.causal}"

    def _must_project(self, rows: Tensor) -> bool:
        return rows.is_cuda and rows.shape[1] > WIDEST_ON_GPU

    def _rows(self) -> tuple[int, int, int]:
        """Rows of the projections to queries, keys and values."""
        shared = self.num_kv_heads * self.head_dim
        return self.embed_dim, shared, shared

    def _projections(self) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Weights and biases of the projections to queries, keys and values."""
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split(self._rows())
        if self.in_proj_bias is None:
            return weights, (None, None, None)
        return weights, self.in_proj_bias.split(self._rows())

    def _initialise(self) -> None:
        """As torch's module, in its order of draws."""
        weights = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        for weight in weights:
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)


def _check_width(name: str, x: Tensor, width: int) -> None:
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(f"{name} must have shape [T, {width}], got {tuple(x.shape)}")
