"""LLaMo in its two stages: the projector on captions, then with adapters on conversations."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from edt_former.data import PreparedData, prepare
from edt_former.model import MoleculeLM
from edt_former.tasks.conversations import read_contexts, write_from_templates
from edt_former.train.finetune import finetune
from edt_former.train.stage2 import train_stage2
from edt_former.train.trainer import ConnectorTrainer
from tests.train import runs

pytest.importorskip("accelerate", reason="training needs accelerate")
pytestmark = pytest.mark.usefixtures("as_shipped")
PROJECTOR = {"name": "llamo", "num_levels": 2, "level_queries": 2, "heads": 2, "depth": 2}


@pytest.fixture(scope="module")
def conversations(caption_file, tmp_path_factory):
    """Three turns about every molecule of the captions, prepared."""
    folder = tmp_path_factory.mktemp("conversations")
    write_from_templates(read_contexts([caption_file]), folder / "all.jsonl", turns=3)
    prepare([folder / "all.jsonl"], folder / "data", progress=False)
    return folder / "data"


def test_two_stages(prepared_data, conversations, miniature, tmp_path):
    pytest.importorskip("peft", reason="adapters need peft")
    config = runs.stage2(tmp_path / "first", prepared_data, miniature / "language_model")
    config = replace(config, connector=PROJECTOR, predictor=None)
    first = train_stage2(replace(config, train_embeddings="all"))
    trained = json.loads((tmp_path / "first/trainable.json").read_text())["parameters"]
    assert {name.split(".")[0] for name in trained} == {"connector", "language_model"}
    model = MoleculeLM.from_pretrained(first)
    assert model.config.connector_config["name"] == "llamo" and model.predictor is None

    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}
    second = finetune(runs.finetune(tmp_path / "second", conversations, first, lora=lora))
    before, after = (load_file(made / "model.safetensors") for made in (first, second))
    projector = [name for name in before if name.startswith("connector.")]
    moved = {name for name in projector if not torch.equal(after[name], before[name])}
    assert any(name.startswith("connector.motif") for name in moved)
    assert all("q_proj" in n or "v_proj" in n for n in after if "lora_" in n)
    again = MoleculeLM.from_pretrained(second)
    assert again.config.lora["rank"] == 2
    assert len(again.answer(["CCO", "C"], "What is it?", max_new_tokens=2)) == 2


@pytest.mark.parametrize("projector", ["levels", "high"])
def test_half_precision_trains_and_matrices_decay(prepared_data, miniature, tmp_path, projector):
    names = []

    def listed(trainer, model):
        names.append(decayed(trainer, model))
        return names[-1]

    decayed = ConnectorTrainer.get_decay_parameter_names
    losses = []
    for bf16 in (False, True):
        out = tmp_path / str(bf16)
        training = {"bf16": bf16, "steps": 2}
        config = runs.stage2(out, prepared_data, miniature / "language_model", training=training)
        connector = {**PROJECTOR, "projector": projector}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ConnectorTrainer, "get_decay_parameter_names", listed)
            train_stage2(replace(config, connector=connector, predictor=None))
        losses.append(runs.losses(out))
    assert losses[1] == pytest.approx(losses[0], rel=3e-2) and losses[1] != losses[0]
    ends = {name.rpartition(".")[2] for name in names[0] if name.startswith("connector.")}
    assert ends == {"weight", "in_proj_weight"}


def test_every_turn_of_the_assistant_is_learned_and_nothing_else(conversations, miniature):
    model = MoleculeLM.from_pretrained(miniature / "edt_former")
    row = PreparedData(conversations)[0]
    messages = [{"role": role, "content": content} for role, content in row.turns]
    inputs = model.processor.conversations([messages], [[row.molecules[0].molecule]])
    labels, ids = inputs["labels"][0], inputs["input_ids"][0]
    learned = labels >= 0
    starts = (learned & ~learned.roll(1)).sum()
    assert starts == 3 and torch.equal(labels[learned], ids[learned])
    eos = model.processor.tokenizer.eos_token_id
    assert (ids[learned] == eos).sum() == 3, "and where each turn ends"
