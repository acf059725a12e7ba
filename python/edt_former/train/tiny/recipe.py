"""The recipe from files of SMILES to the shipped models: every step resumable, all of it seeded."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import LlamaForCausalLM

from edt_former import shipped
from edt_former.chem import (
    Conformer,
    ConformerOptions,
    Molecule,
    make_conformers,
    read_molecule,
)
from edt_former.graph.blending import FLAT, SPATIAL
from edt_former.graph.encoder import GraphEncoder, make_encoder
from edt_former.language.frozen import load_part, share_weights, write_json
from edt_former.model import MoleculeLM
from edt_former.processor import load_tokenizer
from edt_former.tasks.accuracy import Guesses
from edt_former.tasks.evaluation import compare
from edt_former.tasks.heldout import heldout_molecules
from edt_former.tasks.questions import FACTS, answer_ids
from edt_former.tokens import NextAtomPredictor
from edt_former.train.tiny.conformers import CONFORMERS, TIMEOUT, place
from edt_former.train.tiny.connector import (
    ADAPTERS,
    ANCHORS,
    LEVELS,
    Features,
    GraphTable,
    LevelTable,
    adapter_config,
    connector_configs,
    level_config,
    read_features,
    train_connector,
)
from edt_former.train.tiny.data import MoleculeTable, prepare
from edt_former.train.tiny.encoder import (
    SPATIALLY_SUPERVISED,
    train_blending,
    train_encoder,
    train_spatial_encoder,
)
from edt_former.train.tiny.packing import QuestionBank
from edt_former.train.tiny.predictor import surprise, train_predictor
from edt_former.train.tiny.reader import train_reader

STEPS = {
    "encoder": 800,
    "3D encoder": 2400,
    "blending": 600,
    "predictor": 600,
    "reader": 500,
    "stage 1": 2200,
    "stage 2": 300,
    "MoRA, stage 1": 1000,
}
HALF = torch.float16
"""Of the weights on disk. Frozen parts are rounded before anything is trained against them."""

METHOD = {
    "graph encoders": "self-supervised; no fact that a question asks for is among their targets; "
    "2D learned from all training molecules, 3D and the blending of both from those with a "
    "conformer",
    "language model": "never sees a molecule; learned to read facts that stand in its context as "
    "soft tokens, each the sum of the embeddings of a key and an answer, under noise and clutter, "
    "and to echo the key before the answer; frozen after it passed the gate (see reading)",
    "connectors": "trained from scratch against the same frozen parts, with the truths of the "
    "questions on training molecules, in 3D and both on those with a conformer; stage 1: a query "
    "per fact learns to write its soft token, LLaMo's by the facts that it is dealt; of MoRA a "
    "head learns to tell the facts from the queries, and is thrown away; stage 2: the language "
    "model's loss on answers alone",
}

TEST_MOLECULES = 300
"""Of the scaffold-held-out split, asked about in the final evaluation."""


def run_recipe(
    data: Path, out: Path, *, seed: int = 0, processes: int = 2, scale: float = 1.0
) -> None:
    """Train everything that ships with the package, into `out`/shipped.

    A run that was stopped, in whatever way, is continued by the same call. `out`/shipped gets
    `language_model`, `predictor`, `graph_encoder` (2D) and beside it `graph_encoder_3d` and
    `graph_encoder_both`, one folder per connector and `manifest.json`: data hashes, split, steps,
    seconds, versions, accuracies with 95 % intervals.

    Args:
        data: a folder with the files of `edt_former.train.tiny.data.SOURCES`.
        out: gets checkpoints and results.
        seed: of everything.
        processes: that read molecules and make conformers.
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
    with clock("frozen features"):
        features = read_features(train, encoder, predictor)
    tokens = ANCHORS + features.patch_counts
    sizes = np.diff(train.offsets)
    guesses = Guesses.count(train.answers.astype(np.int64), sizes, tokens)
    asked = {
        "known drugs": _known_drugs(processes),
        "held-out scaffolds": _first(test, TEST_MOLECULES, processes),
    }
    connectors = _Connectors(out, out / "reader", seed, steps, clock, predictor, guesses, asked)
    width = connectors.language_model.config.hidden_size
    configs = connector_configs(encoder.width, width, round(tokens.mean()))
    results = {
        name: connectors.make(name, config, encoder, features) for name, config in configs.items()
    }
    levels = LevelTable(train, encoder)
    config = level_config(encoder, levels.num_levels, width)
    results[config["name"]] = connectors.make(config["name"], config, encoder, levels)
    config = adapter_config(encoder.width, connectors.language_model)
    graphs = GraphTable(train, encoder)
    results[config["name"]] = connectors.make(config["name"], config, encoder, graphs)

    with clock("conformers"):
        count = max(2, round(CONFORMERS * scale))
        placed, left_out = place(train, out / "places", count, seed=seed, processes=processes)
    with clock("3D encoder"):
        spatial = train_spatial_encoder(
            placed, out / "encoder_3d.pt", steps=steps["3D encoder"], seed=seed
        )
        round_weights(spatial)
    with clock("blending"):
        blended = train_blending(
            placed, encoder, spatial, out / "blending.pt", steps=steps["blending"], seed=seed
        )
        round_weights(blended)
    for view, graph_encoder in (("3d", spatial), ("both", blended)):
        with clock("frozen features"):
            features = read_features(placed, graph_encoder, predictor)
        name = f"edt_former_{view}"
        config = {**configs["edt_former"], "encoder_width": graph_encoder.width}
        results[name] = connectors.make(
            name, config, graph_encoder, features, frozen_name=f"graph_encoder_{view}"
        )

    made = out / "shipped"
    views = {FLAT: "graph_encoder", SPATIAL: "graph_encoder_3d"}
    share_weights(
        made / "graph_encoder_both",
        {f"graph_encoder.{view}.": made / name for view, name in views.items()},
    )

    data_facts = json.loads((out / "data.json").read_text())
    data_facts["conformers"] = {
        "molecules": len(placed),
        "left_out": left_out,
        "timeout": TIMEOUT,
        "self_supervised": SPATIALLY_SUPERVISED,
        "drawn flat": {name: those.drawn_flat for name, those in asked.items()},
    }
    write_json(out / "data.json", data_facts)
    manifest = {
        "method": METHOD,
        "data": data_facts,
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
    write_json(out / "shipped" / "manifest.json", manifest)


def add_connector(
    data: Path, out: Path, name: str, *, seed: int = 0, processes: int = 2, scale: float = 1.0
) -> None:
    """Train one connector on bonds against the frozen parts that ship with the package.

    `out`/shipped gets a copy of what ships and the connector, trained and asked as `run_recipe`
    would; its accuracies are in the manifest there. A run that was stopped is continued by the same
    call.

    Args:
        data: with the next, see `run_recipe`.
        out: gets checkpoints and results.
        name: "llamo", "mora", or another connector of the recipe that reads the 2D graph encoder.
        seed: of the connector and, as of the frozen parts, of the molecules.
        processes: that read molecules.
        scale: share of molecules and steps, for a quick trial.

    Raises:
        FileNotFoundError: a file of SMILES is missing, or the package has no models.
        ValueError: no such connector; `out` has a run with another name, seed or scale.
    """
    made = out / "shipped"
    out.mkdir(parents=True, exist_ok=True)
    _same_run(out / "run.json", {"connector": name, "seed": seed, "scale": scale})
    if not made.exists():
        partial = out / "shipped.partial"
        shutil.copytree(shipped.folder(), partial, dirs_exist_ok=True)
        partial.rename(made)
    manifest = json.loads((made / "manifest.json").read_text())
    clock = _Clock(out / "seconds.json")
    steps = {stage: max(2, round(count * scale)) for stage, count in STEPS.items()}
    with clock("data"):
        if not (out / "data.json").exists():
            prepare(data, out, seed=seed, processes=processes, scale=scale)
    train, test = MoleculeTable.load(out / "train"), MoleculeTable.load(out / "test")
    encoder = load_part(make_encoder, made / "graph_encoder").freeze()
    predictor = load_part(NextAtomPredictor, made / "predictor").eval().requires_grad_(False)
    asked = {
        "known drugs": _known_drugs(processes),
        "held-out scaffolds": _first(test, TEST_MOLECULES, processes),
    }
    guesses = Guesses.from_json(manifest["guesses"])
    language_model = made / "language_model"
    connectors = _Connectors(out, language_model, seed, steps, clock, predictor, guesses, asked)
    width = connectors.language_model.config.hidden_size
    equal = round(manifest["mean tokens of EDT-Former"])
    configs = connector_configs(encoder.width, width, equal)
    configs[ADAPTERS["name"]] = adapter_config(encoder.width, connectors.language_model)
    if name == ADAPTERS["name"]:
        config, features = configs[name], GraphTable(train, encoder)
    elif name == LEVELS["name"]:
        features = LevelTable(train, encoder)
        config = level_config(encoder, features.num_levels, width)
    elif name in configs:
        config, features = configs[name], read_features(train, encoder, predictor)
    else:
        known = ", ".join(map(repr, (*configs, LEVELS["name"])))
        raise ValueError(f"name must be one of {known}, got {name!r}")
    manifest["accuracy"][name] = connectors.make(name, config, encoder, features, save_frozen=False)
    manifest["method"] = METHOD
    manifest["seconds"][name] = clock.seconds[name]
    write_json(made / "manifest.json", manifest)


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


@dataclass(frozen=True)
class _Asked:
    """Molecules to ask about.

    Attributes:
        molecules: M of them.
        truth: int64 [M, F].
        processes: that make conformers.
    """

    molecules: list[Molecule]
    truth: np.ndarray
    processes: int

    @cached_property
    def conformers(self) -> list[Conformer]:
        """One each; a drawing where there is none, so that every connector is asked the same."""
        options = ConformerOptions(flat=True)
        return make_conformers(self.molecules, options, workers=self.processes, progress=True)

    @property
    def drawn_flat(self) -> int:
        """How many have no conformer."""
        return sum(conformer.flat for conformer in self.conformers)


class _Connectors:
    """Makes connectors against the same frozen language model and predictor, and asks them."""

    def __init__(
        self,
        out: Path,
        language_model: Path,
        seed: int,
        steps: dict[str, int],
        clock: _Clock,
        predictor: NextAtomPredictor,
        guesses: Guesses,
        asked: dict[str, _Asked],
    ) -> None:
        self.out, self.seed, self.clock = out, seed, clock
        self.steps = (steps["stage 1"], steps["stage 2"])
        self.adapter_steps = (steps["MoRA, stage 1"], steps["stage 2"])
        self.predictor, self.guesses, self.asked = predictor, guesses, asked
        reader = LlamaForCausalLM.from_pretrained(language_model, dtype=torch.float32)
        self.language_model = reader.eval().requires_grad_(False)
        round_weights(self.language_model)
        self.tokenizer = load_tokenizer(language_model)
        self.bank = QuestionBank.build(self.tokenizer, FACTS)

    def make(
        self,
        name: str,
        config: dict,
        encoder: GraphEncoder,
        features: Features,
        *,
        frozen_name: str = "graph_encoder",
        save_frozen: bool = True,
    ) -> dict[str, dict]:
        """Train a connector, save it beside its frozen parts, ask the saved model.

        Args:
            name: of its folder, its checkpoints and its seconds.
            config: of the connector.
            encoder: frozen.
            features: what it says of the training molecules.
            frozen_name: of its folder.
            save_frozen: write the frozen parts; else they are there.

        Returns:
            See `_evaluate`.
        """
        with self.clock(name):
            connector = train_connector(
                config,
                features,
                self.language_model,
                self.bank,
                self.out,
                label=name,
                steps=self.adapter_steps if config["name"] == ADAPTERS["name"] else self.steps,
                seed=self.seed,
            )
            round_weights(connector)
        model = MoleculeLM.from_parts(
            self.language_model, encoder, connector, self.predictor, tokenizer=self.tokenizer
        )
        made = self.out / "shipped"
        saved = made / name
        names = {"graph_encoder": frozen_name}
        model.save_pretrained(
            saved, save_frozen=save_frozen, frozen_folder=made, frozen_names=names, dtype=HALF
        )
        with self.clock("evaluation"):
            return _evaluate(MoleculeLM.from_pretrained(saved), self.guesses, self.asked)


def _evaluate(model: MoleculeLM, guesses: Guesses, asked: dict[str, _Asked]) -> dict[str, dict]:
    """Accuracies by type of the model and of every baseline, on both held-out sets."""
    result = {}
    for name, those in asked.items():
        if model.graph_encoder.needs_coordinates:
            model.processor.keep_conformers(those.molecules, those.conformers)
        compared = compare(model, those.molecules, those.truth, guesses)
        result[name] = {
            who: {kind: asdict(accuracy) for kind, accuracy in by_type.items()}
            for who, by_type in compared.items()
        }
    return result


def _known_drugs(processes: int) -> _Asked:
    molecules = [read_molecule(smiles) for _, smiles in heldout_molecules()]
    truth = np.stack([answer_ids(molecule) for molecule in molecules])
    return _Asked(molecules, truth, processes)


def _first(table: MoleculeTable, count: int, processes: int) -> _Asked:
    rows = np.arange(min(count, len(table)))
    return _Asked(table.molecules(rows), table.answers[rows].astype(np.int64), processes)


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
