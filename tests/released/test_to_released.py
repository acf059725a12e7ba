"""Folders of this package become released files, also those that never were one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from edt_former.connectors import make_connector
from edt_former.graph import make_encoder
from edt_former.language import save_part
from edt_former.model import MoleculeLM
from edt_former.processor import load_tokenizer
from edt_former.released import to_ours, to_released
from edt_former.tokens import NextAtomPredictor
from edt_former.train.objectives import RepresentationLearning
from tests.released.conftest import CONNECTOR, GRAPH, LLAMA, encoder_tree

SIZES = {"text_vocab_size": 30, "text_positions": 90}


def trained(folder, **options) -> RepresentationLearning:
    """What a first stage of training leaves."""
    torch.manual_seed(3)
    encoder = make_encoder(GRAPH)
    task = RepresentationLearning(make_connector({**CONNECTOR, "llm_width": None, **options}))
    save_part(encoder, folder / "graph_encoder")
    task.save_pretrained(folder)
    return task


def test_an_encoder_that_was_trained_here(tmp_path, options):
    task = trained(tmp_path / "ours", **SIZES)
    plan = to_released(tmp_path / "ours")
    assert plan.layout == "encoder.*" and "made, as " in plan.notes[0]
    plan.write(tmp_path / "back.safetensors")
    found = load_file(tmp_path / "back.safetensors")
    expected = encoder_tree(text=True)
    assert found.keys() == expected.keys()
    differing = {n for n, x in found.items() if x.shape != expected[n].shape}
    assert all(n.startswith(("encoder.graph_proj", "encoder.text_proj")) for n in differing)
    assert (
        found["encoder.static_q_mask"].all() and found["encoder.static_q_mask"].dtype == torch.bool
    )
    linear = "encoder.graph_encoder.moleculestm.graph_pred_linear.weight"
    assert not found[linear].any()
    words = found["encoder.Qformer.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(found["encoder.Qformer.cls.predictions.decoder.weight"], words)
    bias = found["encoder.Qformer.cls.predictions.bias"]
    assert torch.equal(found["encoder.Qformer.cls.predictions.decoder.bias"], bias)

    to_ours(tmp_path / "back.safetensors", options).write(tmp_path / "again")
    again = RepresentationLearning.from_pretrained(tmp_path / "again")
    for name, value in again.state_dict().items():
        assert torch.equal(value, task.state_dict()[name])


@pytest.fixture
def model(make_llm):
    def make(**options) -> MoleculeLM:
        folder, _ = make_llm()
        config = LlamaConfig(vocab_size=12, bos_token_id=0, eos_token_id=1, **LLAMA)
        return MoleculeLM.from_parts(
            LlamaForCausalLM(config),
            make_encoder(GRAPH),
            make_connector({**CONNECTOR, "llm_width": 16}),
            NextAtomPredictor({"vocabulary": "published", "layers": 1, "width": 16}),
            tokenizer=load_tokenizer(folder),
            **options,
        )

    return make


def test_a_model_that_was_trained_here(tmp_path, model):
    model = model()
    model.save_pretrained(tmp_path / "ours", save_frozen=True)
    to_released(tmp_path / "ours").write(tmp_path / "back.safetensors")
    found = load_file(tmp_path / "back.safetensors")
    assert {n.partition(".")[0] for n in found} == {"model"}
    state = model.state_dict()
    for name, value in found.items():
        own = name.removeprefix("model.")
        own = own.replace("llm_proj.", "connector.llm_proj.").replace("llm.", "language_model.")
        for place in (own, f"graph_encoder.{own[8:]}", f"connector.{own[8:]}"):
            if place in state:
                assert torch.equal(value, state.pop(place)), name
                break
    assert set(state) <= {n for n in state if n.startswith("predictor.")}


def test_a_whole_table_that_was_trained_is_the_one_that_is_written(tmp_path, model):
    model = model(train_embeddings="all")
    model.save_pretrained(tmp_path / "ours", save_frozen=True)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path / "ours", frozen_folder=tmp_path / "ours")
    to_released(tmp_path / "ours").write(tmp_path / "back.safetensors")
    found = load_file(tmp_path / "back.safetensors")["model.llm.model.embed_tokens.weight"]
    assert torch.equal(found, model.get_input_embeddings().weight)


def test_rows_of_new_tokens_have_no_place(tmp_path, model):
    model(new_tokens=["<protein>"]).save_pretrained(tmp_path / "ours", save_frozen=True)
    with pytest.raises(ValueError, match="trained rows of new tokens"):
        to_released(tmp_path / "ours")


@pytest.mark.parametrize(
    ("graph", "connector", "message"),
    [
        (GRAPH, {"name": "qformer"}, "must be 'edt_former_published' .*, got 'qformer'"),
        (GRAPH["flat"], {}, "must be blended of gin of unimol .*, got gin"),
        ({**GRAPH["spatial"]}, {}, "must be blended of gin of unimol .*, got unimol"),
    ],
)
def test_another_architecture_has_no_released_file(tmp_path, graph, connector, message):
    torch.manual_seed(0)
    save_part(make_encoder(graph), tmp_path / "graph_encoder")
    save_part(make_connector({**CONNECTOR, "llm_width": None, **connector}), tmp_path / "connector")
    with pytest.raises(ValueError, match=message):
        to_released(tmp_path)


def test_weights_that_do_not_fit_their_config(tmp_path):
    trained(tmp_path, **SIZES)
    weights = load_file(tmp_path / "connector" / "model.safetensors")
    weights["local_q_proj.bias"] = torch.ones(3)
    save_file(weights, tmp_path / "connector" / "model.safetensors")
    with pytest.raises(ValueError, match=r"connector/local_q_proj.bias \[3\] instead of \[16\]"):
        to_released(tmp_path)


def test_folders_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="must be a checkpoint, or a folder with graph_encoder/"):
        to_released(tmp_path)
