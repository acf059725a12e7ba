"""Every option of patches and budgets through processor, model and checkpoint."""

import pytest
import torch

from edt_former.connectors import make_connector
from edt_former.model import MoleculeLM

MOLECULES = ["CC(=O)Oc1ccccc1C(=O)O", "C", "[Na+].CC(=O)[O-]", "C(CO)" * 30]
OPTIONS = [
    pytest.param({"connected": True}, id="connected"),
    pytest.param({"control": "random", "control_seed": 5}, id="random"),
    pytest.param({"control": "shuffled"}, id="shuffled"),
    pytest.param({"entropy_source": "surprisal"}, id="surprisal"),
    pytest.param({"entropy_source": "node"}, id="node"),
    pytest.param({"tokens": 70}, id="tokens"),
    pytest.param({"rule": "threshold", "threshold": -1.0}, id="every-atom"),
]


@pytest.fixture
def build(make_parts, make_tokenizer):
    def build(encoder="gin", **patches) -> MoleculeLM:
        llm, graph_encoder, connector, predictor = make_parts(encoder=encoder)
        config = connector.config | {"patches": {"sources": ["brics", "entropy"], **patches}}
        parts = llm, graph_encoder, make_connector(config), predictor
        return MoleculeLM.from_parts(*parts, tokenizer=make_tokenizer()).eval()

    return build


@pytest.mark.parametrize("options", OPTIONS)
def test_what_the_processor_counts_is_what_the_model_makes(build, options, tmp_path):
    model = build(**options)
    inputs = model.processor(["<mol> how many ?"] * 4, MOLECULES)
    with torch.no_grad():
        logits = model(**inputs).logits
        tokens = model.embed_molecules(MOLECULES)
    counts = model.processor.token_counts(MOLECULES)
    assert tokens.offsets.diff().tolist() == counts
    assert max(counts) > 64 or "tokens" not in options
    assert (inputs["input_ids"] == model.processor.mol_token_id).sum(1).tolist() == counts

    model.save_pretrained(tmp_path, save_frozen=True)
    again = MoleculeLM.from_pretrained(tmp_path)
    assert again.connector.patch_options == model.connector.patch_options
    with torch.no_grad():
        inputs = again.processor(["<mol> how many ?"] * 4, MOLECULES)
        torch.testing.assert_close(again(**inputs).logits, logits)


def test_patches_without_a_predictor(make_parts, make_tokenizer):
    llm, encoder, connector, _ = make_parts()
    config = connector.config | {"patches": {"entropy_source": "node"}}
    parts = llm, encoder, make_connector(config)
    model = MoleculeLM.from_parts(*parts, tokenizer=make_tokenizer()).eval()
    assert len(model.embed_molecules(["OCCO"]).values) == 2 + 2


def test_a_budget_shortens_the_prompt_and_is_saved(build, tmp_path):
    model = build()
    before = model.processor("<mol> yes", MOLECULES[:1])["input_ids"].shape[1]
    model.set_budget(anchors=1, dynamic=3)
    inputs = model.processor("<mol> yes", MOLECULES[:1])
    assert inputs["input_ids"].shape[1] == 1 + 4 + 1 < before
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    model.save_pretrained(tmp_path, save_frozen=True)
    again = MoleculeLM.from_pretrained(tmp_path)
    assert again.processor.token_counts(MOLECULES) == [1 + 3, 1 + 2, 1 + 3, 1 + 3]
    again.set_budget()
    assert again.processor("<mol> yes", MOLECULES[:1])["input_ids"].shape[1] == before


def test_no_tokens_at_all(build):
    model = build()
    model.set_budget(anchors=0, dynamic=0)
    inputs = model.processor(["<mol> yes", "no"], [["CCO"], []], answers=["1", "2"])
    loss = model(**inputs).loss
    assert torch.isfinite(loss)


def test_patches_of_both_views(build):
    model = build("blended", connected=True)
    inputs = model.processor("<mol> yes", "CC(=O)Oc1ccccc1C(=O)O", answers="1")
    model.train()
    model(**inputs).loss.backward()
    assert model.connector.local_q_proj.weight.grad.abs().sum() > 0
