"""MoRA: a molecule becomes low-rank adapters of the language model, not tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edt_kernels
from edt_former.connectors.connector import Connector, MoleculeAdapters, register_connector
from edt_former.connectors.qformer import Rows, atom_keys, every, make_sum_mlp
from edt_former.graph.encoder import GraphFeatures
from edt_former.tokens.patches import PatchOptions
from edt_kernels import Patches

KINDS = "qkvomd"
"""What can have adapters: the projections of attention to queries, keys and values and its output,
a path around the MLP (m), the MLP's projection down (d)."""

FULL, FACTORISED = "full", "factorised"


@dataclass(frozen=True)
class MoRAConfig:
    """Options of MoRA; by default the published sizes.

    Args:
        llm_width: of the language model's hidden states.
        llm_layers: its layers.
        types: the kinds of linear maps with adapters, letters of "qkvomd" in the order of the
            generators. "m" is the published path around the MLP: it reads what the MLP reads and
            is added to what the MLP returns. "d" adapts the MLP's last projection.
        widths: per kind (d_in, d_out); kinds that are not named map `llm_width` to itself. With
            grouped-query attention those of k and v differ; see
            `edt_former.language.connector_options`.
        every: layers every - 1, 2 every - 1, ... have adapters.
        rank: r of an adapter.
        alpha: adapters are scaled by alpha / rank; None for no scaling.
        separate: a generator per kind; otherwise one for all.
        head: "full" maps a query to all d_in x r numbers of A, as published; "factorised" to
            `factors` x r numbers, which a learned basis [d_in, factors] of every adapted map
            expands to A.
        factors: see `head`.
        width, layers, heads, ffn: of a generator.
        encoder_width: of the graph encoder's atoms.
        graph_norm: atoms pass a LayerNorm first.
        graph_token, sum_tokens: further rows to read, see `QFormerConfig`.
        names: per kind, how the language model calls the module, where it has a name that
            `edt_former.language.find_sites` does not know.
    """

    llm_width: int
    llm_layers: int = 32
    types: str = "qkvom"
    widths: Mapping[str, Sequence[int]] | None = None
    every: int = 4
    rank: int = 64
    alpha: float | None = None
    separate: bool = True
    head: str = FULL
    factors: int = 64
    width: int = 1024
    layers: int = 8
    heads: int = 16
    ffn: int = 4096
    encoder_width: int = 300
    graph_norm: bool = False
    graph_token: bool = False
    sum_tokens: int = 0
    names: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.types or len(set(self.types)) < len(self.types) or set(self.types) - set(KINDS):
            raise ValueError(f"types must be different letters of {KINDS!r}, got {self.types!r}")
        if self.head not in (FULL, FACTORISED):
            raise ValueError(f"head must be {FULL!r} or {FACTORISED!r}, got {self.head!r}")
        for name in ("every", "rank", "factors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.every > self.llm_layers:
            raise ValueError(
                f"every must be at most llm_layers {self.llm_layers}, got {self.every}"
            )
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads {self.heads}, got {self.width}")
        given = self.widths or {}
        if unknown := set(given) - set(self.types):
            raise ValueError(f"widths must be of types {self.types!r}, got {sorted(unknown)}")
        square = [self.llm_width, self.llm_width]
        widths = {kind: list(given.get(kind, square)) for kind in self.types}
        object.__setattr__(self, "widths", widths)

    @property
    def adapted(self) -> list[int]:
        """The layers of the language model that have adapters."""
        return list(range(self.every - 1, self.llm_layers, self.every))


@register_connector("mora")
class MoRA(Connector):
    """Learned queries read the atoms and become adapters of the language model (arXiv:2510.12245).

    A query stands for one linear map of one layer; after the generator's decoder layers a head
    makes of it the matrix A [d_in, r] that only this molecule has. B is learned, shared by all
    molecules and zero at first, so training begins at the plain language model. Attention is
    ragged: a molecule's adapters do not depend on the batch. No token enters the prompt.

    Args:
        config: options of `MoRAConfig`, `llm_width` at least.

    Example:
        >>> from edt_former.graph import GraphFeatures
        >>> size = {"width": 16, "layers": 1, "heads": 2, "ffn": 32, "encoder_width": 8}
        >>> llm = {"llm_width": 12, "llm_layers": 2, "every": 1}
        >>> model = MoRA({**llm, **size, "types": "kv", "widths": {"v": (12, 6)}, "rank": 4})
        >>> adapters = model(GraphFeatures(torch.zeros(3, 8), torch.tensor([0, 2, 3])), {})
        >>> adapters.a["v"].shape, adapters.b["v"].shape
        (torch.Size([2, 2, 12, 4]), torch.Size([2, 6, 4]))
    """

    name = "mora"
    adapts = True

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__()
        self.options = options = MoRAConfig(**config)
        self.config = {"name": self.name, **asdict(options)}
        self.patch_options = PatchOptions(sources=())
        self.graph_norm = (
            nn.LayerNorm(options.encoder_width) if options.graph_norm else nn.Identity()
        )
        if options.sum_tokens:
            self.sum_mlp = make_sum_mlp(options.encoder_width, options.sum_tokens)
        self.visual_proj = nn.Linear(options.encoder_width, options.width)
        groups = list(options.types) if options.separate else [options.types]
        self.gen = nn.ModuleList(WeightGenerator(options, kinds) for kinds in groups)
        count, rank = len(options.adapted), options.rank
        self.b = nn.ParameterDict(
            {
                kind: nn.Parameter(torch.zeros(count, d_out, rank))
                for kind, (_, d_out) in options.widths.items()
            }
        )
        self.apply(_initialise)

    def forward(self, features: GraphFeatures, patches: Mapping[str, Patches]) -> MoleculeAdapters:
        """The adapters of every molecule; `patches` is not read."""
        keys = self.keys(features)
        a: dict[str, Tensor] = {}
        for generator in self.gen:
            a |= generator(keys)
        types, alpha = self.options.types, self.options.alpha
        scale = 1.0 if alpha is None else alpha / self.options.rank
        return MoleculeAdapters({k: a[k] for k in types}, {k: self.b[k] for k in types}, scale)

    def keys(self, features: GraphFeatures) -> Rows:
        """What the queries read, projected to the width of the generators."""
        features = features._replace(values=features.values.to(self.visual_proj.weight.dtype))
        rows = atom_keys(
            features,
            self.graph_norm,
            graph_token=self.options.graph_token,
            sum_mlp=self.sum_mlp if self.options.sum_tokens else None,
            sum_tokens=self.options.sum_tokens,
        )
        return rows._replace(values=self.visual_proj(rows.values))

    def token_counts(self, patch_counts: Mapping[str, list[int]], num_molecules: int) -> list[int]:
        """None: what a molecule says is in the adapters."""
        return [0] * num_molecules


class WeightGenerator(nn.Module):
    """Queries read a molecule and become A of all adapted layers, for one kind or several.

    Args:
        options: of the connector.
        kinds: whose A it makes.

    Example:
        >>> size = {"width": 16, "layers": 1, "heads": 2, "ffn": 32, "rank": 4}
        >>> generator = WeightGenerator(MoRAConfig(llm_width=8, llm_layers=8, **size), "qv")
        >>> keys = Rows(torch.zeros(5, 16), torch.tensor([0, 5]))
        >>> {kind: a.shape for kind, a in generator(keys).items()}
        {'q': torch.Size([2, 1, 8, 4]), 'v': torch.Size([2, 1, 8, 4])}
    """

    def __init__(self, options: MoRAConfig, kinds: str) -> None:
        super().__init__()
        self.kinds, self.count = kinds, len(options.adapted)
        self.inputs = {kind: options.widths[kind][0] for kind in kinds}
        self.rank, self.factors = options.rank, options.factors
        self.queries = nn.Parameter(torch.randn(1, len(kinds) * self.count, options.width))
        self.decoders = nn.ModuleList(
            _Decoder(options.width, options.heads, options.ffn) for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(options.width)
        self.basis = None
        if options.head == FACTORISED:
            self.weights_head = nn.Linear(options.width, self.factors * self.rank)
            self.basis = nn.ParameterDict(
                {
                    kind: nn.Parameter(torch.randn(self.count, d_in, self.factors) / d_in**0.5)
                    for kind, d_in in self.inputs.items()
                }
            )
        else:
            # Kinds of one width share their head, as the published generator of several kinds does.
            self.weights_head = nn.ModuleDict(
                {
                    str(d_in): nn.Linear(options.width, d_in * self.rank)
                    for d_in in sorted(set(self.inputs.values()))
                }
            )

    def forward(self, keys: Rows) -> dict[str, Tensor]:
        """A [layers, B, d_in, r] by kind."""
        parts = self.read(keys).split(self.count)
        return {
            kind: self._matrices(kind, part) for kind, part in zip(self.kinds, parts, strict=True)
        }

    def read(self, keys: Rows) -> Tensor:
        """What the queries have read of every molecule, [kinds x layers, B, width]."""
        molecules, count = len(keys.offsets) - 1, self.queries.shape[1]
        x = self.queries.expand(molecules, -1, -1).flatten(0, 1)
        offsets = every(keys.offsets, count)
        for decoder in self.decoders:
            x = decoder(x, offsets, keys)
        return self.norm(x).unflatten(0, (molecules, count)).transpose(0, 1)

    def _matrices(self, kind: str, hidden: Tensor) -> Tensor:
        """A [layers, B, d_in, r] from hidden states [layers, B, width]."""
        d_in = self.inputs[kind]
        if self.basis is None:
            return self.weights_head[str(d_in)](hidden).unflatten(-1, (d_in, self.rank))
        small = self.weights_head(hidden).unflatten(-1, (self.rank, self.factors))
        rows = small.flatten(1, 2) @ self.basis[kind].to(small.dtype).mT
        return rows.unflatten(1, (hidden.shape[1], self.rank)).mT.contiguous()


class _Decoder(nn.Module):
    """x + self-attention(LN x); x + attention(LN x, keys); x + MLP(LN x)."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attn = _Attention(width, heads)
        self.multihead_attn = _Attention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x: Tensor, offsets: Tensor, keys: Rows) -> Tensor:
        own = Rows(self.norm1(x), offsets)
        x = x + self.self_attn(own, own)
        x = x + self.multihead_attn(Rows(self.norm2(x), offsets), keys)
        return x + self.linear2(F.gelu(self.linear1(self.norm3(x))))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Rows, source: Rows) -> Tensor:
        weights = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(rows, weight, bias).unflatten(1, (self.heads, -1))
            for rows, weight, bias in zip((x.values, *2 * (source.values,)), *weights, strict=True)
        )
        read = edt_kernels.ragged_attention(q, k, v, x.offsets, source.offsets)
        return self.out_proj(read.flatten(1))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
