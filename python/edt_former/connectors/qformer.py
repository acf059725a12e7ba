"""The query transformer, and the static Q-Former: a few learned queries read every molecule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edt_kernels
from edt_former.connectors.connector import Connector, MoleculeTokens, register_connector
from edt_former.graph.encoder import GraphFeatures
from edt_former.tokens.patches import PatchOptions
from edt_former.tokens.rows import molecule_of_rows
from edt_kernels import Patches

LAYER_NORM_EPS = 1e-12
ATOMS_PER_UNIT = 16
"""Sums over the atoms of a molecule are divided by this, so that they are of order 1."""


class Rows(NamedTuple):
    """Packed rows `values` [T, ...] of B molecules, cut by `offsets` [B + 1]."""

    values: Tensor
    offsets: Tensor


class QueryTransformerOutput(NamedTuple):
    """Hidden states of the queries [Tq, width] and, where there was text, of the text."""

    queries: Tensor
    text: Tensor | None


class QueryTransformer(nn.Module):
    """BERT whose queries also attend to a graph: the transformer of BLIP-2 (arXiv:2301.12597).

    Post-LayerNorm layers: self-attention over the queries and text of a molecule together; in
    every `cross_attention_freq`-th layer cross-attention of the queries to the keys of their
    molecule; feed-forward, one for queries and one for text. All attention is ragged: nothing is
    padded, and an empty molecule costs nothing. Parameter names are the published ones.

    Args:
        width: of the hidden states.
        layers: number of layers.
        heads: attention heads, a divisor of `width`.
        ffn: width inside the feed-forward.
        key_width: of the keys that the queries attend to.
        cross_attention_freq: layers 0, f, 2f... have cross-attention.
        dropout: of hidden states and attention weights, in training.
        text_vocab_size: makes the text branch, with that many word embeddings.
        text_positions: longest text.

    Example:
        >>> import torch
        >>> model = QueryTransformer(width=8, layers=1, heads=2, ffn=16, key_width=4)
        >>> query_offsets, key_offsets = torch.tensor([0, 3, 6]), torch.tensor([0, 5, 5])
        >>> model(torch.zeros(6, 8), query_offsets, torch.zeros(5, 4), key_offsets).queries.shape
        torch.Size([6, 8])
    """

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        heads: int,
        ffn: int,
        key_width: int,
        cross_attention_freq: int = 1,
        dropout: float = 0.0,
        text_vocab_size: int | None = None,
        text_positions: int = 512,
    ) -> None:
        super().__init__()
        text = text_vocab_size is not None
        self.bert = nn.Module()
        self.bert.embeddings = _Embeddings(width, dropout, text_vocab_size, text_positions)
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList(
            _Layer(
                width,
                heads,
                ffn,
                key_width if i % cross_attention_freq == 0 else None,
                dropout,
                text,
            )
            for i in range(layers)
        )
        self.apply(_initialise)

    def forward(
        self,
        queries: Tensor,
        query_offsets: Tensor,
        keys: Tensor,
        key_offsets: Tensor,
        text_ids: Tensor | None = None,
        text_offsets: Tensor | None = None,
        *,
        causal: bool = False,
        first_position: int = 0,
    ) -> QueryTransformerOutput:
        """Hidden states of the last layer.

        Args:
            queries: [Tq, width], no rows at all for a pass over text alone.
            query_offsets: [B + 1].
            keys: [Tk, key_width], what cross-attention reads.
            key_offsets: [B + 1].
            text_ids: int64 [Tt], word ids.
            text_offsets: [B + 1], required with `text_ids`.
            causal: a word attends to all queries of its molecule and to the words up to itself,
                and the queries do not attend to the text; otherwise all attend to all.
            first_position: of the text of every molecule.

        Raises:
            ValueError: text without a text branch, or without its offsets.
        """
        embeddings, text = self.bert.embeddings, None
        x = Rows(embeddings(queries), query_offsets)
        if text_ids is not None:
            if text_offsets is None:
                raise ValueError("text_offsets is required with text_ids, got None")
            words = embeddings.words(text_ids, text_offsets, first_position)
            text = Rows(embeddings(words), text_offsets)
        graph = Rows(keys, key_offsets)
        for layer in self.bert.encoder.layer:
            x, text = layer(x, text, graph, causal)
        return QueryTransformerOutput(x.values, None if text is None else text.values)


class _Embeddings(nn.Module):
    def __init__(self, width: int, dropout: float, vocab_size: int | None, positions: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width) if vocab_size is not None else None
        self.position_embeddings = (
            nn.Embedding(positions, width) if vocab_size is not None else None
        )
        self.LayerNorm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.LayerNorm(x))

    def words(self, ids: Tensor, offsets: Tensor, first_position: int) -> Tensor:
        if self.word_embeddings is None:
            raise ValueError("text_ids needs a text branch (text_vocab_size), this has none")
        text = molecule_of_rows(offsets, ids.shape[0])
        position = torch.arange(ids.shape[0], device=ids.device) - offsets[text] + first_position
        return self.word_embeddings(ids) + self.position_embeddings(position)


class _Layer(nn.Module):
    """A layer; with `gradient_checkpointing` its backward computes it again, as transformers'."""

    gradient_checkpointing = False

    def __init__(
        self, width: int, heads: int, ffn: int, key_width: int | None, dropout: float, text: bool
    ) -> None:
        super().__init__()
        self.attention = _Attention(width, width, heads, dropout)
        self.crossattention = None
        if key_width is not None:
            self.crossattention = _Attention(width, key_width, heads, dropout)
        self.intermediate_query = _Intermediate(width, ffn)
        self.output_query = _Output(ffn, width, dropout)
        if text:
            self.intermediate = _Intermediate(width, ffn)
            self.output = _Output(ffn, width, dropout)

    def forward(
        self, x: Rows, text: Rows | None, graph: Rows, causal: bool
    ) -> tuple[Rows, Rows | None]:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self._layer, x, text, graph, causal)
        return self._layer(x, text, graph, causal)

    def _layer(
        self, x: Rows, text: Rows | None, graph: Rows, causal: bool
    ) -> tuple[Rows, Rows | None]:
        seen = text is not None and not causal
        keys, values = self.attention.read(_together(x, text) if seen else x)
        queries = self.attention(x, keys, values)
        if self.crossattention is not None:
            queries = self.crossattention(queries, *self.crossattention.read(graph))
        h = self.output_query(self.intermediate_query(queries.values), queries.values)
        if text is not None:
            if causal:
                pairs = zip((keys, values), self.attention.read(text), strict=True)
                keys, values = (_together(*pair) for pair in pairs)
            words = self.attention(text, keys, values, causal=causal).values
            text = Rows(self.output(self.intermediate(words), words), text.offsets)
        return Rows(h, x.offsets), text


