from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from edt_former.connectors import make_connector
from edt_former.graph import make_encoder
from edt_former.released import Options, Told
from edt_former.train.objectives import RepresentationLearning

TOLD = Told(heads=2, blending_heads=2)
GRAPH = {
    "name": "blended",
    "flat": {"name": "gin", "layers": 2, "width": 12},
    "spatial": {
        "name": "unimol",
        "layers": 2,
        "width": 16,
        "heads": 4,
        "ffn": 24,
        "gaussians": 8,
        "special_tokens": True,
        "hydrogens": False,
    },
    "layers": 2,
    "width": 20,
    "heads": 2,
    "special_tokens": True,
}
CONNECTOR = {
    "name": "edt_former_published",
    "width": 16,
    "layers": 3,
    "heads": 2,
    "ffn": 28,
    "cross_attention_freq": 2,
    "encoder_width": 20,
    "num_queries": 5,
}
WORDS = ["<s>", "</s>", "<unk>", "what", "is", "it", "?", "an", "acid"]
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


def random_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Values that differ everywhere, those of buffers too."""
    return {
        n: torch.randn(x.shape).abs() if x.is_floating_point() else torch.randint(9, x.shape)
        for n, x in module.state_dict().items()
    }


def encoder_tree(*, text: bool, llm_width: int | None = None) -> dict[str, torch.Tensor]:
    """A small encoder under the released names, with everything that a released file has."""
    torch.manual_seed(0)
    size = {"llm_width": llm_width, "text_vocab_size": 30 if text else None, "text_positions": 90}
    connector = make_connector({**CONNECTOR, **size})
    tree = {f"encoder.{n}": x for n, x in random_state(make_encoder(GRAPH)).items()}
    for name, value in random_state(connector).items():
        tree[name if name.startswith("llm_proj.") else f"encoder.{name}"] = value
    at = "encoder.graph_encoder.moleculestm.graph_pred_linear"
    tree |= {f"{at}.weight": torch.randn(1, 12), f"{at}.bias": torch.randn(1)}
    tree["encoder.static_q_mask"] = torch.arange(5)[None] > 1
    tree["encoder.Qformer.bert.embeddings.position_ids"] = torch.arange(90)[None]
    if text:
        task = RepresentationLearning(connector, embed_dim=6)
        for name, value in random_state(task).items():
            if not name.startswith("connector."):
                inside = "Qformer." if name.startswith("cls.") else ""
                tree[f"encoder.{inside}{name}"] = value
        at = "encoder.Qformer.cls.predictions"
        words = tree["encoder.Qformer.bert.embeddings.word_embeddings.weight"]
        tree |= {
            f"{at}.decoder.weight": words.clone(),
            f"{at}.decoder.bias": tree[f"{at}.bias"].clone(),
        }
    return tree


def mixed(tree: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every third tensor in bfloat16, every third in float16; copies as what they are copies of."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    mixed = {
        n: x.to(dtypes[i % 3]) if x.is_floating_point() else x
        for i, (n, x) in enumerate(tree.items())
    }
    at = "encoder.Qformer.cls.predictions"
    if f"{at}.decoder.bias" in mixed:
        words = mixed["encoder.Qformer.bert.embeddings.word_embeddings.weight"]
        mixed[f"{at}.decoder.weight"] = words.clone()
        mixed[f"{at}.decoder.bias"] = mixed[f"{at}.bias"].clone()
    return mixed


@pytest.fixture
def stage1() -> dict[str, torch.Tensor]:
    return encoder_tree(text=True)


@pytest.fixture
def save(tmp_path):
    """Writes a released file and returns its path."""

    def write(tree: dict[str, torch.Tensor], name: str = "source.safetensors") -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file({n: x.contiguous() for n, x in tree.items()}, tmp_path / name)
        return tmp_path / name

    return write


def llm_folder(
    folder: Path, *, tie: bool = False, rows: int = len(WORDS) + 2
) -> tuple[Path, LlamaForCausalLM]:
    """A folder with a language model's config and tokenizer, and the model itself."""
    torch.manual_seed(1)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": tie}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, **ends, **LLAMA))
    LlamaConfig(vocab_size=len(WORDS), **ends, **LLAMA).save_pretrained(folder)
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder, model


def whole_tree(folder: Path, **options) -> tuple[dict[str, torch.Tensor], Path]:
    """A whole model under the released names, and the folder of its language model."""
    folder, model = llm_folder(folder, **options)
    llm = {f"llm.{n}": x.clone() for n, x in model.state_dict().items()}
    return encoder_tree(text=False, llm_width=LLAMA["hidden_size"]) | llm, folder


def gpt2_folder(folder: Path) -> Path:
    """The published next-atom predictor, small and random."""
    torch.manual_seed(2)
    size = {"vocab_size": 39, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**size, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make_llm(tmp_path):
    return lambda **options: llm_folder(tmp_path / "llm", **options)


@pytest.fixture
def make_stage2(tmp_path):
    return lambda **options: whole_tree(tmp_path / "llm", **options)


@pytest.fixture
def gpt2(tmp_path) -> Path:
    return gpt2_folder(tmp_path / "gpt2")


@pytest.fixture
def options() -> Options:
    return Options(TOLD)


def shared(*path: str) -> Path:
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of the recorded published numbers) is not set")
    return Path(os.environ["EDT_SHARED"], "oracles", *path)


@pytest.fixture(scope="session")
def recorded():
    """Of the records: tensors of a file by name."""
    return lambda name: load_file(shared(f"{name}.safetensors"))


@pytest.fixture(scope="session")
def published_keys():
    """Names, shapes and dtypes of the released files, as recorded: of stage 1 and of stage 2."""

    def read(stage: int) -> dict[str, tuple[list[int], torch.dtype]]:
        keys = json.loads(shared(f"edt_full_keys_stage{stage}.json").read_text())["keys"]
        return {
            n: (entry["shape"], getattr(torch, entry["dtype"].split()[0]))
            for n, entry in keys.items()
        }

    return read
