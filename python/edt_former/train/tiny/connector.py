"""Connectors of the recipe, each trained from scratch against the same frozen parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange
from transformers import PreTrainedModel

from edt_former.connectors import Connector, make_connector
from edt_former.graph.encoder import GraphEncoder, GraphFeatures
from edt_former.tasks.questions import FACTS, QUESTION_TYPES
from edt_former.tokens import NextAtomPredictor, PatchOptions
from edt_former.train.tiny.data import MoleculeTable, gather_ranges
from edt_former.train.tiny.loop import fit
from edt_former.train.tiny.packing import QuestionBank, pack_questions, reply_logits
from edt_kernels import Patches

SIZES = {"width": 128, "layers": 3, "heads": 4, "ffn": 512, "dropout": 0.0, "sum_tokens": 4}
"""Of every connector; all have the sums over atoms, without which none can count."""

PATCHES = PatchOptions(sources=("entropy",), rule="local_max")


def connector_configs(encoder_width: int, llm_width: int, equal_tokens: int) -> dict[str, dict]:
    """EDT-Former, the static Q-Former with 32 queries, and with as many as EDT-Former's mean."""
    common = {**SIZES, "encoder_width": encoder_width, "llm_width": llm_width}
    common["cross_attention_freq"] = 1
    patches = {"sources": PATCHES.sources, "rule": PATCHES.rule}
    return {
        "edt_former": {"name": "edt_former", **common, "num_queries": 32, "patches": patches},
        "qformer_32": {"name": "qformer", **common, "num_queries": 32},
        f"qformer_{equal_tokens}": {"name": "qformer", **common, "num_queries": equal_tokens},
    }


@dataclass(frozen=True)
class FeatureTable:
    """What the frozen parts say of M molecules, computed once.

    Attributes:
        values: float16 [N, D] atom features, offsets: [M + 1].
        starts: bool [N], the atoms that open a patch.
        answers: [M, F].
    """

    values: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    answers: np.ndarray

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
        features = torch.from_numpy(self.values[atoms]).float()
        return GraphFeatures(features, bounds), {"entropy": patches}


@torch.no_grad()
def read_features(
    table: MoleculeTable, encoder: GraphEncoder, predictor: NextAtomPredictor, *, batch: int = 512
) -> FeatureTable:
    """Run the frozen encoder and predictor over a table."""
    values, starts = [], []
    for first in trange(0, len(table), batch, desc="frozen features", unit="batch"):
        graph = table.batch(np.arange(first, min(first + batch, len(table))))
        values.append(encoder(graph).values.half().numpy())
        _, patches = predictor.patches(graph.elements, graph.offsets, **PATCHES.cutting())
        opens = torch.zeros(graph.num_atoms, dtype=torch.bool)
        opens[patches.trim().atom_offsets[:-1]] = True
        starts.append(opens.numpy())
    return FeatureTable(np.concatenate(values), table.offsets, np.concatenate(starts), table.answers)


def train_connector(
    config: dict,
    features: FeatureTable,
    language_model: PreTrainedModel,
    bank: QuestionBank,
    checkpoint: Path,
    *,
    label: str,
    steps: int,
    seed: int,
    lr: float = 1e-3,
    batch: int = 64,
    questions: int = 8,
) -> Connector:
    """Teach a connector to write tokens from which the frozen language model answers.

    The loss is the language model's cross-entropy on answers, nothing else. Types of question
    are drawn equally often, and the two truths of a functional group too.
    """
    torch.manual_seed(seed)
    connector = make_connector(config)
    odds = question_odds(features.answers)

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = rng.choice(len(features), batch, replace=False)
        known = torch.from_numpy(features.answers[rows].astype(np.int64))
        lots = odds[torch.arange(len(FACTS)), known].log() + torch.from_numpy(rng.gumbel(size=known.shape))
        facts = lots.topk(questions).indices
        chance = torch.from_numpy(rng.random(facts.shape))
        phrasings = (chance * bank.num_phrasings[facts]).long()
        tokens = connector(*features.batch(rows))
        embedding = language_model.get_input_embeddings()
        packed = pack_questions(
            embedding, bank, tokens.values, tokens.offsets, facts, phrasings, known.gather(1, facts)
        )
        logits, true = reply_logits(language_model, packed)
        value = F.cross_entropy(logits.flatten(0, 2), true.flatten())
        right = (logits[:, :, 1].argmax(-1) == true[:, :, 1]).float().mean()
        return value, {"nats": value.item(), "right": right.item()}

    fit(connector, loss, label=label, checkpoint=checkpoint, steps=steps, lr=lr, seed=seed)
    return connector.eval().requires_grad_(False)


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