class _Attention(nn.Module):
    """Attention with its residual and LayerNorm; `self` holds the projections, as published."""

    def __init__(self, width: int, key_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self = nn.Module()
        self.self.query = nn.Linear(width, width)
        self.self.key = nn.Linear(key_width, width)
        self.self.value = nn.Linear(key_width, width)
        self.output = _Output(width, width, dropout)
        self.heads, self.dropout = heads, dropout

    def read(self, source: Rows) -> tuple[Rows, Rows]:
        """Keys and values [Tk, H, D] of what is attended to."""
        keys, values = self.self.key(source.values), self.self.value(source.values)
        return (
            Rows(keys.unflatten(-1, (self.heads, -1)), source.offsets),
            Rows(values.unflatten(-1, (self.heads, -1)), source.offsets),
        )

    def forward(self, x: Rows, keys: Rows, values: Rows, *, causal: bool = False) -> Rows:
        dropout = self.dropout if self.training else 0.0
        read = edt_kernels.ragged_attention(
            self.self.query(x.values).unflatten(-1, (self.heads, -1)),
            keys.values,
            values.values,
            x.offsets,
            keys.offsets,
            causal=causal,
            dropout_p=dropout,
            seed=_seeds(x.offsets) if dropout else None,
        )
        return Rows(self.output(read.flatten(1), x.values), x.offsets)


class _Intermediate(nn.Module):
    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, ffn)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class _Output(nn.Module):
    def __init__(self, inner: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


def _together(first: Rows, second: Rows) -> Rows:
    return Rows(
        *edt_kernels.ragged_cat([first.values, second.values], [first.offsets, second.offsets])
    )


def _seeds(offsets: Tensor) -> Tensor:
    """One per molecule for one call of attention dropout, from torch's generator."""
    return torch.randint(2**63 - 1, (offsets.shape[0] - 1,), device=offsets.device)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class QFormerConfig:
    """Options of a connector built on the query transformer.

    Args:
        llm_width: of the language model's embeddings; None for tokens that are the last hidden
            states, before there is a language model.
        width, layers, heads, ffn, cross_attention_freq, dropout: see `QueryTransformer`.
        encoder_width: of the graph encoder's atoms.
        num_queries: learned queries, the anchors.
        anchor_budget: how many of them every molecule gets, the first in order; None for all.
        graph_token: the mean of a molecule's atoms is one more key.
        sum_tokens: further keys per molecule, sums over its atoms, which count where means and
            attention do not.
        text_vocab_size, text_positions: see `QueryTransformer`; None leaves the text branch out.
    """

    llm_width: int | None
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    cross_attention_freq: int = 2
    encoder_width: int = 300
    num_queries: int = 32
    anchor_budget: int | None = None
    dropout: float = 0.1
    graph_token: bool = True
    sum_tokens: int = 0
    text_vocab_size: int | None = None
    text_positions: int = 512

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads {self.heads}, got {self.width}")
        if self.cross_attention_freq < 1:
            raise ValueError(
                f"cross_attention_freq must be at least 1, got {self.cross_attention_freq}"
            )
        check_budget("anchor_budget", self.anchor_budget)
        if not 0 <= (self.anchor_budget or 0) <= self.num_queries:
            raise ValueError(
                f"anchor_budget must be from 0 to num_queries {self.num_queries}, "
                f"got {self.anchor_budget}"
            )


def check_budget(name: str, value: object) -> None:
    """None or an int, not of bool."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name} must be an int or None, got {value!r}")


@register_connector("qformer")
class QFormer(Connector):
    """The static Q-Former of BLIP-2 and MolCA: learned queries read the atoms of each molecule.

    Keys are LayerNorm([mean of the atoms; atoms]), the mean with `graph_token`, and the
    `sum_tokens` unnormalised sums MLP(atoms) / 16.

    Args:
        config: options of `QFormerConfig`, `llm_width` at least.

    Example:
        >>> import torch
        >>> from edt_former.graph import GraphFeatures
        >>> model = QFormer({"llm_width": 8, "width": 16, "layers": 2, "heads": 2, "ffn": 32})
        >>> tokens = model(GraphFeatures(torch.zeros(3, 300), torch.tensor([0, 2, 3])), {})
        >>> tokens.values.shape, tokens.offsets
        (torch.Size([64, 8]), tensor([ 0, 32, 64]))
    """

    name = "qformer"
    Config = QFormerConfig

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__()
        self.options = options = self.Config(**config)
        self.config = {"name": self.name, **asdict(options)}
        self.patch_options = PatchOptions(sources=())
        self.ln_graph = nn.LayerNorm(options.encoder_width)
        self.query_tokens = nn.Parameter(torch.empty(1, options.num_queries, options.width))
        self.Qformer = QueryTransformer(
            width=options.width,
            layers=options.layers,
            heads=options.heads,
            ffn=options.ffn,
            key_width=options.encoder_width,
            cross_attention_freq=options.cross_attention_freq,
            dropout=options.dropout,
            text_vocab_size=options.text_vocab_size,
            text_positions=options.text_positions,
        )
        self.llm_proj = nn.Identity()
        if options.llm_width is not None:
            self.llm_proj = nn.Linear(options.width, options.llm_width)
        if options.sum_tokens:
            self.sum_mlp = make_sum_mlp(options.encoder_width, options.sum_tokens)
        self.apply(_initialise)
        nn.init.normal_(self.query_tokens, std=0.02)

    def forward(self, features: GraphFeatures, patches: Mapping[str, Patches]) -> MoleculeTokens:
        """A token per anchor of every molecule; `patches` is not read."""
        hidden = self.read(features, patches)
        return MoleculeTokens(self.llm_proj(hidden.values), hidden.offsets)

    def read(self, features: GraphFeatures, patches: Mapping[str, Patches]) -> Rows:
        """The queries' last hidden states, before they become tokens of the language model."""
        features = features._replace(values=features.values.to(self.query_tokens.dtype))
        queries, keys = self.queries(features, patches), self.keys(features)
        return Rows(self.Qformer(*queries, *keys).queries, queries.offsets)

    def queries(self, features: GraphFeatures, patches: Mapping[str, Patches]) -> Rows:
        """The queries of every molecule, as they enter the transformer."""
        anchors = self.anchors().expand(len(features.offsets) - 1, -1, -1)
        return Rows(anchors.flatten(0, 1), every(features.offsets, anchors.shape[1]))

    def anchors(self) -> Tensor:
        """The learned queries [A, width] that every molecule gets."""
        return self.query_tokens[0, : self.num_anchors]

    @property
    def num_anchors(self) -> int:
        """`num_queries`, or the budget of them."""
        budget = self.options.anchor_budget
        return self.options.num_queries if budget is None else budget

    def set_budget(self, *, anchors: int | None = None) -> None:
        """Every molecule gets the first `anchors` learned queries only; None for all.

        Tokens beyond a budget do not exist, so prompts are shorter. See `MoleculeLM.set_budget`.

        Raises:
            ValueError: fewer than none, or more than there are.
        """
        self._change(anchor_budget=anchors)

    def _change(self, **options: object) -> None:
        self.options = replace(self.options, **options)
        self.config.update(options)

    def keys(self, features: GraphFeatures) -> Rows:
        """What cross-attention reads: [mean; sums; atoms] of every molecule."""
        return atom_keys(
            features,
            self.ln_graph,
            graph_token=self.options.graph_token,
            sum_mlp=self.sum_mlp if self.options.sum_tokens else None,
            sum_tokens=self.options.sum_tokens,
        )

    def token_counts(self, patch_counts: Mapping[str, list[int]], num_molecules: int) -> list[int]:
        """The anchors of every molecule."""
        return [self.num_anchors] * num_molecules


def make_sum_mlp(width: int, sum_tokens: int) -> nn.Sequential:
    """The MLP whose outputs are summed over the atoms of a molecule, see `atom_keys`."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, sum_tokens * width))


def atom_keys(
    features: GraphFeatures,
    normalise: nn.Module,
    *,
    graph_token: bool,
    sum_mlp: nn.Module | None,
    sum_tokens: int,
) -> Rows:
    """What queries read of every molecule: [mean; sums; atoms], the first two if they are wanted.

    The mean and the atoms are normalised, the `sum_tokens` sums of `sum_mlp`(atoms) / 16 are not.
    """
    atoms, offsets = normalise(features.values), features.offsets
    parts, cuts = [], []
    if graph_token:
        mean = edt_kernels.segment_pool(features.values, offsets, reduce="mean")
        parts.append(normalise(mean))
        cuts.append(every(offsets, 1))
    if sum_tokens:
        counts = edt_kernels.segment_pool(sum_mlp(features.values), offsets, reduce="sum")
        sums = (counts / ATOMS_PER_UNIT).unflatten(1, (sum_tokens, -1)).flatten(0, 1)
        parts.append(sums.to(atoms.dtype))
        cuts.append(every(offsets, sum_tokens))
    return Rows(*edt_kernels.ragged_cat([*parts, atoms], [*cuts, offsets]))


def every(offsets: Tensor, count: int) -> Tensor:
    """Offsets of as many molecules with `count` rows each."""
    return count * torch.arange(offsets.shape[0], dtype=offsets.dtype, device=offsets.device)
