"""Contenders compute the same tokens and prompts that mean the same to a language model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from edt_former.connectors import make_connector
from edt_former.graph import GraphFeatures
from edt_former.report.contenders import (
    Rectangle,
    check_rows,
    checked_tokens,
    line_up,
    padded,
    ragged,
    static,
)
from edt_former.tokens import pack_patches

SIZE = {"encoder_width": 12, "llm_width": 16, "width": 16, "layers": 2, "heads": 2, "ffn": 32}
PATCHES = {"entropy": pack_patches([[0, 0, 1, 2], [0], [0, 1, 2, 3, 4, 5, 5]])}
LENGTHS = [3 + 3, 3 + 1, 3 + 6]  # anchors and patches


@pytest.fixture
def dynamic():
    torch.manual_seed(0)
    connector = make_connector({"name": "edt_former", **SIZE, "num_queries": 3})
    return connector.eval().requires_grad_(False)


@pytest.fixture
def features():
    atoms = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    return GraphFeatures(atoms, torch.tensor([0, 4, 5, 12]))


@pytest.mark.parametrize(
    ("mean", "longest", "names"),
    [
        pytest.param(
            39.6,
            60,
            [
                "EDT-Former, ragged",
                "static Q-Former, 32 queries",
                "static Q-Former, 40 queries",
                "EDT-Former, padded to longest",
                "EDT-Former, padded to 96",
            ],
            id="usual",
        ),
        pytest.param(
            32.3,
            96,
            [
                "EDT-Former, ragged",
                "static Q-Former, 32 queries",
                "EDT-Former, padded to longest",
                "EDT-Former, padded to 96",
            ],
            id="equal tokens are 32",
        ),
        pytest.param(
            50.0,
            97,
            [
                "EDT-Former, ragged",
                "static Q-Former, 32 queries",
                "static Q-Former, 50 queries",
                "EDT-Former, padded to longest",
            ],
            id="too long for 96 slots",
        ),
    ],
)
def test_who_is_compared(dynamic, mean, longest, names):
    field = line_up(dynamic, mean=mean, longest=longest)
    assert [contender.name for contender in field] == names
    assert [c.reads_patches for c in field] == [name.startswith("EDT") for name in names]


def test_weights_are_shared(dynamic):
    own = {p.data_ptr() for p in dynamic.parameters()}
    connector = static(dynamic, 5).connector
    foreign = [n for n, p in connector.named_parameters() if p.data_ptr() not in own]
    assert foreign == ["query_tokens"]
    assert torch.equal(connector.query_tokens[:, :3], dynamic.query_tokens)
    assert not connector.training


@torch.no_grad()
def test_real_tokens_are_those_of_the_ragged_connector(dynamic, features):
    expected = dynamic(features, PATCHES)
    for contender in (padded(dynamic, None), padded(dynamic, 12)):
        tokens = contender.encode(features, PATCHES)
        assert tokens.values.shape == (3, contender.slots or 9, 16)
        assert tokens.lengths.tolist() == LENGTHS
        torch.testing.assert_close(tokens.packed(), expected.values, rtol=0, atol=1e-5)
    found = checked_tokens([ragged(dynamic), static(dynamic, 5)], features, PATCHES)
    assert found[0].offsets.tolist() == expected.offsets.tolist()
    assert found[1].lengths.tolist() == [5, 5, 5]


@torch.no_grad()
def test_prompts_end_in_the_text_and_hold_every_token(dynamic, features):
    table, text = nn.Embedding(7, 16), torch.tensor([3, 1])
    tokens = dynamic(features, PATCHES)
    prompt = ragged(dynamic).prompt(tokens, text, table)
    assert prompt.embeds.shape == (3, 9 + 2, 16)
    assert prompt.mask.sum(1).tolist() == [length + 2 for length in LENGTHS]
    for row, molecule in enumerate(tokens.values.split(LENGTHS)):
        start = 9 - LENGTHS[row]
        assert not prompt.mask[row, :start].any() and prompt.mask[row, start:].all()
        assert torch.equal(prompt.embeds[row, start:], torch.cat([molecule, table(text)]))

    rectangle = padded(dynamic, 12).encode(features, PATCHES)
    prompt = padded(dynamic, 12).prompt(rectangle, text, table)
    assert prompt.embeds.shape == (3, 12 + 2, 16)
    for row, length in enumerate(LENGTHS):
        assert prompt.mask[row].nonzero().flatten().tolist() == [*range(length), 12, 13]
        assert torch.equal(prompt.embeds[row, 12:], table(text))


@torch.no_grad()
def test_without_padding_there_is_no_mask(dynamic, features):
    table, text = nn.Embedding(7, 16), torch.tensor([3])
    five = static(dynamic, 5)
    assert five.prompt(five.encode(features, {}), text, table).mask is None
    same = GraphFeatures(features.values[:8], torch.tensor([0, 4, 8]))
    patches = {"entropy": pack_patches([[0, 0, 1, 1], [0, 1, 1, 1]])}
    for contender in (ragged(dynamic), padded(dynamic, None)):
        prompt = contender.prompt(contender.encode(same, patches), text, table)
        assert prompt.mask is None and prompt.embeds.shape == (2, 6, 16)


@torch.no_grad()
def test_a_language_model_reads_the_same_from_either_prompt(dynamic, features):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model, text = LlamaForCausalLM(config).eval(), torch.tensor([3, 1, 4])
    read = []
    for contender in (ragged(dynamic), padded(dynamic, None), padded(dynamic, 12)):
        tokens = contender.encode(features, PATCHES)
        embeds, mask = contender.prompt(tokens, text, model.get_input_embeddings())
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        out = model(inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions)
        read.append(out.logits[:, -1])
    torch.testing.assert_close(read[1], read[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(read[2], read[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "factor", "agrees"),
    [
        pytest.param(torch.float32, 1.005, True, id="fp32 rounding"),
        pytest.param(torch.float32, 1.05, False, id="fp32"),
        pytest.param(torch.bfloat16, 1.02, True, id="bf16 rounding"),
        pytest.param(torch.bfloat16, 1.2, False, id="bf16"),
        pytest.param(torch.float32, float("nan"), False, id="NaN"),
    ],
)
def test_one_row_that_differs_is_enough(dtype, factor, agrees):
    expected = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = expected.clone()
    rows[17] *= factor
    if agrees:
        check_rows("x", rows, expected)
    else:
        with pytest.raises(RuntimeError, match=r"must agree to 0\.0[15], 'x' differs by"):
            check_rows("x", rows, expected)


def test_packed_rows_of_a_rectangle():
    values = torch.arange(6.0).reshape(2, 3, 1)
    assert Rectangle(values, torch.tensor([1, 3])).packed().flatten().tolist() == [0, 3, 4, 5]
