"""The next-atom predictor: the GPT-2 of transformers and ours are one, both ways."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from edt_former.language import load_part, save_part
from edt_former.released import Options, to_ours, to_released
from edt_former.released.predictor import TOKENS
from edt_former.tokens import NextAtomPredictor
from edt_former.tokens.published import gpt2_from_state, state_from_gpt2


def test_the_tokens_are_the_published_ones():
    assert TOKENS[:5] == ("<pad>", "<bos>", "<eos>", "Ag", "Al") and len(TOKENS) == 39
    assert list(TOKENS[3:]) == sorted(TOKENS[3:])


@torch.no_grad()
def test_both_give_the_same_logits(gpt2, tmp_path):
    to_ours(gpt2, Options()).write(tmp_path / "ours")
    model = load_part(NextAtomPredictor, tmp_path / "ours").eval()
    assert model.config["heads"] == 4 and model.config["positions"] == 64
    elements = torch.tensor([6, 8, 7])
    found = model(elements, torch.tensor([0, 3]), end=True)
    ids = torch.cat([torch.tensor([1]), model.tokens(elements)])
    expected = GPT2LMHeadModel.from_pretrained(gpt2).eval()(ids[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_there_and_back_every_bit_is_the_same(gpt2, tmp_path, dtype):
    weights = GPT2LMHeadModel.from_pretrained(gpt2).to(dtype).state_dict()
    file = tmp_path / "gpt2" / "pytorch_model.bin"
    (gpt2 / "model.safetensors").unlink()
    torch.save(weights, file)
    to_ours(file, Options()).write(tmp_path / "ours")
    to_released(tmp_path / "ours").write(tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert found[name].dtype == dtype and torch.equal(found[name], value), name


def test_transformers_reads_what_is_written(gpt2, tmp_path):
    to_ours(gpt2, Options()).write(tmp_path / "ours")
    to_released(tmp_path / "ours").write(tmp_path / "back")
    expected = GPT2LMHeadModel.from_pretrained(gpt2)
    found, loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loaded[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "bos_token_id"):
        assert getattr(found.config, name) == getattr(expected.config, name)
    ids = torch.tensor([[1, 9, 25]])
    torch.testing.assert_close(found(ids).logits, expected(ids).logits)
    text = (tmp_path / "back" / "vocab.txt").read_text()
    assert text.splitlines() == list(TOKENS) and not text.endswith("\n")


def test_the_recorded_predictor(recorded, tmp_path):
    tensors = recorded("edt_entropy")
    weights = {n.removeprefix("model."): x for n, x in tensors.items() if n.startswith("model.")}
    save_file({n: x.clone() for n, x in weights.items()}, tmp_path / "source.safetensors")
    to_ours(tmp_path / "source.safetensors", Options()).write(tmp_path / "ours")
    assert load_part(NextAtomPredictor, tmp_path / "ours").config["heads"] == 2
    to_released(tmp_path / "ours").write(tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[n], x) for n, x in weights.items())


def test_square_matrices_are_turned_too():
    state = NextAtomPredictor({"layers": 1, "vocabulary": "published"}).state_dict()
    weights = gpt2_from_state(state)
    name = "h.0.attn.c_proj.weight"
    assert torch.equal(weights[f"transformer.{name}"], state[name].T)
    assert all(torch.equal(x, state[n]) for n, x in state_from_gpt2(weights).items())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[:-1], "38 tokens instead of 39"),
        ((*TOKENS[:3], "Al", "Ag", *TOKENS[5:]), "'Al' instead of 'Ag'"),
    ],
)
def test_other_tokens_are_refused(gpt2, tokens, message):
    (gpt2 / "vocab.txt").write_text("\n".join(tokens))
    with pytest.raises(ValueError, match=f"must hold the published tokens, it has {message}"):
        to_ours(gpt2, Options())


def test_the_published_tokens_are_taken(gpt2):
    (gpt2 / "vocab.txt").write_text("\n".join(TOKENS))
    assert to_ours(gpt2, Options()).found.endswith("2 layers, width 16, 4 heads, 64 positions")


def test_a_gpt2_of_another_vocabulary(gpt2):
    weights = load_file(gpt2 / "model.safetensors")
    weights["transformer.wte.weight"] = torch.ones(50, 16)
    save_file(weights, gpt2 / "model.safetensors")
    with pytest.raises(ValueError, match=r"the predictor in .* does not fit: .*wte.weight"):
        to_ours(gpt2, Options())


def test_a_predictor_of_all_elements_has_no_gpt2(tmp_path):
    save_part(NextAtomPredictor({"layers": 1, "width": 8}), tmp_path)
    with pytest.raises(ValueError, match="must have the vocabulary 'published', got 'elements'"):
        to_released(tmp_path)
