"""Connectors of the recipe, each trained from scratch against the same frozen parts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange
from transformers import PreTrainedModel

from edt_former.chem import motif_features
from edt_former.connectors import Connector, MoleculeTokens, make_connector
from edt_former.graph.batch import MotifFeatures
from edt_former.graph.encoder import GraphEncoder, GraphFeatures
from edt_former.language import InstanceAdapters, connector_options
from edt_former.tasks.questions import FACTS, QUESTION_TYPES
from edt_former.tokens import NextAtomPredictor, PatchOptions
from edt_former.train.tiny.data import MoleculeTable, gather_ranges
from edt_former.train.tiny.fact_tokens import fact_embeddings
from edt_former.train.tiny.loop import fit
from edt_former.train.tiny.packing import QuestionBank, pack_questions, reply_logits
from edt_kernels import Patches

SIZES = {"width": 128, "layers": 3, "heads": 4, "ffn": 512, "dropout": 0.0, "sum_tokens": 4}
"""Of every connector; all have the sums over atoms, without which none can count."""

ADAPTERS = {
    **{"name": "mora", "types": "om", "every": 1, "rank": 16, "separate": False},
    **{"head": "factorised", "factors": 24, "width": 64, "layers": 2, "heads": 4, "ffn": 128},
    **{"graph_norm": True, "graph_token": True, "sum_tokens": 2},
}
"""Of MoRA."""

ADAPTER_RATE = 2e-3

LEVELS = {
    **{"name": "llamo", "level_queries": 4, "motif_queries": 4, "width": 96, "heads": 4},
    **{"depth": 2, "sum_tokens": 1},
}
"""Of LLaMo, whose queries read each a level of the graph encoder, or motifs."""

LEVELS_AT_A_TIME = 512
"""Molecules."""

ANCHORS = 32
"""Learned queries of EDT-Former, and of the smaller static Q-Former."""

PATCHES = PatchOptions(sources=("entropy",), rule="local_max")


def level_config(encoder: GraphEncoder, num_levels: int, llm_width: int) -> dict:
    """LLaMo on the levels of `encoder`."""
    widths = {"encoder_width": encoder.width, "llm_width": llm_width}
    return {**LEVELS, **widths, "num_levels": num_levels}


def connector_configs(encoder_width: int, llm_width: int, equal_tokens: int) -> dict[str, dict]:
    """EDT-Former, and static Q-Formers with its anchors' number of queries and its mean number."""
    common = {**SIZES, "encoder_width": encoder_width, "llm_width": llm_width}
    common["cross_attention_freq"] = 1
    patches = {"sources": PATCHES.sources, "rule": PATCHES.rule}
    return {
        "edt_former": {"name": "edt_former", **common, "num_queries": ANCHORS, "patches": patches},
        f"qformer_{ANCHORS}": {"name": "qformer", **common, "num_queries": ANCHORS},
        f"qformer_{equal_tokens}": {"name": "qformer", **common, "num_queries": equal_tokens},
    }


def adapter_config(encoder_width: int, language_model: PreTrainedModel) -> dict:
    """MoRA on a graph encoder and a language model."""
    return {**connector_options(ADAPTERS, language_model), "encoder_width": encoder_width}


class Features(Protocol):
    """What the frozen parts say of M molecules, and the truths about them."""

    answers: np.ndarray

    def __len__(self) -> int:
        """M."""

    def batch(self, rows: np.ndarray) -> tuple[GraphFeatures, dict[str, Patches]]:
        """Features and patches of the molecules of `rows`, in that order."""


