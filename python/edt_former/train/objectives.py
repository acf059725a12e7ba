"""The first training stage: graphs and texts are contrasted, matched, and captioned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edt_kernels
from edt_former.connectors.connector import make_connector
from edt_former.connectors.qformer import LAYER_NORM_EPS, QFormer, Rows
from edt_former.graph.encoder import GraphFeatures
from edt_former.language.frozen import (
    CONFIG,
    WEIGHTS,
    load_part,
    load_strictly,
    read_weights,
    write_json,
    write_weights,
)
from edt_former.tokens.rows import molecule_of_rows
from edt_former.train.ranks import gather_rows, global_share, rank
from edt_kernels import Patches, offsets_from_lengths

if TYPE_CHECKING:
    from typing import Self

CONNECTOR, HEADS = "connector", "heads"
MATCHING = ("all", "anchors")
LEAST_NEGATIVE_WEIGHT = 1e-4


class RepresentationLosses(NamedTuple):
    """Means over the batch, 0-d each."""

    contrast: Tensor
    matching: Tensor
    captioning: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.contrast + self.matching + self.captioning


class Negatives(NamedTuple):
    """For every text [B] a graph that is not its own, and for every graph [B] a text."""

    graphs: Tensor
    texts: Tensor


class RepresentationLearning(nn.Module):
    """Losses that teach a Q-Former to read molecules by their texts (arXiv:2301.12597).

    * contrast: s(g, t) = max over the queries of g of cos(graph_proj(query), text_proj(first word
      of t)); cross-entropy of s / temperature over the batch, both ways, halved. The batch is that
      of all ranks together;
    * matching: does a text belong to a graph? The queries read graph and text together; both
      logits are means over the queries. Pairs are every (g, t), (another g, t), (g, another t) of
      a rank;
    * captioning: -log p of every next word, which sees all queries of its graph and the words so
      far, with label smoothing.

    Everything is ragged: only queries and words that exist take part, so the losses of a batch do
    not depend on padding, and a padded query cannot be the best one. The mean over ranks of a loss
    and of its gradients is that of one batch of them all, however many molecules each rank has.
    Parameter names of the heads are the published ones.

    Args:
        connector: with a text branch (`text_vocab_size`).
        embed_dim: of the space in which graphs and texts are compared.
        begin_id: the word that takes the place of the first one in captioning; None keeps it.
        caption_position: position of the first word in captioning; the released EDT-Former counts
            96 queries before it, MolCA none.
        temperature: of the contrast.
        label_smoothing: of captioning.
        matching: which queries match, "all" or the learned "anchors" alone, as the released
            EDT-Former has it: its dynamic queries learn from the other two losses only.

    Raises:
        ValueError: the connector has no text branch; an unknown way of matching.

    Example:
        >>> from edt_former.graph import GraphFeatures
        >>> size = {"width": 16, "layers": 2, "heads": 2, "ffn": 32, "encoder_width": 8}
        >>> connector = QFormer({"llm_width": None, "text_vocab_size": 10, **size})
        >>> task = RepresentationLearning(connector, embed_dim=4, begin_id=1)
        >>> atoms = GraphFeatures(torch.randn(5, 8), torch.tensor([0, 2, 5]))
        >>> words, offsets = torch.tensor([2, 5, 2, 6, 7]), torch.tensor([0, 2, 5])
        >>> losses = task(atoms, {}, words, offsets)
        >>> losses.total.backward()
    """

    def __init__(
        self,
        connector: QFormer,
        *,
        embed_dim: int = 512,
        begin_id: int | None = None,
        caption_position: int = 0,
        temperature: float = 0.1,
        label_smoothing: float = 0.1,
        matching: str = "all",
    ) -> None:
        super().__init__()
        if matching not in MATCHING:
            known = " or ".join(map(repr, MATCHING))
            raise ValueError(f"matching must be {known}, got {matching!r}")
        words = connector.Qformer.bert.embeddings.word_embeddings
        if words is None:
            raise ValueError("connector must have a text branch (text_vocab_size), it has none")
        width = connector.options.width
        self.connector = connector
        self.graph_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(width, embed_dim)
        self.gtm_head = nn.Linear(width, 2)
        self.cls = nn.Module()
        self.cls.predictions = _WordHead(width, words.num_embeddings)
        self.config = {
            "embed_dim": embed_dim,
            "begin_id": begin_id,
            "caption_position": caption_position,
            "temperature": temperature,
            "label_smoothing": label_smoothing,
            "matching": matching,
        }
        self.matching = matching
        self.begin_id, self.caption_position = begin_id, caption_position
        self.temperature, self.label_smoothing = temperature, label_smoothing

    def save_pretrained(
        self,
        folder: Path | str,
        *,
        dtype: torch.dtype | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes the connector to `connector/`, and the heads with their options to `heads/`.

        Args:
            folder: gets both.
            dtype: of floating-point weights on disk, None keeps them.
            state_dict: used instead of the task's own.
        """
        state = self.state_dict() if state_dict is None else state_dict
        inside = {n: x for n, x in state.items() if n.startswith(f"{CONNECTOR}.")}
        heads = {n: x for n, x in state.items() if n not in inside}
        inside = {n.removeprefix(f"{CONNECTOR}."): x for n, x in inside.items()}
        configs = {CONNECTOR: self.connector.config, HEADS: self.config}
        for name, weights in {CONNECTOR: inside, HEADS: heads}.items():
            part = Path(folder, name)
            part.mkdir(parents=True, exist_ok=True)
            write_json(part / CONFIG, configs[name])
            write_weights(part / WEIGHTS, weights, dtype)

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """Reads what `save_pretrained` wrote, or `edt convert` from a released file; in float32.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: weights do not fit.

        Example:
            >>> import tempfile
            >>> size = {"width": 16, "layers": 1, "heads": 2, "ffn": 32, "encoder_width": 8}
            >>> connector = QFormer({"llm_width": None, "text_vocab_size": 10, **size})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     RepresentationLearning(connector, embed_dim=4).save_pretrained(folder)
            ...     RepresentationLearning.from_pretrained(folder).graph_proj.out_features
            4
        """
        heads = Path(folder, HEADS)
        connector = load_part(make_connector, Path(folder, CONNECTOR))
        task = cls(connector, **json.loads((heads / CONFIG).read_text()))
        names = [n for n in task.state_dict() if not n.startswith(f"{CONNECTOR}.")]
        load_strictly(task, dict(read_weights(heads)), source=heads, names=names)
        return task

    def forward(
        self,
        features: GraphFeatures,
        patches: Mapping[str, Patches],
        text_ids: Tensor,
        text_offsets: Tensor,
        *,
        negatives: Negatives | None = None,
        generator: torch.Generator | None = None,
    ) -> RepresentationLosses:
        """The losses of B molecules and their texts; B at least 2.

        Args:
            features: of the graph encoder.
            patches: by source, as the connector reads them.
            text_ids: int64 [Tt], words without padding, at least one per text.
            text_offsets: [B + 1].
            negatives: the pairs of matching that do not belong together; None draws them.
            generator: what they are drawn with.
        """
        features = features._replace(values=features.values.to(self.connector.query_tokens.dtype))
        queries, keys = self.connector.queries(features, patches), self.connector.keys(features)
        text = Rows(text_ids, text_offsets)
        return self.losses(queries, keys, text, negatives=negatives, generator=generator)

    def losses(
        self,
        queries: Rows,
        keys: Rows,
        text: Rows,
        *,
        negatives: Negatives | None = None,
        generator: torch.Generator | None = None,
    ) -> RepresentationLosses:
        """As `forward`, from what enters the transformer.

        Raises:
            ValueError: fewer than two molecules, or another number of texts.
        """
        molecules, texts = len(queries.offsets) - 1, len(text.offsets) - 1
        if molecules != texts or molecules < 2:
            raise ValueError(
                f"text_offsets must cut one text per molecule, two or more; got {texts} texts and "
                f"{molecules} molecules"
            )
        graph, logits = self.caption(queries, keys, text)
        contrast, similarity = self.contrast(self.graph_features(graph), self.text_features(text))
        if negatives is None:
            negatives = draw_negatives(similarity, generator)
        words = len(text.values) - texts
        return RepresentationLosses(
            contrast=contrast,
            matching=self.matching_loss(queries, keys, text, negatives) * global_share(texts),
            captioning=caption_loss(logits, text, self.label_smoothing) * global_share(words),
        )

    def caption(self, queries: Rows, keys: Rows, text: Rows) -> tuple[Rows, Tensor]:
        """The queries' last hidden states, and logits [Tt, V] of the word after each word."""
        ids = text.values
        if self.begin_id is not None:
            ids = ids.index_fill(0, text.offsets[:-1].long(), self.begin_id)
        out = self.connector.Qformer(
            *queries,
            *keys,
            ids,
            text.offsets,
            causal=True,
            first_position=self.caption_position,
        )
        words = self.connector.Qformer.bert.embeddings.word_embeddings.weight
        return Rows(out.queries, queries.offsets), self.cls.predictions(out.text, words)

    def graph_features(self, hidden: Rows) -> Rows:
        """Unit vectors [Tq, embed_dim] of queries."""
        return Rows(F.normalize(self.graph_proj(hidden.values), dim=-1), hidden.offsets)

    def text_features(self, text: Rows) -> Tensor:
        """Unit vectors [B, embed_dim] of texts, which are read alone."""
        transformer = self.connector.Qformer
        none = torch.zeros_like(text.offsets)
        nothing = self.connector.query_tokens.new_zeros
        width, key_width = self.connector.options.width, self.connector.options.encoder_width
        out = transformer(nothing(0, width), none, nothing(0, key_width), none, *text)
        return F.normalize(self.text_proj(out.text[text.offsets[:-1]]), dim=-1)

    def contrast(self, graph: Rows, text: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of unit vectors of queries and texts, and the similarities [B, B] of a rank."""
        texts, counts = gather_rows(text)
        queries, _ = gather_rows(graph.values)
        lengths, _ = gather_rows(graph.offsets.diff())
        every = Rows(queries, offsets_from_lengths(lengths))
        first, here = int(counts[: rank()].sum()), len(text)
        by_graph, by_text = self.similarities(graph, texts), self.similarities(every, text).T
        loss = contrast_loss(by_graph, by_text, first) * global_share(here)
        return loss, by_graph[:, first : first + here]

    def similarities(self, graph: Rows, text: Tensor) -> Tensor:
        """s(g_i, t_j) / temperature [B, B] of graphs i and texts j."""
        every = graph.values @ text.T / self.temperature
        return edt_kernels.segment_pool(every, graph.offsets, reduce="max")

    def matching_logits(self, queries: Rows, keys: Rows, text: Rows) -> Tensor:
        """Logits [P, 2] of "no" and "yes" for P pairs of a graph, by its queries and keys, and a
        text."""
        if self.matching == "anchors":
            anchors = self.connector.anchors()
            every = len(anchors) * torch.arange(len(text.offsets), device=text.offsets.device)
            queries = Rows(anchors.repeat(len(text.offsets) - 1, 1), every)
        out = self.connector.Qformer(*queries, *keys, *text)
        return edt_kernels.segment_pool(self.gtm_head(out.queries), queries.offsets)

    def matching_loss(self, queries: Rows, keys: Rows, text: Rows, negatives: Negatives) -> Tensor:
        """Cross-entropy over (g, t), (another g, t), (g, another t), B each."""
        own = torch.arange(len(text.offsets) - 1, device=text.offsets.device)
        graphs = torch.cat([own, negatives.graphs, own])
        logits = self.matching_logits(
            take_rows(queries, graphs),
            take_rows(keys, graphs),
            take_rows(text, torch.cat([own, own, negatives.texts])),
        )
        belongs = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        belongs[: len(own)] = 1
        return F.cross_entropy(logits, belongs)


class _WordHead(nn.Module):
    """BERT's head over words, its table tied to the word embeddings."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = nn.Module()
        self.transform.dense = nn.Linear(width, width)
        self.transform.LayerNorm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        h = self.transform.LayerNorm(F.gelu(self.transform.dense(hidden)))
        return F.linear(h, words, self.bias)


def contrast_loss(by_graph: Tensor, by_text: Tensor | None = None, first: int = 0) -> Tensor:
    """Half the cross-entropy of every graph's text plus half that of every text's graph.

    Args:
        by_graph: logits [B, T] of B graphs and all T texts, of which the first graph's own is the
            one at `first`, the next one's that behind it.
        by_text: logits [B, T] of B texts and all T graphs; None: the transpose of `by_graph`.
        first: where the graphs and texts of this batch stand among all.

    Example:
        >>> round(contrast_loss(torch.zeros(4, 4)).exp().item(), 4)
        4.0
    """
    by_text = by_graph.T if by_text is None else by_text
    own = torch.arange(first, first + len(by_graph), device=by_graph.device)
    return (F.cross_entropy(by_graph, own) + F.cross_entropy(by_text, own)) / 2


def caption_loss(logits: Tensor, text: Rows, label_smoothing: float = 0.1) -> Tensor:
    """Mean cross-entropy of every word but the first, given logits [Tt, V] at the word before.

    NaN where no text has a second word.

    Example:
        >>> text = Rows(torch.tensor([0, 1, 0, 2]), torch.tensor([0, 2, 4]))
        >>> round(caption_loss(torch.zeros(4, 5), text).exp().item(), 4)
        5.0
    """
    first = torch.zeros(len(text.values) + 1, dtype=torch.bool, device=logits.device)
    first = first.index_fill(0, text.offsets.long(), True)
    before = (~first[1 : len(text.values)]).nonzero().flatten()
    return F.cross_entropy(logits[before], text.values[before + 1], label_smoothing=label_smoothing)


@torch.no_grad()
def draw_negatives(similarity: Tensor, generator: torch.Generator | None = None) -> Negatives:
    """A negative per graph and per text, likelier the more alike: softmax + 1e-4.

    Args:
        similarity: logits [B, B] of graphs and texts, B at least 2.
        generator: what is drawn with; None is torch's own.

    Example:
        >>> draw_negatives(torch.zeros(2, 2))
        Negatives(graphs=tensor([1, 0]), texts=tensor([1, 0]))
    """
    # Where a weight has become NaN the loss is to say so, not the draw.
    finite = similarity.float().nan_to_num()
    graphs, texts = (
        (logits.softmax(1) + LEAST_NEGATIVE_WEIGHT).fill_diagonal_(0)
        for logits in (finite.T, finite)
    )
    return Negatives(
        torch.multinomial(graphs, 1, generator=generator).flatten(),
        torch.multinomial(texts, 1, generator=generator).flatten(),
    )


def take_rows(rows: Rows, molecules: Tensor) -> Rows:
    """The rows of `molecules`, in that order."""
    offsets = offsets_from_lengths(rows.offsets.diff()[molecules])
    total = int(offsets[-1])
    if total == 0:
        return Rows(rows.values[:0], offsets)
    taken = molecule_of_rows(offsets, total)
    shift = (rows.offsets[molecules] - offsets[:-1])[taken]
    return Rows(rows.values[torch.arange(total, device=offsets.device) + shift], offsets)
