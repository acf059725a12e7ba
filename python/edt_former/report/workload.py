"""What `edt profile` runs: models of a named size, and the shape of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from edt_former import shipped
from edt_former.connectors import EDTFormer
from edt_former.graph import GraphEncoder, make_encoder
from edt_former.language.frozen import load_part
from edt_former.report.speed import ENCODER_WIDTH, published_connector
from edt_former.tokens import NextAtomPredictor

SIZES = ("published", "tiny")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICES = ("cpu", "cuda")
LLM_SHAPES = {
    "40m": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "vocab_size": 32_000,
    },
    "135m": {  # SmolLM2-135M
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
    },
    "1b": {  # Llama-3.2-1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "8b": {  # Llama-3.1-8B, the language model of arXiv:2602.02742
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
}
"""Llama-like shapes by their number of parameters."""


class Parts(NamedTuple):
    """The models of a workload, in eval mode on their device.

    As in a `MoleculeLM`, predictor and graph encoder stay in float32.
    """

    predictor: NextAtomPredictor
    graph_encoder: GraphEncoder
    connector: EDTFormer
    language_model: PreTrainedModel


@dataclass(frozen=True)
class Workload:
    """Models and prompts of a measurement.

    Args:
        size: "published": a connector of 12 layers and width 768 and a GIN of 5 layers and width
            512, both with random weights, and the shipped next-atom predictor; "tiny": the shipped
            models.
        llm: of the published size: a name of `LLM_SHAPES` (random weights), or the folder of a
            causal language model. The tiny size has its own.
        dtype: of connector and language model, "fp32" or "bf16".
        device: "cpu" or "cuda".
        batch: molecules that go through together.
        text_tokens: of the question behind each molecule.
        new_tokens: of each answer.
        seed: of random weights and text.

    Raises:
        ValueError: an option is none of these, or the device is not there.
    """

    size: str = "published"
    llm: str = "40m"
    dtype: str = "fp32"
    device: str = "cpu"
    batch: int = 8
    text_tokens: int = 32
    new_tokens: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, options in (("size", SIZES), ("dtype", tuple(DTYPES)), ("device", DEVICES)):
            value = getattr(self, name)
            if value not in options:
                names = ", ".join(map(repr, options))
                raise ValueError(f"{name} must be one of {names}, got {value!r}")
        for name in ("batch", "text_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.llm not in LLM_SHAPES and not Path(self.llm, "config.json").is_file():
            raise ValueError(
                f"llm must be one of {', '.join(map(repr, LLM_SHAPES))} or the folder of a "
                f"language model, with its config.json, got {self.llm!r}"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
            raise ValueError(f"device must be one that torch finds, built {built}, got 'cuda'")

    def build(self) -> Parts:
        """The models.

        Raises:
            FileNotFoundError: the shipped models are not there.
            OSError: the language model cannot be read.
        """
        if not shipped.connectors():
            raise FileNotFoundError(f"the shipped models are not in {shipped.folder()}")
        if self.size == "tiny":
            model = shipped.load()
            parts = Parts(
                model.predictor, model.graph_encoder, model.connector, model.language_model
            )
        else:
            predictor = load_part(NextAtomPredictor, shipped.folder() / "predictor")
            torch.manual_seed(self.seed)
            encoder = make_encoder({"name": "gin", "layers": 5, "width": ENCODER_WIDTH})
            llm = self._language_model()
            width = llm.get_input_embeddings().embedding_dim
            parts = Parts(predictor, encoder, published_connector(width, seed=self.seed), llm)
        dtype = DTYPES[self.dtype]
        for part in parts:
            part.eval().requires_grad_(False).to(self.device)
        parts.connector.to(dtype)
        parts.language_model.to(dtype)
        return parts

    def _language_model(self) -> PreTrainedModel:
        dtype = DTYPES[self.dtype]
        if self.llm not in LLM_SHAPES:
            return AutoModelForCausalLM.from_pretrained(
                self.llm, dtype=dtype, local_files_only=True
            )
        options = {"tie_word_embeddings": True, **LLM_SHAPES[self.llm]}
        config = LlamaConfig(max_position_embeddings=8192, **options)
        # Made where it runs: 8 billion random numbers are slow on the host.
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
