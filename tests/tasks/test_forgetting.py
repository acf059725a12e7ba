"""The loss on plain text before and after training, and what `edt eval forgetting` makes of it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from edt_former.connectors import make_connector
from edt_former.graph import make_encoder
from edt_former.language import connector_options
from edt_former.model import MoleculeLM
from edt_former.tasks.forgetting import forgetting
from edt_former.tasks.questions import FACTS
from edt_former.train.tiny.reader import ReaderConfig, build_reader
from edt_former.train.tiny.vocabulary import build_tokenizer

TEXTS = ["question: how many rings does it have?", "answer: rings: 3", "x", ""]
MORA = {"name": "mora", "types": "om", "every": 1, "rank": 2, "width": 8, "layers": 1}


@pytest.fixture
def model() -> MoleculeLM:
    """MoRA whose adapters are far from zero."""
    tokenizer = build_tokenizer(FACTS)
    reader = build_reader(tokenizer, ReaderConfig(width=16, intermediate=16, layers=1, heads=2))
    encoder = make_encoder({"name": "gin", "layers": 1, "width": 8})
    options = connector_options({**MORA, "heads": 2, "ffn": 8, "encoder_width": 8}, reader)
    model = MoleculeLM.from_parts(reader, encoder, make_connector(options), tokenizer=tokenizer)
    for parameter in model.connector.b.values():
        torch.nn.init.normal_(parameter)
    return model.eval()


def test_a_connector_leaves_plain_text_as_it_was_to_the_bit(model):
    plain = copy.deepcopy(model.language_model)
    found = forgetting(model, plain, TEXTS)
    assert found.equal and found.change == found.low == found.high == 0
    assert found.before == found.after > 1
    ids = model.processor.tokenizer(TEXTS[:3]).input_ids
    assert found.tokens == sum(len(row) - 1 for row in ids)
    expected = 0.0
    for row in ids:
        logits = plain(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        expected -= logits.gather(1, torch.tensor(row)[1:, None]).sum().item()
    assert math.isclose(found.before, expected / found.tokens, rel_tol=1e-5)


def test_what_changes_the_language_model_is_seen(model):
    pytest.importorskip("peft", reason="peft makes the LoRA")
    plain = copy.deepcopy(model.language_model)
    model.add_lora({"rank": 2, "alpha": 2, "dropout": 0.0, "targets": ["q_proj", "down_proj"]})
    assert forgetting(model, plain, TEXTS).equal
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    found = forgetting(model, plain, TEXTS)
    assert not found.equal and found.change != 0 and found.low <= found.change <= found.high
    assert found == forgetting(model, plain, TEXTS, batch_size=1) or math.isclose(
        found.after, forgetting(model, plain, TEXTS, batch_size=1).after, rel_tol=1e-5
    )


def test_texts_without_anything_to_predict_are_refused(model):
    with pytest.raises(ValueError, match="two tokens or more, got none"):
        forgetting(model, model.language_model, [""])


@pytest.mark.usefixtures("as_shipped")
def test_the_command_trains_ordinary_lora_beside(prepared_data, tmp_path, capsys):
    for package in ("accelerate", "peft"):
        pytest.importorskip(package, reason="training needs the train extra")
    from edt_former.cli.main import main
    from edt_former.language.frozen import read_json
    from edt_former.train.language import train_language_model
    from edt_former.train.stage2 import train_stage2
    from tests.train import runs

    language_model = train_language_model(runs.language(tmp_path / "lm", prepared_data))
    told = runs.stage2(tmp_path / "mora", prepared_data, language_model)
    mora = {**MORA, "heads": 2, "ffn": 8}
    made = train_stage2(replace(told, connector=mora))
    (tmp_path / "texts.txt").write_text("a chain of carbon\n\na chain of oxygen .\n")
    command = ["eval", "forgetting", made, "--text", tmp_path / "texts.txt"]
    more = ["--lora", tmp_path / "lora", "--out", tmp_path / "found.json"]
    capsys.readouterr()
    assert main([str(word) for word in (*command, *more)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 texts, nats per token" in lines
    mora, lora = lines[-2:]
    assert mora.endswith("yes") and "+0.0000" in mora and lora.endswith("no")
    first, second = read_json(tmp_path / "found.json").values()
    assert first["before"] == first["after"] == second["before"] != second["after"]
    config = read_json(tmp_path / "lora" / "lora" / "config.json")
    assert (
        config["lora"]["rank"] == MORA["rank"]
        and config["data"] == read_json(tmp_path / "mora" / "config.json")["data"]
    )
    assert set(config["lora"]["targets"]) == {"o_proj", "gate_proj", "up_proj", "down_proj"}
