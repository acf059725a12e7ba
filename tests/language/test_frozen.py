from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconH1Config, GemmaConfig, LlamaConfig

from edt_former.graph import make_encoder
from edt_former.language import (
    content_hash,
    frozen,
    input_scale,
    load_part,
    read_weights,
    save_part,
)
from edt_former.language.frozen import load_strictly, module_weights
from edt_former.tokens import NextAtomPredictor
from edt_former.weights import WEIGHTS, open_weights

SIZE = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8}


def language_model(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZE, **options))


def test_the_hash_follows_values_shapes_and_names_alone():
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}
    expected = content_hash(weights.items())
    assert content_hash(reversed(weights.items())) == expected
    assert content_hash(
        (n, x.to(torch.bfloat16) if n == "a" else x) for n, x in weights.items()
    ) == (expected)
    assert content_hash((n, x.flip(0).flip(0)) for n, x in weights.items()) == expected
    others = [
        {**weights, "a": weights["a"] + 1e-6},
        {**weights, "a": weights["a"].reshape(3, 2)},
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["a"]},
    ]
    assert expected not in {content_hash(other.items()) for other in others}
    assert content_hash(weights.items(), without=["b"]) == content_hash(others[-1].items())


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_models_files_have_the_hash_of_the_module(tmp_path, tied):
    model = language_model(tie_word_embeddings=tied)
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size=1000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    stored = content_hash(read_weights(tmp_path))
    assert stored == content_hash(module_weights(model.float()))
    assert ("lm_head.weight" in dict(module_weights(model))) is not tied


def test_a_part_is_read_back_in_float32(tmp_path):
    torch.manual_seed(0)
    predictor = NextAtomPredictor({"layers": 1, "heads": 2, "width": 8, "positions": 16})
    save_part(predictor, tmp_path, dtype=torch.bfloat16)
    read = load_part(NextAtomPredictor, tmp_path)
    assert read.config == predictor.config
    for name, value in read.state_dict().items():
        assert torch.equal(value, predictor.state_dict()[name].bfloat16().float())


def test_weights_that_do_not_fit_are_named_and_change_nothing():
    module = nn.Linear(2, 1)
    before = module.weight.clone()
    weights = {"weight": torch.zeros(3, 1), "gain": torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        load_strictly(module, weights, source="somewhere")
    assert str(error.value) == (
        "the weights in somewhere do not fit: missing: bias; unexpected: gain; "
        "of another shape: weight [3, 1] instead of [1, 2]"
    )
    assert torch.equal(module.weight, before)


def test_a_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .safetensors file"):
        dict(read_weights(tmp_path))


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: "):
        dict(read_weights(tmp_path))


def test_the_input_scale_is_what_the_model_does_to_ids_but_not_to_embeddings():
    assert input_scale(language_model()) == 1
    gemma = AutoModelForCausalLM.from_config(GemmaConfig(**SIZE, head_dim=8))
    assert input_scale(gemma) == 1
    falcon = FalconH1Config(**SIZE, **MAMBA, mamba_n_groups=1, embedding_multiplier=3.0)
    assert input_scale(AutoModelForCausalLM.from_config(falcon)) == 3


def test_a_model_that_reads_more_than_an_embedding_is_refused():
    model = language_model()
    forward = model.forward

    def reads_ids(input_ids=None, **options):
        out = forward(input_ids=input_ids, **options)
        out.logits = out.logits + (0 if input_ids is None else input_ids[..., None])
        return out

    model.forward = reads_ids
    with pytest.raises(ValueError, match="more of a token than its embedding"):
        input_scale(model)


def test_a_hash_does_not_depend_on_how_much_is_hashed_at_a_time(monkeypatch):
    weights = {"a": torch.randn(7, 5).T, "half": torch.randn(9).half(), "count": torch.tensor(3)}
    expected = content_hash(weights.items())
    monkeypatch.setattr(frozen, "HASHED_AT_A_TIME", 4)
    assert content_hash(weights.items()) == expected


def test_a_part_reads_weights_that_it_shares(tmp_path):
    flat = make_encoder({"name": "gin", "layers": 1, "width": 8})
    spatial = {"layers": 1, "width": 8, "heads": 2, "ffn": 8, "gaussians": 4}
    size = {"layers": 1, "width": 8, "heads": 2}
    both = make_encoder({"name": "blended", **size, "flat": flat.config, "spatial": spatial})
    both.graph_encoder["moleculestm"].load_state_dict(flat.state_dict())
    save_part(flat, tmp_path / "flat")
    save_part(both, tmp_path / "both")
    before = content_hash(read_weights(tmp_path / "both"))
    size = (tmp_path / "both" / WEIGHTS).stat().st_size
    frozen.share_weights(tmp_path / "both", {"graph_encoder.moleculestm.": tmp_path / "flat"})
    assert (tmp_path / "both" / WEIGHTS).stat().st_size < size
    assert content_hash(read_weights(tmp_path / "both")) == before
    opened = {n: x.read() for n, x in open_weights(tmp_path / "both").items()}
    assert content_hash(opened.items()) == before
    read = load_part(make_encoder, tmp_path / "both")
    assert content_hash(module_weights(read)) == before
    save_part(both, tmp_path / "both")
    assert not (tmp_path / "both" / "shared.json").exists()
    assert content_hash(read_weights(tmp_path / "both")) == before


def test_only_equal_weights_are_shared(tmp_path):
    one = make_encoder({"name": "gin", "layers": 1, "width": 8})
    both = nn.ModuleDict({"a": one})
    both.config = {}
    save_part(both, tmp_path / "both")
    with torch.no_grad():
        next(one.parameters()).add_(1)
    save_part(one, tmp_path / "one")
    with pytest.raises(ValueError, match=r"must share their weights, a\..* differs"):
        frozen.share_weights(tmp_path / "both", {"a.": tmp_path / "one"})
    assert not (tmp_path / "both" / "shared.json").exists()
