"""The projectors of LLaMo against one another: equal budgets, seeds, intervals, on two tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rdkit import Chem
from rdkit.Chem.Scaffolds import MurckoScaffold
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedModel

import edt_kernels
from edt_former import shipped
from edt_former.chem import Molecule, rdkit_mol, read_molecule
from edt_former.connectors import Connector, make_connector
from edt_former.data.raw import Columns, read_rows
from edt_former.graph.encoder import GraphEncoder, make_encoder
from edt_former.language.frozen import load_part, write_json
from edt_former.processor import load_tokenizer
from edt_former.tasks.accuracy import Accuracy, resampled_accuracies
from edt_former.tasks.heldout import heldout_molecules
from edt_former.tasks.questions import FACTS, answer_ids
from edt_former.train.tiny.connector import Features, LevelTable, level_config, train_connector
from edt_former.train.tiny.data import MoleculeTable, prepare
from edt_former.train.tiny.loop import fit
from edt_former.train.tiny.packing import QuestionBank, pack_questions, reply_logits

PUBLISHED = "levels, one attention"
PROJECTORS: Mapping[str, Mapping[str, object]] = {
    PUBLISHED: {},
    "levels, one attention each": {"shared_attention": False},
    "levels, no motifs": {"motif_queries": 0},
    "level 1": {"projector": "low"},
    "last level": {"projector": "high"},
    "levels side by side": {"projector": "concat"},
    "learned mean of levels": {"projector": "average"},
    "skip connections": {"projector": "skip"},
    "resampler": {"projector": "resampler"},
}
"""By what a table calls them, what differs from the published projector. All but the one without
motifs write as many tokens."""

STEPS = (200, 30)
"""Of the two stages on the questions."""
REAL_STEPS, REAL_BATCH = 200, 64
ASKED = 150
"""Known drugs that are asked about."""
BATCH = 32
TEST_SHARE = 20
"""Percent of the scaffolds of the real set that are tested on."""
RESAMPLES = 1000
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Result:
    """Of one projector on one task.

    Attributes:
        score: the mean over seeds, with the 95 % interval of a bootstrap over molecules.
        difference: to the published projector on the same molecules, likewise.
        by_seed: the score of each seed.
        parameters: that were trained.
    """

    score: Accuracy
    difference: Accuracy
    by_seed: list[float]
    parameters: int


def run_ablation(
    data: Path,
    out: Path,
    table: Path,
    target: str,
    *,
    seeds: int = 2,
    processes: int = 2,
    scale: float = 0.1,
) -> dict[str, dict[str, Result]]:
    """Trains every projector on the questions of the recipe and on one property, from scratch.

    The graph encoder and the language model are those that ship, frozen. All projectors have the
    same molecules, steps, batches and learning rate. On the questions, the share right about known
    drugs is that of the answer's value where the language model is given the key, macro over types
    of question. On the property, the RMSE on scaffolds that no training step saw. All of it is in
    `results.json` in `out`. A run that was stopped is continued by the same call.

    Args:
        data: SMILES as for `edt_former.train.tiny.recipe.run_recipe`.
        out: gets molecules, checkpoints, predictions and results.
        table: of the property, see `edt_former.data.read_rows`.
        target: its column.
        seeds: of weights and batches, from 0.
        processes: that read molecules.
        scale: share of the recipe's molecules.

    Returns:
        By task ("questions", and `target`), then by projector.

    Raises:
        FileNotFoundError: a file is missing, or the package has no models.
        ValueError: the table has no such column; `out` has another run.
    """
    # Before the training on questions.
    molecules, values = _measured(table, target)
    tested = np.array([_is_tested(molecule) for molecule in molecules])
    if not tested.any():
        raise ValueError(f"{table} must have molecules of more scaffolds: none is left to test on")
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        **{"seeds": seeds, "scale": scale, "steps": list(STEPS), "property steps": REAL_STEPS},
        **{"target": target, "table": hashlib.sha256(table.read_bytes()).hexdigest()},
    }
    _same_run(out / "run.json", settings)
    if not (out / "data.json").exists():
        prepare(data, out, seed=0, processes=processes, scale=scale)
    folder = shipped.folder()
    encoder = load_part(make_encoder, folder / "graph_encoder").freeze()
    results = {
        "questions": _questions(out, folder / "language_model", encoder, seeds),
        target: _property(out, molecules, values, tested, encoder, seeds),
    }
    plain = {
        task: {name: asdict(result) for name, result in found.items()}
        for task, found in results.items()
    }
    write_json(out / "results.json", {"settings": settings, "results": plain})
    return results


def _same_run(file: Path, settings: dict) -> None:
    if not file.exists():
        write_json(file, settings)
    elif (found := json.loads(file.read_text())) != settings:
        raise ValueError(f"{file.parent} has a run with {found}, this one has {settings}")


def _configs(encoder: GraphEncoder, num_levels: int, llm_width: int) -> Iterator[tuple[str, dict]]:
    base = level_config(encoder, num_levels, llm_width)
    for name, options in PROJECTORS.items():
        yield name, {**base, **options}


def _questions(out: Path, language: Path, encoder: GraphEncoder, seeds: int) -> dict[str, Result]:
    features = LevelTable(MoleculeTable.load(out / "train"), encoder)
    drugs = [read_molecule(smiles) for _, smiles in heldout_molecules()[:ASKED]]
    truth = np.stack([answer_ids(molecule) for molecule in drugs])
    asked = LevelTable(MoleculeTable.of(drugs, truth, np.zeros((len(drugs), 1))), encoder)
    model = LlamaForCausalLM.from_pretrained(language, dtype=torch.float32)
    model.eval().requires_grad_(False)
    bank = QuestionBank.build(load_tokenizer(language), FACTS)

    def answer(config: dict, seed: int, folder: Path) -> np.ndarray:
        options = {"label": "connector", "steps": STEPS, "seed": seed, "lr": LEARNING_RATE}
        connector = train_connector(config, features, model, bank, folder, **options)
        return told_answers(connector, asked, model, bank)

    def score(answered: np.ndarray) -> np.ndarray:
        return resampled_accuracies(answered, truth, resamples=RESAMPLES)["macro"]

    configs = dict(_configs(encoder, features.num_levels, model.config.hidden_size))
    return _compare(out / "questions", configs, seeds, answer, score)


@torch.no_grad()
def told_answers(
    connector: Connector, features: Features, language_model: PreTrainedModel, bank: QuestionBank
) -> np.ndarray:
    """The likeliest value after the key, for every fact's first phrasing, int64 [M, F].

    Index into `Fact.answers`; -1 where it is no answer to the question.
    """
    facts = torch.arange(len(FACTS))
    found = []
    for first in range(0, len(features), BATCH):
        rows = np.arange(first, min(first + BATCH, len(features)))
        tokens = connector(*features.batch(rows))
        asked = facts.expand(len(rows), -1)
        none = torch.zeros_like(asked)
        embedding = language_model.get_input_embeddings()
        packed = pack_questions(embedding, bank, tokens.values, tokens.offsets, asked, none, none)
        logits, _ = reply_logits(language_model, packed)
        said = logits[:, :, 1].argmax(-1)
        same = said[..., None] == bank.answers
        same &= torch.arange(same.shape[-1]) < bank.num_answers[:, None]
        found.append(torch.where(same.any(-1), same.int().argmax(-1), -1))
    return torch.cat(found).numpy()


def _property(
    out: Path,
    molecules: list[Molecule],
    values: np.ndarray,
    tested: np.ndarray,
    encoder: GraphEncoder,
    seeds: int,
) -> dict[str, Result]:
    facts = np.zeros((len(molecules), len(FACTS)), dtype=np.int8)
    whole = MoleculeTable.of(molecules, facts, values[:, None])
    train = LevelTable(whole.take(np.flatnonzero(~tested)), encoder)
    test = LevelTable(whole.take(np.flatnonzero(tested)), encoder)
    truth = values[tested]

    def predict(config: dict, seed: int, folder: Path) -> np.ndarray:
        torch.manual_seed(seed)
        model = Regressor(make_connector(config), train.table.targets[:, 0])
        fit(
            model,
            partial(model.loss, train),
            label="regression",
            checkpoint=folder / "regression.pt",
            steps=REAL_STEPS,
            lr=LEARNING_RATE,
            seed=seed,
        )
        return model.eval().predict(test)

    def score(predicted: np.ndarray) -> np.ndarray:
        error = (predicted - truth) ** 2
        drawn = np.random.default_rng(0).integers(0, len(error), (RESAMPLES, len(error)))
        return np.sqrt(np.concatenate([[error.mean()], error[drawn].mean(1)]))

    configs = dict(_configs(encoder, train.num_levels, encoder.width))
    return _compare(out / "property", configs, seeds, predict, score)


class Regressor(nn.Module):
    """A connector and an MLP on the mean of its tokens, for one standardised number.

    Args:
        connector: any.
        values: of the training molecules, for their mean and spread.
    """

    def __init__(self, connector: Connector, values: np.ndarray) -> None:
        super().__init__()
        self.connector = connector
        self.mean, self.spread = float(values.mean()), float(values.std())
        width = connector.config["llm_width"]
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)
        )

    def forward(self, features: Features, rows: np.ndarray) -> Tensor:
        """Standardised predictions [len(rows)]."""
        tokens = self.connector(*features.batch(rows))
        return self.head(edt_kernels.segment_pool(tokens.values, tokens.offsets)).squeeze(1)

    def loss(
        self, features: LevelTable, rng: np.random.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of a random batch."""
        rows = rng.choice(len(features), REAL_BATCH, replace=False)
        known = torch.from_numpy(features.table.targets[rows, 0]).float()
        value = F.mse_loss(self(features, rows), (known - self.mean) / self.spread)
        return value, {"mse": value.item()}

    @torch.no_grad()
    def predict(self, features: LevelTable) -> np.ndarray:
        """[M], in the units of the values."""
        cuts = range(0, len(features), REAL_BATCH)
        rows = [np.arange(i, min(i + REAL_BATCH, len(features))) for i in cuts]
        return np.concatenate([self(features, r).numpy() for r in rows]) * self.spread + self.mean


