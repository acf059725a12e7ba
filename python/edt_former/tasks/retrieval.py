"""Which text belongs to which molecule: recall both ways, and again after matching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import edt_kernels
from edt_former.connectors.qformer import Rows
from edt_former.data import PreparedData
from edt_former.train.objectives import take_rows
from edt_former.train.stage1 import Stage1Batch, Stage1Model
from edt_kernels import offsets_from_lengths

AT = (1, 5, 20)
WAYS = ("graph to text", "text to graph")
CHUNK = 256


@dataclass(frozen=True)
class Embedded:
    """What a model says of N molecules and their texts.

    Attributes:
        queries: unit vectors of every molecule's queries.
        texts: unit vectors [N, E].
        read: the queries and keys as they enter the transformer, and the words: what matching
            reads.
    """

    queries: Rows
    texts: Tensor
    read: tuple[Rows, Rows, Rows]


@torch.no_grad()
def embed(
    model: Stage1Model,
    data: PreparedData,
    collate: Stage1Batch,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
) -> Embedded:
    """Runs `model` over all rows of `data`."""
    loader = DataLoader(data, batch_size, collate_fn=collate, num_workers=workers)
    task, found = model.objective, []
    device = task.graph_proj.weight.device
    for batch in tqdm(loader, "reading molecules", unit="batch", disable=not progress):
        features = model.graph_encoder(batch["graph"].to(device))
        patches = dict(batch["patches"].to(device))
        queries, keys = task.connector.queries(features, patches), task.connector.keys(features)
        hidden = Rows(task.connector.Qformer(*queries, *keys).queries, queries.offsets)
        text = Rows(batch["text_ids"].to(device), batch["text_offsets"].to(device))
        vectors = task.graph_features(hidden)
        found.append((vectors, task.text_features(text), (queries, keys, text)))
    return Embedded(
        _joined([vectors for vectors, _, _ in found]),
        torch.cat([texts for _, texts, _ in found]),
        tuple(_joined([read[i] for _, _, read in found]) for i in range(3)),
    )


def _joined(parts: Sequence[Rows]) -> Rows:
    lengths = torch.cat([part.offsets.diff() for part in parts])
    return Rows(
        torch.cat([part.values[: int(part.offsets[-1])] for part in parts]),
        offsets_from_lengths(lengths),
    )


@torch.no_grad()
def similarities(found: Embedded) -> Tensor:
    """max over the queries of graph i of cos(query, text j), [N, N]."""
    queries, offsets = found.queries
    columns = [
        edt_kernels.segment_pool(queries @ texts.T, offsets, reduce="max")
        for texts in found.texts.split(CHUNK)
    ]
    return torch.cat(columns, 1)


def recall(scores: Tensor, at: Sequence[int] = AT) -> dict[str, float]:
    """The share of rows whose own column is among the k highest; ties count against it.

    Args:
        scores: [N, N], row and column i belong together. NaN is ranked as a tie.
        at: the k.

    >>> recall(torch.tensor([[2.0, 1.0, 0.0], [5.0, 4.0, 3.0], [0.0, 0.0, 0.0]]), at=(1, 2))
    {'recall@1': 0.3333333333333333, 'recall@2': 0.6666666666666666}
    """
    own = scores.diagonal()[:, None]
    rank = (~(scores < own)).sum(1) - 1
    return {f"recall@{k}": float((rank < k).double().mean()) for k in at}


def batches(rows: int, size: int, seed: int = 0) -> Iterator[Tensor]:
    """All rows in batches of `size`, in an order drawn from `seed`; what is left over is left out.

    >>> [len(batch) for batch in batches(130, 64)]
    [64, 64]
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(rows))
    yield from order[: rows - rows % size].split(size)


@torch.no_grad()
def matching_scores(model: Stage1Model, found: Embedded, graphs: Tensor, texts: Tensor) -> Tensor:
    """The logit of "yes" [P] of P pairs of a graph and a text, by their rows."""
    queries, keys, words = found.read
    logits = [
        model.objective.matching_logits(
            take_rows(queries, g), take_rows(keys, g), take_rows(words, t)
        )[:, 1]
        for g, t in zip(graphs.split(CHUNK), texts.split(CHUNK), strict=True)
    ]
    return torch.cat(logits)


@torch.no_grad()
def rerank(
    model: Stage1Model,
    found: Embedded,
    rows: Tensor,
    scores: Tensor,
    candidates: int,
    *,
    of_texts: bool = False,
) -> Tensor:
    """Scores [N, N] of a batch in which the best candidates of every row are ranked by matching.

    A pair's similarity, a cosine, and its matching logit are added, as MolCA does; candidates stay
    before all others.

    Args:
        model: of the first stage.
        found: all rows.
        rows: those of the batch, [N].
        scores: similarities of the batch.
        candidates: of every row.
        of_texts: rows of `scores` are texts and columns graphs, not the other way round.
    """
    best = scores.topk(min(candidates, len(rows)), 1).indices
    own, other = rows[:, None].expand_as(best).flatten(), rows[best].flatten()
    pairs = (other, own) if of_texts else (own, other)
    logits = matching_scores(model, found, *pairs).view_as(best)
    matched = scores.gather(1, best) + logits
    behind = scores - scores.max() + matched.min() - 1
    return behind.scatter(1, best, matched)


def retrieval_scores(
    model: Stage1Model,
    found: Embedded,
    *,
    batch_size: int = 64,
    candidates: int = 0,
    seed: int = 0,
    at: Sequence[int] = AT,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Recall in batches and in the whole set, both ways, beside chance.

    Args:
        model: of the first stage.
        found: what it says of the rows.
        batch_size: of the batches within which is searched.
        candidates: of a row that are ranked again by matching, within batches; 0 for none.
        seed: of the batches.
        at: the k of recall@k.
        progress: shows a bar.

    Returns:
        By setting and way, recall@k.

    Raises:
        ValueError: there are fewer rows than a batch has.
    """
    every = similarities(found)
    device = every.device
    if len(every) < batch_size:
        raise ValueError(f"batch_size must be at most the {len(every)} rows, got {batch_size}")
    drawn = [rows.to(device) for rows in batches(len(every), batch_size, seed)]
    result = {}
    for way, scores in zip(WAYS, (every, every.T), strict=True):
        inside = [recall(scores[rows][:, rows], at) for rows in drawn]
        result[f"batches of {batch_size}, {way}"] = _mean(inside)
        result[f"all {len(every)}, {way}"] = recall(scores, at)
    if candidates:
        again = []
        for rows in tqdm(drawn, "matching", unit="batch", disable=not progress):
            inside = every[rows][:, rows]
            again.append(
                [
                    recall(rerank(model, found, rows, scores, candidates, of_texts=turned), at)
                    for turned, scores in ((False, inside), (True, inside.T))
                ]
            )
        for way, by_batch in zip(WAYS, zip(*again, strict=True), strict=True):
            setting = f"batches of {batch_size}, {way}, best {candidates} matched"
            result[setting] = _mean(by_batch)
    result["chance in a batch"] = {f"recall@{k}": min(1.0, k / batch_size) for k in at}
    return result


def _mean(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in scores) / len(scores) for name in scores[0]}
