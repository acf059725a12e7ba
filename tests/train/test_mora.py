"""MoRA through the stages of training: what trains, what resumes, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from edt_former.model import MoleculeLM
from edt_former.train.finetune import finetune
from edt_former.train.language import train_language_model
from edt_former.train.stage2 import train_stage2
from tests.train import runs
from tests.train.test_stage1 import stop_at

pytest.importorskip("accelerate", reason="training needs accelerate")
pytestmark = pytest.mark.usefixtures("as_shipped")

CONNECTOR = {
    **{"name": "mora", "types": "qvomd", "every": 1, "rank": 4, "width": 16, "layers": 1},
    **{"heads": 2, "ffn": 24, "head": "factorised", "factors": 4, "sum_tokens": 1},
}


@pytest.fixture(scope="module")
def language_model(prepared_data, tmp_path_factory):
    training = {"steps": 100, "batch_size": 16, "learning_rate": 1e-2, "save_every": 100}
    size = {"width": 32, "layers": 2, "ffn": 64}
    folder = tmp_path_factory.mktemp("lm")
    return train_language_model(runs.language(folder, prepared_data, training=training, **size))


def config(out, data, language_model, **training):
    told = runs.stage2(out, data, language_model, training={**runs.TRAINING, **training})
    return replace(told, connector=CONNECTOR)


def test_losses_fall_and_the_connector_alone_trains(language_model, prepared_data, tmp_path):
    told = {"steps": 80, "learning_rate": 1e-2, "save_every": 80, "batch_size": 16}
    made = train_stage2(config(tmp_path, prepared_data, language_model, **told))
    values = runs.losses(tmp_path)
    assert sum(values[-15:]) < 0.95 * sum(values[:15]), values
    names = json.loads((tmp_path / "trainable.json").read_text())["parameters"]
    assert all(name.startswith("connector.") for name in names)
    assert all(name.startswith("connector.") for name in load_file(made / "model.safetensors"))
    model = MoleculeLM.from_pretrained(made)
    texts = ["question: Describe the molecule. answer:", "<mol> question: Describe the molecule."]
    inputs = model.processor(texts, [[], ["CCO"]])
    embeds = model.embed_prompt(inputs["input_ids"])
    with torch.no_grad():
        plain = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
        adapted = model(**inputs).logits
    assert torch.equal(plain[0], adapted[0]) and not torch.equal(plain[1], adapted[1])


def test_a_run_that_was_stopped_goes_on_to_the_digit(
    language_model, prepared_data, tmp_path, monkeypatch
):
    whole = train_stage2(config(tmp_path / "whole", prepared_data, language_model))
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(KeyboardInterrupt):
            train_stage2(config(tmp_path / "parts", prepared_data, language_model))
    again = train_stage2(config(tmp_path / "parts", prepared_data, language_model))
    one, other = (load_file(made / "model.safetensors") for made in (whole, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_checkpointing_and_accumulation_change_nothing(language_model, prepared_data, tmp_path):
    found = []
    options = ({}, {"checkpointing": True}, {"batch_size": 3, "accumulation": 2})
    for n, told in enumerate(options):
        made = train_stage2(config(tmp_path / str(n), prepared_data, language_model, **told))
        found.append(load_file(made / "model.safetensors"))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


def test_fine_tuning_goes_on_and_a_head_is_refused(language_model, prepared_data, tmp_path):
    made = train_stage2(config(tmp_path / "first", prepared_data, language_model))
    again = finetune(runs.finetune(tmp_path / "second", prepared_data, made))
    one, other = (load_file(folder / "model.safetensors") for folder in (made, again))
    assert any(not torch.equal(value, other[name]) for name, value in one.items())
    head = {"kind": "regression", "width": 16, "dropout": 0.0}
    with pytest.raises(
        ValueError, match=r"a head reads tokens, the connector of .* makes adapters"
    ):
        finetune(runs.finetune(tmp_path / "third", prepared_data, made, head=head))


def test_options_that_do_not_fit_are_named(language_model, prepared_data, tmp_path):
    told = config(tmp_path, prepared_data, language_model)
    with pytest.raises(ValueError, match=r"connector: .*unexpected keyword argument 'dropout'"):
        train_stage2(replace(told, connector={**CONNECTOR, "dropout": 0.1}))