@dataclass(frozen=True)
class FeatureTable:
    """What the frozen parts say of M molecules, computed once.

    Attributes:
        values: float16 [V N, D], per molecule the features of its atoms in each of V views.
        offsets: [M + 1] into the atoms.
        starts: bool [N], the atoms that open a patch.
        answers: [M, F].
    """

    values: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    answers: np.ndarray

    @property
    def num_views(self) -> int:
        """V."""
        return len(self.values) // len(self.starts)

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def patch_counts(self) -> np.ndarray:
        """Patches of each molecule, [M]."""
        ends = np.concatenate([[0], self.starts.cumsum()])
        return ends[self.offsets[1:]] - ends[self.offsets[:-1]]

    def batch(self, rows: np.ndarray) -> tuple[GraphFeatures, dict[str, Patches]]:
        """Features and patches of the molecules of `rows`, in that order."""
        atoms, offsets = gather_ranges(self.offsets, rows)
        starts = torch.from_numpy(self.starts[atoms])
        bounds = torch.from_numpy(offsets)
        before = torch.cat([starts.new_zeros(1, dtype=torch.int64), starts.cumsum(0)])
        patch_offsets = before[bounds]
        molecule = torch.repeat_interleave(torch.arange(len(rows)), bounds.diff())
        patches = Patches(
            ids=before[1:] - 1 - patch_offsets[molecule],
            atom_offsets=torch.cat([starts.nonzero().flatten(), bounds[-1:]]),
            patch_offsets=patch_offsets,
            count=patch_offsets[-1],
            order=None,
            threshold=None,
        )
        views = self.num_views
        values, ends = gather_ranges(views * self.offsets, rows)
        features = torch.from_numpy(self.values[values]).float()
        first = torch.arange(len(atoms)) + (views - 1) * bounds[molecule]
        places = tuple(first + view * bounds.diff()[molecule] for view in range(views))
        features = GraphFeatures(features, torch.from_numpy(ends), places if views > 1 else None)
        return features, {"entropy": patches}


class GraphTable:
    """What a frozen encoder says of M molecules, computed when it is asked for; no patches.

    Args:
        table: the molecules.
        encoder: frozen.
    """

    def __init__(self, table: MoleculeTable, encoder: GraphEncoder) -> None:
        self.table, self.encoder, self.answers = table, encoder, table.answers

    def __len__(self) -> int:
        return len(self.table)

    @torch.no_grad()
    def batch(self, rows: np.ndarray) -> tuple[GraphFeatures, dict[str, Patches]]:
        """Features of the molecules of `rows`."""
        return self.encoder(self.table.batch(rows)), {}


class LevelTable:
    """What every level of a frozen encoder says of M molecules, and their motifs, computed once.

    Args:
        table: the molecules.
        encoder: frozen, with one view of a molecule.
    """

    @torch.no_grad()
    def __init__(self, table: MoleculeTable, encoder: GraphEncoder) -> None:
        self.table, self.answers = table, table.answers
        motifs: list[np.ndarray] = []
        levels: list[np.ndarray] = []
        for first in trange(0, len(table), LEVELS_AT_A_TIME, desc="levels, motifs", unit="batch"):
            rows = np.arange(first, min(first + LEVELS_AT_A_TIME, len(table)))
            motifs += motif_features([table.molecule(row) for row in rows])
            found = encoder.levels(table.batch(rows))
            levels.append(torch.stack([level.values.half() for level in found]).numpy())
        self.motifs = MotifFeatures.pack(motifs)
        self.values = np.concatenate(levels, 1)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def num_levels(self) -> int:
        """Levels of the encoder."""
        return len(self.values)

    def batch(self, rows: np.ndarray) -> tuple[GraphFeatures, dict[str, Patches]]:
        """Features of all levels and motifs of the molecules of `rows`; no patches."""
        atoms, bounds = gather_ranges(self.table.offsets, rows)
        levels = torch.from_numpy(self.values[:, atoms]).float().unbind()
        motifs, offsets = gather_ranges(self.motifs.offsets.numpy(), rows)
        own = MotifFeatures(self.motifs.values[motifs], torch.from_numpy(offsets))
        return GraphFeatures(levels[-1], torch.from_numpy(bounds), None, levels, own), {}


