"""Fine-tuning: adapters of the language model, the connector, or a property head."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from edt_former import shipped
from edt_former.checkpoint import local_folder
from edt_former.data import PreparedData
from edt_former.language.adapters import is_adapter
from edt_former.model import MoleculeLM
from edt_former.train.config import SHIPPED, FinetuneConfig
from edt_former.train.conversations import ConversationBatch, row_costs
from edt_former.train.molecules import MoleculeBatch
from edt_former.train.parts import GRAPH_ENCODER, PREDICTOR
from edt_former.train.properties import (
    HeadOptions,
    PropertyBatch,
    PropertyModel,
    standardisation,
)
from edt_former.train.provenance import describe_run
from edt_former.train.stage2 import conversations, declared, stored_patches
from edt_former.train.start import begin
from edt_former.train.trainer import ConnectorTrainer


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tunes a model, or goes on with it; the folder of what it made.

    Raises:
        FileNotFoundError: a part or data are missing.
        ValueError: options are unknown or do not fit; the folder has a run that was told something
            else.
    """
    out = begin(config)
    torch.manual_seed(config.seed)
    folder = shipped.folder() / "edt_former" if config.model == SHIPPED else Path(config.model)
    dtype = torch.bfloat16 if config.training.bf16 and config.head is None else torch.float32
    model = MoleculeLM.from_pretrained(local_folder(folder), dtype=dtype)
    trainer = _property_trainer if config.head is not None else _language_trainer
    return trainer(config, model, out).run()


def _language_trainer(config: FinetuneConfig, model: MoleculeLM, out: Path) -> ConnectorTrainer:
    """Trains on conversations: adapters, and the connector as the second stage does."""
    if config.lora is not None:
        model.add_lora(asdict(config.lora))
    trained = {n for n, _ in model.named_parameters() if is_adapter(n)}
    if config.train_connector:
        trained |= set(declared(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    data, validation = conversations(config.data.train), None
    if config.data.validation:
        validation = conversations(config.data.validation)
    return ConnectorTrainer(
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
        trained,
        costs=row_costs(data),
        validation=validation,
        workers=config.data.workers,
        seed=config.seed,
        provenance=describe_run("finetune", config, data),
        label="fine-tuning",
    )


def _property_trainer(config: FinetuneConfig, model: MoleculeLM, out: Path) -> ConnectorTrainer:
    """Trains a head on the connector's tokens; the language model is let go."""
    if model.connector.adapts:
        raise ValueError(
            f"a head reads tokens, the connector of {config.model} makes adapters: give lora or "
            "train_connector alone"
        )
    wants, validation = ("targets", "molecule"), None
    data = PreparedData(config.data.train, wants=wants)
    if config.data.validation:
        validation = PreparedData(config.data.validation, wants=wants)
    mean, scale = standardisation(config.head.kind, data)
    options = HeadOptions(
        **asdict(config.head),
        targets=data.target_names(),
        token_width=model.get_input_embeddings().embedding_dim,
        mean=mean,
        scale=scale,
    )
    known = {n: p for n, p in model.frozen_parts.items() if n in (GRAPH_ENCODER, PREDICTOR)}
    connector = model.connector.requires_grad_(config.train_connector)
    network = PropertyModel(model.graph_encoder, connector, options, known, model.predictor)
    prefixes = ("connector.", "head.") if config.train_connector else ("head.",)
    molecules = MoleculeBatch(model.graph_encoder, connector, model.predictor, data, validation)
    return ConnectorTrainer(
        network,
        PropertyBatch(molecules),
        data,
        config.training,
        out,
        [n for n, _ in network.named_parameters() if n.startswith(prefixes)],
        costs=data.atoms(),
        validation=validation,
        workers=config.data.workers,
        seed=config.seed,
        provenance=describe_run("finetune", config, data),
        label=config.head.kind,
    )