def _measured(table: Path, target: str) -> tuple[list[Molecule], np.ndarray]:
    """Molecules of a table with their numbers; of equal ones the first."""
    found: dict[str, tuple[Molecule, float]] = {}
    for row in read_rows(table, Columns(targets=(target,))):
        if row.reason or row.targets[0] is None:
            continue
        molecule = read_molecule(row.molecules[0])
        if isinstance(molecule, Molecule):
            found.setdefault(molecule.smiles, (molecule, row.targets[0]))
    molecules, values = zip(*found.values(), strict=True)
    return list(molecules), np.array(values)


def _is_tested(molecule: Molecule) -> bool:
    """By the hash of its Murcko scaffold; molecules without rings by that of their SMILES."""
    scaffold = MurckoScaffold.GetScaffoldForMol(rdkit_mol(molecule))
    name = Chem.MolToSmiles(scaffold, isomericSmiles=False) or molecule.smiles
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < TEST_SHARE


def _compare(folder: Path, configs: dict[str, dict], seeds: int, run, score) -> dict[str, Result]:
    """Runs what is missing, and scores all of it against the published projector.

    Args:
        folder: gets a folder per run with its checkpoints and predictions.
        configs: of the projectors.
        seeds: of each.
        run: (config, seed, folder) to predictions.
        score: predictions to their score and its resamples.
    """
    samples: dict[str, np.ndarray] = {}
    for name, config in configs.items():
        found = []
        for seed in range(seeds):
            own = folder / f"{name.replace(',', '').replace(' ', '_')}.{seed}"
            file = own / "predictions.npy"
            if not file.exists():
                own.mkdir(parents=True, exist_ok=True)
                np.save(file, run(config, seed, own))
            found.append(score(np.load(file)))
        samples[name] = np.stack(found)
    published = samples[PUBLISHED].mean(0)
    return {
        name: Result(
            Accuracy.of(values.mean(0)),
            Accuracy.of(values.mean(0) - published),
            values[:, 0].round(4).tolist(),
            sum(p.numel() for p in make_connector(configs[name]).parameters()),
        )
        for name, values in samples.items()
    }


def result_lines(results: Mapping[str, Result]) -> list[list[object]]:
    """Lines of a table: projector, parameters, score, difference to the published one, by seed.

    >>> same = Accuracy(0.5, 0.4, 0.6), Accuracy(0.0, 0.0, 0.0)
    >>> result_lines({"levels": Result(*same, [0.4, 0.6], 12)})
    [['levels', 12, '0.500 [0.400, 0.600]', '+0.000 [+0.000, +0.000]', '0.400 0.600']]
    """
    return [
        [
            name,
            r.parameters,
            str(r.score),
            f"{r.difference.value:+.3f} [{r.difference.low:+.3f}, {r.difference.high:+.3f}]",
            " ".join(f"{value:.3f}" for value in r.by_seed),
        ]
        for name, r in results.items()
    ]
