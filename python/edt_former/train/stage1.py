"""The first stage: a connector learns to read molecules by their texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edt_former.connectors import QFormer, load_bert, make_connector
from edt_former.data import PreparedData, Row
from edt_former.graph import GraphBatch, GraphEncoder
from edt_former.language.frozen import CONFIG, WEIGHTS, read_weights, write_json, write_weights
from edt_former.language.manifest import FrozenPart, Manifest
from edt_former.processor import PatchSets
from edt_former.train.config import Stage1Config
from edt_former.train.molecules import MoleculeBatch
from edt_former.train.objectives import CONNECTOR, HEADS, RepresentationLearning
from edt_former.train.parts import (
    GRAPH_ENCODER,
    PREDICTOR,
    frozen_part,
    needed_predictor,
    part_folder,
    read_graph_encoder,
)
from edt_former.train.provenance import describe_run
from edt_former.train.ranks import main_first
from edt_former.train.start import begin
from edt_former.train.trainer import ConnectorTrainer
from edt_former.train.words import FILE, Words

WORDS = "words"
CHARACTERS_PER_WORD = 4
"""About; for the balance of processes only."""


class Stage1Model(nn.Module):
    """Graph encoder, connector and heads as one model, from a batch to its losses.

    Args:
        graph_encoder: frozen by the caller, or not.
        objective: connector and heads.
        words: of the texts; saved beside them.
        parts: the frozen parts, for the manifest.
    """

    def __init__(
        self,
        graph_encoder: GraphEncoder,
        objective: RepresentationLearning,
        words: Words,
        parts: Mapping[str, FrozenPart],
    ) -> None:
        super().__init__()
        self.graph_encoder, self.objective = graph_encoder, objective
        self.words, self.parts = words, dict(parts)

    def forward(
        self, graph: GraphBatch, patches: PatchSets, text_ids: Tensor, text_offsets: Tensor
    ) -> dict[str, Tensor]:
        """ "loss", and what it is the sum of."""
        device = text_ids.device
        features = self.graph_encoder(graph.to(device))
        losses = self.objective(features, dict(patches.to(device)), text_ids, text_offsets)
        return {"loss": losses.total, **losses._asdict()}

    def declared(self) -> list[str]:
        """The parameters that this stage trains: of the objective, and of an encoder that is not
        frozen."""
        prefixes = ["objective."] if self.graph_encoder.frozen else ["objective.", "graph_encoder."]
        return [n for n, _ in self.named_parameters() if n.startswith(tuple(prefixes))]

    def save_pretrained(
        self, folder: Path | str, *, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Writes `connector/`, `heads/`, `words/`, a manifest of the frozen parts, and the graph
        encoder where it is trained."""
        folder = Path(folder)
        state = self.state_dict() if state_dict is None else state_dict
        self.objective.save_pretrained(folder, state_dict=_inside(state, "objective."))
        self.words.save(folder / WORDS)
        parts = dict(self.parts)
        if not self.graph_encoder.frozen:
            where = folder / GRAPH_ENCODER
            where.mkdir(exist_ok=True)
            write_json(where / CONFIG, self.graph_encoder.config)
            write_weights(where / WEIGHTS, _inside(state, "graph_encoder."), None)
            parts[GRAPH_ENCODER] = frozen_part(where)
        Manifest(folder.resolve(), parts).write()

    def read_trained(self, folder: Path) -> dict[str, Tensor]:
        """What `save_pretrained` wrote, by the names of this model's state."""
        state = {f"objective.{n}": x for n, x in read_weights(folder / HEADS)}
        inside = read_weights(folder / CONNECTOR)
        state |= {f"objective.{CONNECTOR}.{n}": x for n, x in inside}
        if not self.graph_encoder.frozen:
            tuned = read_weights(folder / GRAPH_ENCODER)
            state |= {f"graph_encoder.{n}": x for n, x in tuned}
        return state

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Stage1Model:
        """Reads what `save_pretrained` wrote, with its graph encoder; in eval mode, frozen.

        Raises:
            FileNotFoundError: a file or the graph encoder is missing.
            ValueError: weights do not fit.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        encoder = read_graph_encoder(manifest.folder(GRAPH_ENCODER)).freeze()
        objective = RepresentationLearning.from_pretrained(folder)
        words = Words.read(folder / WORDS / FILE)
        model = cls(encoder, objective, words, manifest.parts)
        return model.eval().requires_grad_(False)


def _inside(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}


class Stage1Batch:
    """Rows with one molecule and a text become a batch of a `Stage1Model`.

    Args:
        molecules: of the rows.
        words: of their texts.
        max_words: of a text; None for all.
    """

    def __init__(
        self, molecules: MoleculeBatch, words: Words, *, max_words: int | None = None
    ) -> None:
        self.molecules, self.words, self.max_words = molecules, words, max_words

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The arguments of `Stage1Model.forward`."""
        graph, patches = self.molecules(rows)
        ids, offsets = self.words([row.text for row in rows], max_words=self.max_words)
        return {"graph": graph, "patches": patches, "text_ids": ids, "text_offsets": offsets}


