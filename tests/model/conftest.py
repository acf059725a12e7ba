from __future__ import annotations

import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from edt_former.connectors import make_connector
from edt_former.graph import make_encoder
from edt_former.language import connector_options
from edt_former.model import MoleculeLM
from edt_former.tokens import NextAtomPredictor

WORDS = "<pad> <bos> <eos> <unk> question: answer: how many rings does it have ? yes no 0 1 2 3"
VOCAB = 24

SIZE = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BLOCK = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
    **SIZE,
}
LANGUAGE_MODELS = {
    "llama": lambda: LlamaConfig(**BLOCK),
    "qwen2": lambda: Qwen2Config(**BLOCK, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=256, initializer_range=0.5, **SIZE
    ),
    "gemma": lambda: GemmaConfig(**BLOCK, head_dim=8),
    "gemma2": lambda: Gemma2Config(**BLOCK, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**BLOCK, head_dim=8),
    "granite": lambda: GraniteConfig(**BLOCK, embedding_multiplier=3.0),
    "falcon_h1": lambda: FalconH1Config(
        **BLOCK,
        mamba_d_ssm=16,
        mamba_n_heads=2,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        embedding_multiplier=3.0,
    ),
}
TRANSFORMER = {"width": 16, "layers": 2, "heads": 2, "ffn": 16, "dropout": 0.0}
CONNECTORS = {
    "edt_former": {"name": "edt_former", "num_queries": 2, **TRANSFORMER},
    "edt_former_brics": {
        "name": "edt_former",
        "num_queries": 1,
        "patches": {"sources": ["brics", "entropy"]},
        **TRANSFORMER,
    },
    "qformer": {"name": "qformer", "num_queries": 3, **TRANSFORMER},
    "llamo": {
        **{"name": "llamo", "num_levels": 3, "level_queries": 1, "motif_queries": 2},
        **{"heads": 2, "depth": 2},
    },
    "mora": {
        **{"name": "mora", "types": "qvomd", "every": 1, "rank": 2},
        **{"width": 16, "layers": 2, "heads": 2, "ffn": 16},
    },
}

UNIMOL = {"heads": 2, "ffn": 16}
ENCODERS = {
    "gin": {},
    "unimol": UNIMOL,
    "blended": {
        "heads": 2,
        "flat": {"name": "gin", "layers": 2, "width": 8},
        "spatial": {"layers": 2, "width": 8, **UNIMOL},
    },
}


@pytest.fixture
def make_tokenizer():
    def make() -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(
            WordLevel({w: i for i, w in enumerate(WORDS.split())}, unk_token="<unk>")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<bos>",
            eos_token="<eos>",
            unk_token="<unk>",
        )

    return make


@pytest.fixture
def make_parts():
    """Language model, graph encoder, connector and predictor, tiny and random."""

    def make(
        language_model: str = "llama", connector: str = "edt_former", encoder: str = "gin"
    ) -> tuple:
        text_model = AutoModelForCausalLM.from_config(LANGUAGE_MODELS[language_model]())
        encoder = make_encoder({"name": encoder, "layers": 2, "width": 8, **ENCODERS[encoder]})
        options = connector_options({"encoder_width": 8, **CONNECTORS[connector]}, text_model)
        predictor = NextAtomPredictor({"layers": 1, "heads": 2, "width": 16, "positions": 64})
        return text_model, encoder, make_connector(options), predictor

    return make


@pytest.fixture
def make_model(make_parts, make_tokenizer):
    def make(
        language_model: str = "llama",
        connector: str = "edt_former",
        encoder: str = "gin",
        **options: object,
    ) -> MoleculeLM:
        parts = make_parts(language_model, connector, encoder)
        return MoleculeLM.from_parts(*parts, tokenizer=make_tokenizer(), **options).eval()

    return make
