from __future__ import annotations

import pytest
import torch

from edt_former.report.contenders import line_up
from edt_former.report.pipeline import STAGES, Pipeline
from edt_former.report.workload import Workload

SMILES = ["CCO", "c1ccccc1CC(=O)NC", "[Na+].[Cl-]"]


@pytest.fixture
def pipeline(as_shipped):
    return Pipeline(Workload(size="tiny", text_tokens=5, new_tokens=4))


@torch.inference_mode()
def test_every_stage_is_timed_once(pipeline):
    batch, seconds = pipeline.read(SMILES)
    for contender in line_up(pipeline.parts.connector, mean=6, longest=9):
        taken = seconds | pipeline.run(contender, batch)
        assert tuple(taken) == STAGES
        assert all(value > 0 for value in taken.values())


@torch.inference_mode()
def test_static_queries_need_no_patches(pipeline):
    batch, seconds = pipeline.read(SMILES, patches=False)
    assert batch.patches == {} and seconds["predictor + patches"] == 0.0
    static = line_up(pipeline.parts.connector, mean=6, longest=9)[1]
    assert pipeline.encode(static, batch)[0].values.shape[:2] == (3, 32)


@torch.inference_mode()
def test_decoding_is_what_generate_does(pipeline, monkeypatch):
    """Greedy, one token at a time from the cache, padding masked."""
    model = pipeline.parts.language_model
    given = []
    forward = model.forward

    def watched(**inputs):
        given.append(inputs)
        return forward(**inputs)

    batch, _ = pipeline.read(SMILES)
    ragged = line_up(pipeline.parts.connector, mean=6, longest=9)[0]
    tokens, _ = pipeline.encode(ragged, batch)
    answer, _ = pipeline.answer(ragged, tokens)
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)  # nothing ends it
    expected = model.generate(
        inputs_embeds=answer.prompt.embeds,
        attention_mask=answer.prompt.mask.long(),
        max_new_tokens=4,
        do_sample=False,
    )
    monkeypatch.setattr(model, "forward", watched)
    pipeline.answer(ragged, tokens)
    assert [call["attention_mask"].shape[1] for call in given[1:]] == [
        answer.prompt.embeds.shape[1] + n for n in (1, 2, 3, 4)
    ]
    said = torch.cat([call["input_ids"] for call in given[1:]], 1)
    assert torch.equal(said, expected)


@torch.inference_mode()
def test_without_padding_the_language_model_gets_no_mask(pipeline, monkeypatch):
    given = []
    forward = pipeline.parts.language_model.forward

    def watched(**inputs):
        given.append(inputs)
        return forward(**inputs)

    monkeypatch.setattr(pipeline.parts.language_model, "forward", watched)
    batch, _ = pipeline.read(SMILES)
    pipeline.run(line_up(pipeline.parts.connector, mean=6, longest=9)[1], batch)
    assert len(given) == 5
    assert not any("attention_mask" in inputs for inputs in given)


def test_room_in_the_prompt(pipeline):
    pipeline.check_room(640 - 5 - 4)
    with pytest.raises(ValueError, match=r"at most 640 tokens.* got 641: 632 of the largest"):
        pipeline.check_room(632)


@torch.inference_mode()
def test_a_language_model_without_a_cache_is_refused(pipeline, monkeypatch):
    model = pipeline.parts.language_model
    forward = model.forward

    def forgetful(**inputs):
        read = forward(**inputs)
        read.cache = read.past_key_values = None
        return read

    monkeypatch.setattr(model, "forward", forgetful)
    batch, _ = pipeline.read(SMILES)
    with pytest.raises(ValueError, match=r"must return .*, LlamaForCausalLM does not"):
        pipeline.run(line_up(pipeline.parts.connector, mean=6, longest=9)[0], batch)
