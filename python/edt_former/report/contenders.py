"""EDT-Former and what its speed is compared with: connectors that share one set of weights.

Each contender is laid out in its own best way, from atoms to the prompt of a language model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

import edt_kernels
from edt_former.connectors import EDTFormer, MoleculeTokens, QFormer
from edt_former.connectors.padded import padded_read
from edt_former.connectors.qformer import QFormerConfig
from edt_former.graph.encoder import GraphFeatures
from edt_kernels import Patches

STATIC_QUERIES = 32
"""Of the static Q-Former of BLIP-2 (arXiv:2301.12597), and anchors of EDT-Former."""
PUBLISHED_SLOTS = 96
"""Query tokens of every molecule in arXiv:2602.02742, most of them padding."""


class Rectangle(NamedTuple):
    """Tokens `values` [B, slots, E] of B molecules, the first `lengths` [B] of each row real."""

    values: Tensor
    lengths: Tensor

    def packed(self) -> Tensor:
        """The real tokens [T, E], molecule by molecule."""
        place = torch.arange(self.values.shape[1], device=self.lengths.device)
        return self.values[place < self.lengths[:, None]]


class Prompt(NamedTuple):
    """What a language model reads: `embeds` [B, S, E] and `mask` [B, S], None where all is read."""

    embeds: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Contender(ABC):
    """A connector, and how it lays a batch of molecules out.

    Attributes:
        name: for tables.
        connector: computes the queries; in eval mode.
    """

    name: str
    connector: QFormer

    @property
    def reads_patches(self) -> bool:
        """Whether patches must be found first."""
        return bool(self.connector.patch_options.sources)

    @abstractmethod
    def encode(
        self, features: GraphFeatures, patches: Mapping[str, Patches]
    ) -> MoleculeTokens | Rectangle:
        """The tokens of every molecule."""

    @abstractmethod
    def prompt(self, tokens: MoleculeTokens | Rectangle, text: Tensor, table: nn.Module) -> Prompt:
        """The molecule's tokens, then the embeddings of the ids `text` [T], for every molecule."""


class Ragged(Contender):
    """Ragged kernels: as many queries as the molecule has; padding stands left of the prompt."""

    def encode(self, features: GraphFeatures, patches: Mapping[str, Patches]) -> MoleculeTokens:
        """As `MoleculeLM` computes them."""
        return self.connector(features, patches)

    def prompt(self, tokens: MoleculeTokens, text: Tensor, table: nn.Module) -> Prompt:
        """As `MoleculeProcessor` lays it out: rows end together."""
        lengths = tokens.offsets.diff()
        shortest, longest = (int(x) for x in lengths.aminmax())
        ids = text.new_zeros(len(lengths), longest + len(text))
        ids[:, longest:] = text
        place = torch.arange(ids.shape[1], device=ids.device)
        real = place >= longest - lengths[:, None]
        slots = real & (place < longest)
        embeds = edt_kernels.splice(table(ids), tokens.values, tokens.offsets, slots)
        return Prompt(embeds, None if shortest == longest else real)


@dataclass(frozen=True)
class Padded(Contender):
    """Rectangles and torch's attention; slots that hold padding stay in the prompt, masked.

    Attributes:
        slots: tokens of every molecule; None for the longest of the batch.
    """

    slots: int | None

    def encode(self, features: GraphFeatures, patches: Mapping[str, Patches]) -> Rectangle:
        """The same tokens, with padding where a molecule has fewer."""
        dtype = self.connector.ln_graph.weight.dtype
        features = features._replace(values=features.values.to(dtype))
        queries = self.connector.queries(features, patches)
        hidden = padded_read(
            self.connector, queries, self.connector.keys(features), slots=self.slots
        )
        return Rectangle(self.connector.llm_proj(hidden), queries.offsets.diff())

    def prompt(self, tokens: Rectangle, text: Tensor, table: nn.Module) -> Prompt:
        """A rectangle needs no splice: it is put before the text."""
        rows, slots = tokens.values.shape[:2]
        words = table(text).expand(rows, -1, -1)
        embeds = torch.cat([tokens.values, words], 1)
        if int(tokens.lengths.min()) == slots:
            return Prompt(embeds, None)
        place = torch.arange(embeds.shape[1], device=embeds.device)
        return Prompt(embeds, (place < tokens.lengths[:, None]) | (place >= slots))