@torch.no_grad()
def read_features(
    table: MoleculeTable, encoder: GraphEncoder, predictor: NextAtomPredictor, *, batch: int = 512
) -> FeatureTable:
    """Run the frozen encoder, of one view or more, and the predictor over a table."""
    values, starts = [], []
    for first in trange(0, len(table), batch, desc="frozen features", unit="batch"):
        graph = table.batch(np.arange(first, min(first + batch, len(table))))
        values.append(encoder(graph).values.half().numpy())
        _, patches = predictor.patches(graph.elements, graph.offsets, **PATCHES.cutting())
        opens = torch.zeros(graph.num_atoms, dtype=torch.bool)
        opens[patches.trim().atom_offsets[:-1]] = True
        starts.append(opens.numpy())
    return FeatureTable(
        np.concatenate(values), table.offsets, np.concatenate(starts), table.answers
    )


def train_connector(
    config: dict,
    features: Features,
    language_model: PreTrainedModel,
    bank: QuestionBank,
    folder: Path,
    *,
    label: str,
    steps: tuple[int, int],
    seed: int,
    lr: float = 1e-3,
) -> Connector:
    """Teach a connector to let the frozen language model answer.

    Stage 1 aligns without running the language model: query i of the first `len(FACTS)` learns to
    write the embeddings of fact i's key and true answer; of LLaMo, whose queries do not all read
    the same, any token may write any fact. Stage 2 is the language model's
    cross-entropy on answers, nothing else. Both see the truths of the questions on training
    molecules. Types of question weigh the same, and so do the two truths of a functional group.
    In stage 1 of MoRA a head, thrown away afterwards, tells the facts from what the generator's
    queries have read.

    Args:
        config: of the connector.
        features: of the training molecules.
        language_model: frozen.
        bank: its questions.
        folder: gets a checkpoint per stage.
        label: names the progress bars and the checkpoints.
        steps: of stage 1 and stage 2.
        seed: of weights and batches.
        lr: of stage 1; stage 2 takes half. Adapters have `ADAPTER_RATE`.
    """
    torch.manual_seed(seed)
    connector = make_connector(config)
    aligned = {LEVELS["name"]: _FreeAlignment, ADAPTERS["name"]: _Telling}
    align = aligned.get(config["name"], _Alignment)(
        connector, features, language_model.get_input_embeddings().weight, bank
    )
    answer = _Answering(connector, features, language_model, bank)
    for stage, (loss, count) in enumerate(zip((align, answer), steps, strict=True), start=1):
        rate = ADAPTER_RATE if connector.adapts else lr / stage
        fit(
            loss if isinstance(loss, nn.Module) else connector,
            loss,
            label=f"{label}, stage {stage}",
            checkpoint=folder / f"{label}.stage{stage}.pt",
            steps=count,
            lr=rate,
            seed=seed + stage,
        )
    answer.close()
    return connector.eval().requires_grad_(False)


