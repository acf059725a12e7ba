"""Files of the published size, of random numbers: there and back with every bit the same.

They take gigabytes and minutes, so they run where EDT_FULL_SIZE is 1.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from edt_former.graph import make_encoder
from edt_former.language import load_part, save_part
from edt_former.language.manifest import Manifest
from edt_former.released import Options, to_ours, to_released
from edt_former.tokens import NextAtomPredictor
from edt_former.train.objectives import RepresentationLearning
from edt_former.weights import StoredTensor, open_weights, write_shards

pytestmark = pytest.mark.skipif(
    os.environ.get("EDT_FULL_SIZE") != "1", reason="EDT_FULL_SIZE is not 1: takes gigabytes"
)

LLM_LAYERS = 2
"""Of the 32 published ones; all other sizes are Llama 3.1's."""

COPIES = {
    "encoder.Qformer.cls.predictions.decoder.weight": (
        "encoder.Qformer.bert.embeddings.word_embeddings.weight"
    ),
    "encoder.Qformer.cls.predictions.decoder.bias": "encoder.Qformer.cls.predictions.bias",
}


def stored(name: str, shape: list[int], dtype: torch.dtype) -> StoredTensor:
    """Random numbers that depend on the name alone, made when they are read."""

    def make() -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(COPIES.get(name, name).encode()))
        if dtype.is_floating_point:
            bits = torch.randint(2**15, shape, generator=generator, dtype=torch.int16)
            return bits.view(torch.bfloat16).clamp(-3, 3).nan_to_num(0)
        return torch.randint(2, shape, generator=generator).to(dtype)

    kept = torch.bfloat16 if dtype.is_floating_point else dtype
    return StoredTensor(torch.Size(shape), kept, make)


def same(found, expected) -> Iterator[str]:
    """Names whose dtype or bits differ, or that only one of them has."""
    yield from found.keys() ^ expected.keys()
    for name in found.keys() & expected.keys():
        one, other = found[name].read(), expected[name].read()
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield name


def test_stage_1(published_keys, tmp_path):
    keys = {n: stored(n, *told) for n, told in published_keys(1).items()}
    assert len(keys) == 1220
    (tmp_path / "source").mkdir()
    assert sum(write_shards(tmp_path / "source", keys, 2_000_000_000)) > 0.7e9
    to_ours(tmp_path / "source" / "model.safetensors", Options()).write(tmp_path / "ours")
    to_released(tmp_path / "ours").write(tmp_path / "back.safetensors")
    assert list(same(open_weights(tmp_path / "back.safetensors"), keys)) == []
    load_part(make_encoder, tmp_path / "ours" / "graph_encoder")
    task = RepresentationLearning.from_pretrained(tmp_path / "ours")
    assert task.config["caption_position"] == 96 and task.config["begin_id"] == 31090


def test_stage_2_in_shards(published_keys, tmp_path):
    keys = {
        f"model.{n}": stored(n, *told)
        for n, told in published_keys(2).items()
        if not n.startswith("llm.model.layers.") or int(n.split(".")[3]) < LLM_LAYERS
    }
    (tmp_path / "source").mkdir()
    assert len(list(write_shards(tmp_path / "source", keys, 1_000_000_000))) > 3
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=LLM_LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    config.save_pretrained(tmp_path / "llm")
    words = {f"w{i}": i for i in range(128_256)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "llm")
    save_part(NextAtomPredictor({"vocabulary": "published"}), tmp_path / "predictor")
    options = Options(language_model=tmp_path / "llm", predictor=tmp_path / "predictor")
    to_ours(tmp_path / "source", options).write(tmp_path / "ours", shard_size=1_000_000_000)
    assert set(Manifest.read(tmp_path / "ours").parts) == {
        *("language_model", "graph_encoder", "predictor"),
    }
    told = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert told["mol_token_id"] == 128_257 and told["text_config"]["vocab_size"] == 128_258
    shutil.rmtree(tmp_path / "source")
    to_released(tmp_path / "ours").write(tmp_path / "back", shard_size=1_000_000_000)
    assert list(same(open_weights(tmp_path / "back"), keys)) == []
