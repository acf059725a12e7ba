"""The second stage: a connector learns to let a frozen language model read molecules."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from edt_former.checkpoint import local_folder, part_in
from edt_former.connectors import Connector, make_connector
from edt_former.data import PreparedData
from edt_former.graph import GraphEncoder
from edt_former.language import connector_options
from edt_former.language.frozen import CONFIG, load_strictly, read_json, read_weights
from edt_former.model import MoleculeLM
from edt_former.processor import load_tokenizer
from edt_former.train.config import Stage2Config, TrainingConfig
from edt_former.train.conversations import ConversationBatch, row_costs
from edt_former.train.objectives import CONNECTOR
from edt_former.train.parts import (
    GRAPH_ENCODER,
    PREDICTOR,
    module_hash,
    needed_predictor,
    part_folder,
    read_graph_encoder,
)
from edt_former.train.provenance import describe_run
from edt_former.train.start import begin
from edt_former.train.trainer import ConnectorTrainer

PROJECTION = "llm_proj."
LANGUAGE_MODEL = "language_model"


def train_stage2(config: Stage2Config) -> Path:
    """Runs the second stage, or goes on with it; the folder of the model that it made.

    Raises:
        FileNotFoundError: a part or data are missing.
        ValueError: options are unknown or do not fit; the folder has a run that was told something
            else.
    """
    out = begin(config)
    torch.manual_seed(config.seed)
    model = build_model(config)
    data, validation = conversations(config.data.train), None
    if config.data.validation:
        validation = conversations(config.data.validation)
    trainer = ConnectorTrainer(
        model,
        ConversationBatch(
            model.processor,
            config.prompt,
            stored=stored_patches(model, data, validation),
            max_length=config.max_length,
        ),
        data,
        config.training,
        out,
        declared(model),
        costs=row_costs(data),
        validation=validation,
        workers=config.data.workers,
        seed=config.seed,
        provenance=describe_run("stage2", config, data),
        label="stage 2",
    )
    return trainer.run()


def build_model(config: Stage2Config) -> MoleculeLM:
    """The model of the second stage: parts read, the connector that of the first stage or new."""
    stage1 = None if config.stage1 is None else Path(config.stage1)
    language_folder = local_folder(config.language_model)
    language_model = read_language_model(language_folder, config.training)
    encoder_folder = part_folder(GRAPH_ENCODER, config.graph_encoder, stage1)
    encoder = read_graph_encoder(encoder_folder)
    if stage1 is None:
        connector = new_connector(config.connector, encoder, language_model)
    else:
        width = language_model.get_input_embeddings().embedding_dim
        connector = carry_connector(stage1 / CONNECTOR, width)
    predictor, predictor_folder = needed_predictor(
        connector.patch_options, lambda: part_folder(PREDICTOR, config.predictor, stage1)
    )
    model = MoleculeLM.from_parts(
        language_model,
        encoder,
        connector,
        predictor,
        tokenizer=load_tokenizer(language_folder),
        new_tokens=config.new_tokens,
        train_embeddings=config.train_embeddings,
    )
    folders = {LANGUAGE_MODEL: language_folder, GRAPH_ENCODER: encoder_folder}
    if predictor_folder is not None:
        folders[PREDICTOR] = predictor_folder
    model.frozen_parts = {n: part_in(model, n, f.resolve()) for n, f in folders.items()}
    return model


def read_language_model(folder: Path, training: TrainingConfig) -> PreTrainedModel:
    """A causal language model: frozen, so in bfloat16 where products are."""
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)


def new_connector(
    options: dict, encoder: GraphEncoder, language_model: PreTrainedModel
) -> Connector:
    """A connector with random weights between `encoder` and a language model.

    Raises:
        ValueError: an unknown name or option; the language model has no place for adapters.
    """
    decided = connector_options(options, language_model)
    try:
        return make_connector({**decided, "encoder_width": encoder.width})
    except TypeError as error:
        raise ValueError(f"connector: {error}") from error


def carry_connector(folder: Path, llm_width: int) -> Connector:
    """A connector of the first stage without its text branch, and with a projection to a language
    model, which is new.

    Raises:
        FileNotFoundError: there is none in `folder`.
        ValueError: its weights do not fit its config.
    """
    config = read_json(folder / CONFIG)
    connector = make_connector({**config, "llm_width": llm_width, "text_vocab_size": None})
    names = [name for name in connector.state_dict() if not name.startswith(PROJECTION)]
    weights = {name: value for name, value in read_weights(folder) if name in names}
    load_strictly(connector, weights, source=folder, names=names)
    return connector


def conversations(folders: tuple[str, ...]) -> PreparedData:
    """Rows from which a language model learns."""
    return PreparedData(folders, wants=("said",))


def stored_patches(model: MoleculeLM, *data: PreparedData | None) -> bool:
    """All rows hold the patches that the model's connector reads."""
    options, hashed = model.connector.patch_options, module_hash(model.predictor)
    sets = [one for one in data if one is not None]
    return bool(options.sources) and all(one.has_patches(options, hashed) for one in sets)


def declared(model: MoleculeLM) -> list[str]:
    """What a run of the second stage trains: the connector, and of the embeddings what
    `train_embeddings` says."""
    names = [n for n, _ in model.named_parameters() if n.startswith("connector.")]
    if model.config.train_embeddings != "none" and model.new_rows is not None:
        names.append("new_rows")
    if model.config.train_embeddings == "all":
        table = model.get_input_embeddings().weight
        names += [n for n, p in model.named_parameters() if p is table]
    return names
