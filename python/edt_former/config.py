"""What a molecule language model is made of, as Hugging Face configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from edt_former.graph.batch import OGB, check_scheme

TRAIN_EMBEDDINGS = ("new_rows", "all", "none")


class MoleculeConfig(PretrainedConfig):
    """Configuration of a `MoleculeLM`: its parts, and how molecules enter the prompt.

    Args:
        text_config: of the language model: any causal LM's config, or its dict with `model_type`.
        graph_config: of the graph encoder, see `edt_former.graph.make_encoder`.
        connector_config: of the connector, see `edt_former.connectors.make_connector`.
        predictor_config: of the next-atom predictor; None where no patch comes from entropies.
        mol_token: the text that marks one molecule in a prompt.
        mol_token_id: its id. The language model never reads that id: molecule tokens take its
            place, so it needs no row in the embedding table.
        new_token_ids: added tokens whose embeddings are trained rows of their own, apart from the
            language model's table; they may lie beyond it. The model reads them, it never
            generates them.
        train_embeddings: "new_rows" trains those rows, "all" the language model's whole input
            table as well, "none" neither.
        features: the scheme of atom and bond features that the graph encoder reads; None for
            graphs that are no molecules.
        lora: adapters of the language model, see `edt_former.language.adapters.add_lora`; None
            for none.

    Raises:
        ValueError: an unknown `train_embeddings` or scheme of features.

    Example:
        >>> from edt_former.config import MoleculeConfig
        >>> text = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 16}
        >>> config = MoleculeConfig(text_config=text, mol_token_id=99)
        >>> config.text_config.hidden_size, config.train_embeddings
        (16, 'new_rows')
    """

    model_type = "edt_molecule"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers reads a class attribute)

    def __init__(
        self,
        text_config: PretrainedConfig | Mapping[str, Any] | None = None,
        graph_config: Mapping[str, Any] | None = None,
        connector_config: Mapping[str, Any] | None = None,
        predictor_config: Mapping[str, Any] | None = None,
        *,
        mol_token: str = "<mol>",
        mol_token_id: int | None = None,
        new_token_ids: Sequence[int] = (),
        train_embeddings: str = "new_rows",
        features: str | None = OGB,
        lora: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if train_embeddings not in TRAIN_EMBEDDINGS:
            allowed = ", ".join(map(repr, TRAIN_EMBEDDINGS))
            raise ValueError(f"train_embeddings must be one of {allowed}, got {train_embeddings!r}")
        if features is not None:
            check_scheme(features)
        if isinstance(text_config, Mapping):
            options = dict(text_config)
            text_config = AutoConfig.for_model(options.pop("model_type"), **options)
        # A copy: what is set on this config (attention, dtype) is handed down to those inside.
        self.text_config = copy.deepcopy(text_config)
        self.graph_config = dict(graph_config or {})
        self.connector_config = dict(connector_config or {})
        self.predictor_config = None if predictor_config is None else dict(predictor_config)
        self.mol_token = mol_token
        self.mol_token_id = mol_token_id
        self.new_token_ids = list(new_token_ids)
        self.train_embeddings = train_embeddings
        self.features = features
        self.lora = None if lora is None else dict(lora)
        super().__init__(**kwargs)


AutoConfig.register(MoleculeConfig.model_type, MoleculeConfig)