def line_up(dynamic: EDTFormer, *, mean: float, longest: int) -> list[Contender]:
    """EDT-Former first, then what it is compared with; all share the weights of `dynamic`.

    Args:
        dynamic: in eval mode.
        mean: query tokens per molecule of the workload.
        longest: the most query tokens of a molecule there. Beyond `PUBLISHED_SLOTS` padding to
            that many is left out: it would cut molecules off.
    """
    equal = round(mean)
    field = [ragged(dynamic), static(dynamic, STATIC_QUERIES)]
    if equal != STATIC_QUERIES:
        field.append(static(dynamic, equal))
    field.append(padded(dynamic, None))
    if longest <= PUBLISHED_SLOTS:
        field.append(padded(dynamic, PUBLISHED_SLOTS))
    return field


def ragged(dynamic: EDTFormer) -> Ragged:
    """EDT-Former as it is."""
    return Ragged("EDT-Former, ragged", dynamic)


def padded(dynamic: EDTFormer, slots: int | None) -> Padded:
    """EDT-Former with that many slots per molecule; None for the longest of the batch."""
    return Padded(f"EDT-Former, padded to {slots or 'longest'}", dynamic, slots)


def static(dynamic: EDTFormer, queries: int) -> Padded:
    """The static Q-Former of that many queries, its weights those of `dynamic`.

    Queries beyond the anchors are random.
    """
    options = {f.name: getattr(dynamic.options, f.name) for f in fields(QFormerConfig)}
    with torch.device("meta"):
        connector = QFormer({**options, "num_queries": queries}).eval().requires_grad_(False)
    weights = dynamic.state_dict()
    anchors = dynamic.query_tokens.detach()
    generator = torch.Generator().manual_seed(0)
    more = 0.02 * torch.randn(1, queries, anchors.shape[2], generator=generator)
    weights["query_tokens"] = torch.cat([anchors, more.to(anchors)], 1)[:, :queries]
    names = connector.state_dict()
    connector.load_state_dict({name: weights[name] for name in names}, assign=True)
    return Padded(f"static Q-Former, {queries} queries", connector, queries)


def checked_tokens(
    field: list[Contender], features: GraphFeatures, patches: Mapping[str, Patches]
) -> list[MoleculeTokens | Rectangle]:
    """The tokens of every contender, each compared with what the ragged kernels compute.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    expected: dict[QFormer, Tensor] = {}
    found = []
    for contender in field:
        tokens = contender.encode(features, patches)
        rows = tokens.packed() if isinstance(tokens, Rectangle) else tokens.values
        if contender.connector not in expected:
            ragged = isinstance(contender, Ragged)
            expected[contender.connector] = (
                rows if ragged else contender.connector(features, patches).values
            )
        check_rows(contender.name, rows, expected[contender.connector])
        found.append(tokens)
    return found


def check_rows(name: str, rows: Tensor, expected: Tensor) -> None:
    """Compare `rows` [N, E] with those of the ragged kernels.

    Raises:
        RuntimeError: the largest ||row - expected|| / ||expected|| is more than 0.01, or 0.05 in
            16 bit.
    """
    limit = 0.01 if rows.dtype == torch.float32 else 0.05
    rows, expected = rows.double(), expected.double()
    error = float(((rows - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
    if not error <= limit:
        raise RuntimeError(
            f"padded and ragged connector must agree to {limit:g}, {name!r} differs by {error:.2g}"
        )
