"""The recipe from files of SMILES to the shipped models: every step resumable, all of it seeded."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from edt_former.chem import Molecule, read_molecule
from edt_former.language.frozen import write_json
from edt_former.model import MoleculeLM
from edt_former.tasks.accuracy import Guesses
from edt_former.tasks.evaluation import compare
from edt_former.tasks.heldout import heldout_molecules
from edt_former.tasks.questions import FACTS, answer_ids
from edt_former.train.tiny.connector import (
    ANCHORS,
    connector_configs,
    read_features,
    train_connector,
)
from edt_former.train.tiny.data import MoleculeTable, prepare
from edt_former.train.tiny.encoder import train_encoder
from edt_former.train.tiny.packing import QuestionBank
from edt_former.train.tiny.predictor import surprise, train_predictor
from edt_former.train.tiny.reader import train_reader

STEPS = {"encoder": 800, "predictor": 600, "reader": 500, "stage 1": 2200, "stage 2": 300}
HALF = torch.float16
"""Of the weights on disk. Frozen parts are rounded before anything is trained against them."""

METHOD = {
    "graph encoder": "self-supervised; no fact that a question asks for is among its targets",
    "language model": "never sees a molecule; learned to read facts that stand in its context as "
    "soft tokens, each the sum of the embeddings of a key and an answer, under noise and clutter, "
    "and to echo the key before the answer; frozen after it passed the gate (see reading)",
    "connectors": "trained from scratch against the same frozen parts, with the truths of the "
    "questions on training molecules; stage 1: a query per fact learns to write its soft token; "
    "stage 2: the language model's loss on answers alone",
}

TEST_MOLECULES = 300
"""Of the scaffold-held-out split, asked about in the final evaluation."""


def run_recipe(
    data: Path, out: Path, *, seed: int = 0, processes: int = 2, scale: float = 1.0
) -> None:
    """Train everything that ships with the package, into `out`/shipped.

    A run that was stopped, in whatever way, is continued by the same call. `out`/shipped gets
    `language_model`, `graph_encoder`, `predictor`, one folder per connector and `manifest.json`:
    data hashes, split, steps, seconds, versions, accuracies with 95 % intervals.

    Args:
        data: a folder with the files of `edt_former.train.tiny.data.SOURCES`.
        out: gets checkpoints and results.
        seed: of everything.
        processes: that read molecules.
        scale: share of molecules and steps, for a quick trial.

    Raises:
        FileNotFoundError: a file of SMILES is missing.
        RuntimeError: the language model did not learn to read facts.
        ValueError: `out` has a run with another seed or scale.
    """
    out.mkdir(parents=True, exist_ok=True)
    _same_run(out / "run.json", {"seed": seed, "scale": scale})
    clock = _Clock(out / "seconds.json")
    steps = {name: max(2, round(count * scale)) for name, count in STEPS.items()}
    with clock("data"):
        if not (out / "data.json").exists():
            prepare(data, out, seed=seed, processes=processes, scale=scale)
    train, test = MoleculeTable.load(out / "train"), MoleculeTable.load(out / "test")
    with clock("graph encoder"):
        encoder = train_encoder(train, out / "encoder.pt", steps=steps["encoder"], seed=seed)
        round_weights(encoder)
    with clock("next-atom predictor"):
        predictor = train_predictor(
            train, out / "predictor.pt", steps=steps["predictor"], seed=seed
        )
        round_weights(predictor)
    with clock("language model"):
        if not (out / "reader" / "metrics.json").exists():
            gate = 0.97 if scale == 1 else 0.0
            train_reader(train.answers, out / "reader", seed, steps["reader"], gate=gate)
    language_model = LlamaForCausalLM.from_pretrained(out / "reader").eval().requires_grad_(False)
    round_weights(language_model)
    tokenizer = AutoTokenizer.from_pretrained(out / "reader")
    bank = QuestionBank.build(tokenizer, FACTS)

    with clock("frozen features"):
        features = read_features(train, encoder, predictor)
    tokens = ANCHORS + features.patch_counts
    width = language_model.config.hidden_size
    configs = connector_configs(encoder.width, width, round(tokens.mean()))
    sizes = np.diff(train.offsets)
    guesses = Guesses.count(train.answers.astype(np.int64), sizes, tokens)

    shipped = out / "shipped"
    known, asked = _known_drugs(), _first(test, TEST_MOLECULES)
    results: dict[str, dict] = {}
    for name, config in configs.items():
        with clock(name):
            connector = train_connector(
                config,
                features,
                language_model,
                bank,
                out,
                label=name,
                steps=(steps["stage 1"], steps["stage 2"]),
                seed=seed,
            )
            round_weights(connector)
        model = MoleculeLM.from_parts(
            language_model, encoder, connector, predictor, tokenizer=tokenizer
        )
        first = name == next(iter(configs))
        model.save_pretrained(shipped / name, save_frozen=first, frozen_folder=shipped, dtype=HALF)
        with clock("evaluation"):
            results[name] = _evaluate(
                MoleculeLM.from_pretrained(shipped / name), guesses, known, asked
            )
    manifest = {
        "method": METHOD,
        "data": json.loads((out / "data.json").read_text()),
        "seed": seed,
        "scale": scale,
        "steps": steps,
        "seconds": clock.seconds,
        "versions": _versions(),
        "mean tokens of EDT-Former": round(float(tokens.mean()), 2),
        "next-atom surprise, nats": round(surprise(predictor, test), 4),
        "reading": json.loads((out / "reader" / "metrics.json").read_text())["reading"],
        "accuracy": results,
        "guesses": guesses.to_json(),
    }
    write_json(shipped / "manifest.json", manifest)


def _same_run(file: Path, settings: dict) -> None:
    """Remember the settings of a run; one with others must not go on from its checkpoints."""
    if not file.exists():
        write_json(file, settings)
    elif (found := json.loads(file.read_text())) != settings:
        raise ValueError(f"{file.parent} has a run with {found}, this one has {settings}")


@torch.no_grad()
def round_weights(module: nn.Module) -> None:
    """Round float weights to what the shipped files hold."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(HALF))


def _evaluate(
    model: MoleculeLM,
    guesses: Guesses,
    known: tuple[list[Molecule], np.ndarray],
    asked: tuple[list[Molecule], np.ndarray],
) -> dict[str, dict]:
    """Accuracies by type of the model and of every baseline, on both held-out sets."""
    result = {}
    for name, (molecules, truth) in {"known drugs": known, "held-out scaffolds": asked}.items():
        compared = compare(model, molecules, truth, guesses)
        result[name] = {
            who: {kind: asdict(accuracy) for kind, accuracy in by_type.items()}
            for who, by_type in compared.items()
        }
    return result


def _known_drugs() -> tuple[list[Molecule], np.ndarray]:
    molecules = [read_molecule(smiles) for _, smiles in heldout_molecules()]
    return molecules, np.stack([answer_ids(molecule) for molecule in molecules])


def _first(table: MoleculeTable, count: int) -> tuple[list[Molecule], np.ndarray]:
    rows = np.arange(min(count, len(table)))
    return table.molecules(rows), table.answers[rows].astype(np.int64)


def _versions() -> dict[str, str]:
    names = ("edt-kernels", "torch", "transformers", "rdkit", "numpy")
    return {**{name: version(name) for name in names}, "python": platform.python_version()}


class _Clock:
    """Seconds spent in each step, over all runs of the recipe."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds = json.loads(file.read_text()) if file.exists() else {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] = round(self.seconds.get(step, 0) + time.perf_counter() - start, 1)
            write_json(self.file, self.seconds)