class _Alignment:
    """Stage 1: tokens against the language model's embeddings of facts.

    With f_a the clean soft token of answer a, a token t is to be near that of the true answer and
    nearest to it: |t - f|^2 / |f|^2 + cross-entropy of softmax(-sharpness |t - f_a|^2).
    """

    BATCH, SHARPNESS = 64, 3.0

    def __init__(
        self, connector: Connector, features: Features, embedding: Tensor, bank: QuestionBank
    ) -> None:
        self.connector, self.features = connector, features
        columns = torch.arange(bank.answers.shape[1])
        self.facts = torch.arange(len(FACTS))
        self.clean = fact_embeddings(
            embedding.detach(), bank, self.facts[:, None].expand_as(bank.answers), columns
        )
        self.impossible = columns >= bank.num_answers[:, None]
        self.weights = question_odds(features.answers)

    def __call__(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = rng.choice(len(self.features), self.BATCH, replace=False)
        truth = torch.from_numpy(self.features.answers[rows].astype(np.int64))
        tokens = self.connector(*self.features.batch(rows))
        written = tokens.values[tokens.offsets[:-1, None] + self.facts]
        product = torch.einsum("bfd,fad->bfa", written, self.clean)
        norm = self.clean.square().sum(-1)
        distance = written.square().sum(-1, keepdim=True) - 2 * product + norm
        logits = (-self.SHARPNESS * distance).masked_fill(self.impossible, -torch.inf)
        nats = F.cross_entropy(logits.transpose(1, 2), truth, reduction="none")
        away = distance.gather(-1, truth[..., None]).squeeze(-1) / norm[self.facts, truth]
        weight = self.weights[self.facts, truth]
        value = (weight * (nats + away)).sum() / weight.sum()
        right = (logits.argmax(-1) == truth).float().mean()
        figures = {"nats": nats.mean().item(), "away": away.mean().item(), "right": right.item()}
        return value, figures


class _FreeAlignment(_Alignment):
    """Stage 1 where any token may write any fact, and none writes two.

    Facts are dealt to tokens by their losses over the batch, softly (`deal`), so that a token which
    writes a fact a little better than the others comes to write it.
    """

    def __call__(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = rng.choice(len(self.features), self.BATCH, replace=False)
        truth = torch.from_numpy(self.features.answers[rows].astype(np.int64))
        tokens = self.connector(*self.features.batch(rows))
        written = tokens.values.unflatten(0, (len(rows), -1))
        norm = self.clean.square().sum(-1)
        product = torch.einsum("btd,fad->btfa", written, self.clean)
        distance = written.square().sum(-1)[:, :, None, None] - 2 * product + norm
        logits = (-self.SHARPNESS * distance).masked_fill(self.impossible, -torch.inf)
        true = truth[:, None, :, None].expand(-1, logits.shape[1], -1, -1)
        nats = -logits.log_softmax(-1).gather(-1, true).squeeze(-1)
        away = distance.gather(-1, true).squeeze(-1) / norm[self.facts, truth][:, None]
        weight = self.weights[self.facts, truth][:, None]
        losses = (weight * (nats + away)).sum(0) / weight.sum(0)
        dealt = deal(losses.detach())
        value = (weight.sum((0, 1)) * (dealt * losses).sum(0)).sum() / weight.sum()
        writer = dealt.argmax(0)
        said = logits.argmax(-1)[:, writer, self.facts]
        figures = {
            "nats": nats[:, writer, self.facts].mean().item(),
            "away": away[:, writer, self.facts].mean().item(),
            "right": (said == truth).float().mean().item(),
            "writers": float(len(writer.unique())),
        }
        return value, figures


def deal(losses: Tensor, *, softness: float = 0.03, rounds: int = 30) -> Tensor:
    """How much of each fact every token is dealt, [T, F]: columns sum to 1, rows to at most 1.

    The deal that keeps sum(dealt * losses) low, softened by an entropy, by Sinkhorn's rounds over
    rows and columns (arXiv:1306.0895); tokens that are left over get facts without a loss. Where
    there are fewer tokens than facts, rows sum to at most F / T, rounded up.

    Args:
        losses: [T, F], of token t with fact f.
        softness: of losses, that count as alike.
        rounds: of scaling.

    >>> dealt = deal(torch.tensor([[0.1, 0.2], [0.5, 1.5], [0.9, 2.0]]))
    >>> dealt.round().int().tolist()
    [[0, 1], [1, 0], [0, 0]]
    """
    tokens, facts = losses.shape
    hands = -(-facts // tokens)
    log, spare = -losses.repeat(hands, 1) / softness, hands * tokens - facts
    log = F.pad(log, (0, spare), value=float(-losses.mean() / softness))
    for _ in range(rounds):
        log = log - log.logsumexp(1, keepdim=True)
        log = log - log.logsumexp(0, keepdim=True)
    return log[:, :facts].exp().unflatten(0, (hands, tokens)).sum(0)


class _Telling(nn.Module):
    """Stage 1 of MoRA: cross-entropy of the true answers, by a linear head on the queries."""

    BATCH = 64

    def __init__(
        self, connector: Connector, features: Features, embedding: Tensor, bank: QuestionBank
    ) -> None:
        super().__init__()
        self.connector, self.features = connector, features
        self.impossible = torch.arange(bank.answers.shape[1]) >= bank.num_answers[:, None]
        self.weights = question_odds(features.answers)
        queries = sum(generator.queries.shape[1] for generator in connector.gen)
        self.head = nn.Linear(queries * connector.options.width, bank.answers.numel())

    def forward(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = rng.choice(len(self.features), self.BATCH, replace=False)
        truth = torch.from_numpy(self.features.answers[rows].astype(np.int64))
        keys = self.connector.keys(self.features.batch(rows)[0])
        read = torch.cat([generator.read(keys) for generator in self.connector.gen])
        logits = self.head(read.transpose(0, 1).flatten(1)).unflatten(1, self.impossible.shape)
        logits = logits.masked_fill(self.impossible, -torch.inf)
        nats = F.cross_entropy(logits.transpose(1, 2), truth, reduction="none")
        weight = self.weights[torch.arange(truth.shape[1]), truth]
        right = (logits.argmax(-1) == truth).float().mean()
        value = (weight * nats).sum() / weight.sum()
        return value, {"nats": nats.mean().item(), "right": right.item()}


class _Answering:
    """Stage 2: the language model's answers, from a molecule's tokens or with its adapters."""

    BATCH, QUESTIONS = 32, 8

    def __init__(
        self,
        connector: Connector,
        features: Features,
        language_model: PreTrainedModel,
        bank: QuestionBank,
    ) -> None:
        self.connector, self.features = connector, features
        self.language_model, self.bank = language_model, bank
        self.adapters: InstanceAdapters | None = None
        if connector.adapts:
            options = connector.options
            self.adapters = InstanceAdapters(language_model, options.widths, options.adapted)
        self.odds = question_odds(features.answers).log()

    def __call__(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = rng.choice(len(self.features), self.BATCH, replace=False)
        known = torch.from_numpy(self.features.answers[rows].astype(np.int64))
        lots = self.odds[torch.arange(len(FACTS)), known] + torch.from_numpy(
            rng.gumbel(size=known.shape)
        )
        facts = lots.topk(self.QUESTIONS).indices
        chance = torch.from_numpy(rng.random(facts.shape))
        phrasings = (chance * self.bank.num_phrasings[facts]).long()
        made = self.connector(*self.features.batch(rows))
        embedding = self.language_model.get_input_embeddings()
        tokens, using = made, nullcontext()
        if self.adapters is not None:
            none = embedding.weight.new_zeros(0, embedding.embedding_dim)
            tokens = MoleculeTokens(none, torch.zeros(len(rows) + 1, dtype=torch.int64))
            using = self.adapters.using(made)
        answers = known.gather(1, facts)
        packed = pack_questions(embedding, self.bank, *tokens, facts, phrasings, answers)
        with using:
            logits, true = reply_logits(self.language_model, packed)
        value = F.cross_entropy(logits.flatten(0, 2), true.flatten())
        right = (logits[:, :, 1].argmax(-1) == true[:, :, 1]).float().mean()
        return value, {"nats": value.item(), "right": right.item()}

    def close(self) -> None:
        """Leaves the language model as it was."""
        if self.adapters is not None:
            self.adapters.remove()


def question_odds(answers: np.ndarray) -> Tensor:
    """Weight [F, answers] with which a fact with that answer is asked about."""
    weights = torch.ones(len(FACTS), max(len(fact.answers) for fact in FACTS))
    types = {key: len(keys) for keys in QUESTION_TYPES.values() for key in keys}
    for i, fact in enumerate(FACTS):
        weights[i] = 1 / types[fact.key] ** 0.5
        if fact.kind == "group":
            share = np.bincount(answers[:, i], minlength=2) / len(answers)
            weights[i, :2] *= torch.from_numpy(0.5 / np.maximum(share, 0.01)).clamp(max=4)
    return weights