def train_stage1(config: Stage1Config) -> Path:
    """Runs the first stage, or goes on with it; the folder of what it made.

    Raises:
        FileNotFoundError: a part or data are missing.
        ValueError: the connector has no text branch; options are unknown or do not fit; the folder
            has a run that was told something else.
    """
    out = begin(config)
    torch.manual_seed(config.seed)
    encoder_folder = part_folder(GRAPH_ENCODER, config.graph_encoder)
    encoder = read_graph_encoder(encoder_folder)
    if not config.tune_graph_encoder:
        encoder.freeze()
    data = PreparedData(config.data.train, wants=("text", "molecule"))
    with main_first():
        words = _words(config, data, out)
    connector = _connector(config, encoder, words)
    predictor, predictor_folder = needed_predictor(
        connector.patch_options, lambda: part_folder(PREDICTOR, config.predictor)
    )
    objective = RepresentationLearning(
        connector, begin_id=words.begin_id, **asdict(config.objective)
    )
    if config.text.bert is not None:
        load_bert(connector.Qformer, config.text.bert, word_head=objective.cls)
    parts = {GRAPH_ENCODER: frozen_part(encoder_folder)}
    if predictor_folder is not None:
        parts[PREDICTOR] = frozen_part(predictor_folder)
    model = Stage1Model(encoder, objective, words, parts)
    validation = None
    if config.data.validation:
        validation = PreparedData(config.data.validation, wants=("text", "molecule"))
    molecules = MoleculeBatch(encoder, connector, predictor, data, validation)
    collate = Stage1Batch(molecules, words, max_words=config.text.max_words)
    trainer = ConnectorTrainer(
        model,
        collate,
        data,
        config.training,
        out,
        model.declared(),
        costs=data.atoms() + data.characters() // CHARACTERS_PER_WORD,
        validation=validation,
        workers=config.data.workers,
        seed=config.seed,
        provenance=describe_run("stage1", config, data),
        label="stage 1",
    )
    return trainer.run()


def _words(config: Stage1Config, data: PreparedData, out: Path) -> Words:
    """The words of the run, those of its first start where there was one."""
    kept = out / WORDS / FILE
    if kept.exists():
        return Words.read(kept)
    if config.text.bert is not None:
        words = Words.read(Path(config.text.bert, FILE))
    elif isinstance(config.text.vocabulary, int):
        texts = (data[i].text for i in range(len(data)))
        words = Words.learn(texts, config.text.vocabulary)
    else:
        words = Words.read(config.text.vocabulary)
    words.save(out / WORDS)
    return words


def _connector(config: Stage1Config, encoder: GraphEncoder, words: Words) -> QFormer:
    options = {
        **config.connector,
        "encoder_width": encoder.width,
        "llm_width": None,
        "text_vocab_size": words.size,
    }
    try:
        connector = make_connector(options)
    except TypeError as error:
        raise ValueError(f"connector: {error}") from error
    if not isinstance(connector, QFormer):
        raise ValueError(
            "the first stage needs a connector with a text branch, a Q-Former; "
            f"{options['name']!r} is none, it starts with the second"
        )
    return connector
