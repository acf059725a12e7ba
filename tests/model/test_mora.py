"""A `MoleculeLM` whose molecules become adapters: rows, generation, training, checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch

from edt_former.chem import read_molecules
from edt_former.connectors import MoRA
from edt_former.graph import GraphBatch
from edt_former.model import MoleculeLM

TEXTS = [
    "<mol> question: how many rings ? answer:",
    "how many ?",
    "<mol> <mol> question: does <mol> have rings ? answer:",
]
MOLECULES = [["CC(=O)Oc1ccccc1C(=O)O"], [], ["CCO", "[Na+]", "C1CC1"]]
ARCHITECTURES = ["llama", "qwen2", "gemma3", "granite"]
LONG = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def make_mora(make_model):
    """A model whose adapters are far from zero."""

    def make(language_model: str = "llama", **options: object) -> MoleculeLM:
        torch.manual_seed(0)
        model = make_model(language_model, "mora", **options)
        with torch.no_grad():
            for parameter in model.connector.b.values():
                parameter.normal_(std=0.3)
        return model

    return make


def logits(model, texts, molecules, row, **options):
    inputs = model.processor(texts, molecules, **options)
    with torch.no_grad():
        return model(**inputs).logits[row][inputs["attention_mask"][row].bool()]


def test_a_molecule_leaves_no_token(make_mora):
    model = make_mora()
    inputs = model.processor(TEXTS, MOLECULES)
    assert not (inputs["input_ids"] == model.config.mol_token_id).any()
    assert inputs["molecule_counts"].tolist() == [1, 0, 3]
    assert model.processor.token_counts(["CCO", "C"]) == [0, 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_has_the_sum_of_its_molecules_adapters(make_mora, architecture):
    model = make_mora(architecture)
    for side in ("left", "right"):
        for row, (text, molecules) in enumerate(zip(TEXTS, MOLECULES, strict=True)):
            alone = logits(model, [text], [molecules], 0)
            found = logits(model, TEXTS, MOLECULES, row, padding_side=side)
            torch.testing.assert_close(found, alone, rtol=0, atol=2e-4)
    inputs = model.processor([TEXTS[2]], [MOLECULES[2]])
    adapters = model.adapt_molecules(MOLECULES[2])
    summed = adapters._replace(a={k: a.sum(1, keepdim=True) for k, a in adapters.a.items()})
    with torch.no_grad(), model.using(summed):
        expected = model.language_model(input_ids=inputs["input_ids"]).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=2e-4)
    plain = model.language_model(input_ids=inputs["input_ids"]).logits
    assert (plain - expected).abs().max() > 0.05


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_without_a_molecule_has_the_bits_of_the_plain_language_model(make_mora, architecture):
    model = make_mora(architecture)
    inputs = model.processor([TEXTS[1], "how many ?"])
    plain = model.language_model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).logits
    assert torch.equal(model(**inputs).logits, plain)
    mixed = model.processor(TEXTS, MOLECULES)
    embeds = model.embed_prompt(mixed["input_ids"])
    with torch.no_grad():
        adapted = model(**mixed).logits
        plain = model(inputs_embeds=embeds, attention_mask=mixed["attention_mask"]).logits
    assert torch.equal(adapted[1], plain[1])
    assert not torch.equal(adapted[0], plain[0])


def test_generation_continues_the_forward_pass_with_the_same_adapters(make_mora):
    model = make_mora()
    tokens = model.generate(**model.processor(TEXTS, MOLECULES), **LONG)
    for row, (text, molecules) in enumerate(zip(TEXTS, MOLECULES, strict=True)):
        alone = model.processor([text], [molecules])
        assert torch.equal(model.generate(**alone, **LONG)[0], tokens[row])
        step = dict(alone)
        for token in tokens[row].tolist():
            best = model(**step).logits[0, -1]
            best[model.config.mol_token_id] = -torch.inf
            assert best.argmax() == token
            step["input_ids"] = torch.cat([step["input_ids"], torch.tensor([[token]])], 1)
            step["attention_mask"] = torch.ones_like(step["input_ids"])


def test_an_adapter_follows_its_beams(make_mora):
    model = make_mora()
    options = {**LONG, "num_beams": 4, "num_return_sequences": 2}
    together = model.generate(**model.processor(TEXTS, MOLECULES), **options)
    for row, (text, molecules) in enumerate(zip(TEXTS, MOLECULES, strict=True)):
        found = model.generate(**model.processor([text], [molecules]), **options)
        assert torch.equal(found, together[2 * row : 2 * row + 2])


def test_training_moves_the_connector_alone_and_begins_at_the_plain_language_model(make_model):
    model = make_model("qwen2", "mora").train()
    inputs = model.processor(TEXTS, MOLECULES, answers=["0", "1", "2"])
    embeds = model.embed_prompt(inputs["input_ids"])
    mask = inputs["attention_mask"]
    plain = model(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(model(**inputs).logits, plain)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    moved = {
        n.split(".")[0] for n, x in model.state_dict().items() if not torch.equal(x, before[n])
    }
    assert moved == {"connector"}
    still = [n for n, p in model.connector.named_parameters() if p.grad is None]
    assert not still


def test_a_text_only_batch_trains_with_zero_gradients(make_mora):
    model = make_mora().train()
    model(**model.processor(["how many ?"], answers=["3"])).loss.backward()
    gradients = [p.grad for p in model.connector.parameters()]
    assert all(g is not None and not g.any() for g in gradients)


def test_accumulated_batches_are_computed_again_with_their_own_molecules(make_mora):
    model = make_mora()
    batches = [model.processor(["<mol> how many ?"], [m], answers=["0"]) for m in ("CCO", "C1CC1")]

    def gradients():
        model.zero_grad()
        sum(model(**inputs).loss for inputs in batches).backward()
        return {n: p.grad.clone() for n, p in model.connector.named_parameters()}

    expected = gradients()
    model.activation_checkpointing_enable()
    model.train()
    found = gradients()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_molecules_are_encoded_once_in_a_run_and_never_saved(make_mora, tmp_path):
    model = make_mora()
    asked = []
    model.connector.register_forward_hook(
        lambda _, args, __: asked.append(len(args[0].offsets) - 1)
    )
    first = model.adapt_molecules(["CCO", "C1CC1", "OCC"])
    again = model.adapt_molecules(["C(O)C", "CN"])
    assert asked == [2, 1]
    assert torch.equal(first.a["q"][:, 0], again.a["q"][:, 0])
    assert torch.equal(first.a["q"][:, 2], first.a["q"][:, 0])
    model.save_pretrained(tmp_path)
    assert not any("cache" in name for name in model.state_dict())
    with torch.no_grad():
        model.connector.gen[0].queries.mul_(2)
    changed = model.adapt_molecules(["CCO"])
    assert asked == [2, 1, 1] and not torch.equal(changed.a["q"][:, 0], first.a["q"][:, 0])
    model._adapter_cache.max_bytes = 0
    assert torch.equal(model.adapt_molecules(["CCO"]).a["q"], changed.a["q"])
    model.adapt_molecules(["CCO"])
    assert len(asked) == 4
    model._adapter_cache.max_bytes = 2**30
    model.adapt_molecules(["CCO"])
    model.connector.gen[0].queries.data.mul_(2)  # not counted by torch
    again = model.adapt_molecules(["CCO"])
    assert len(asked) == 6 and not torch.equal(again.a["q"], changed.a["q"])


def test_gradients_are_never_answered_from_memory(make_mora):
    model = make_mora()
    model.adapt_molecules(["CCO"])
    inputs = model.processor(["<mol> how many ?"], ["CCO"], answers=["0"])
    model(**inputs).loss.backward()
    assert model.connector.gen[0].queries.grad.any()


def test_a_checkpoint_comes_back_with_its_language_model(make_mora, tmp_path):
    model = make_mora("qwen2")
    model.save_pretrained(tmp_path / "whole", save_frozen=True)
    back = MoleculeLM.from_pretrained(tmp_path / "whole")
    assert isinstance(back.connector, MoRA) and back.connector.config == model.connector.config
    inputs = model.processor(TEXTS, MOLECULES)
    again = back.processor(TEXTS, MOLECULES)
    assert torch.equal(back(**again).logits, model(**inputs).logits)
    assert back.answer("CCO", "how many ?") == model.answer("CCO", "how many ?")


def test_a_copy_adapts_itself_alone(make_mora):
    model = make_mora()
    twin = copy.deepcopy(model)
    inputs = model.processor(TEXTS, MOLECULES)
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    ids = inputs["input_ids"]
    plain = twin.language_model(input_ids=ids).logits
    with model.using(model.adapt_molecules(["CCO", "CCO", "CCO"])):
        assert torch.equal(twin.language_model(input_ids=ids).logits, plain)


def test_lora_and_molecules_together(make_mora):
    pytest.importorskip("peft", reason="peft makes the LoRA")
    model = make_mora()
    before = model(**model.processor(TEXTS, MOLECULES)).logits
    model.add_lora({"rank": 2, "alpha": 2, "dropout": 0.0, "targets": ["q_proj"]})
    torch.testing.assert_close(model(**model.processor(TEXTS, MOLECULES)).logits, before)


def test_tokens_and_adapters_are_told_apart(make_mora, make_model):
    model = make_mora()
    with pytest.raises(TypeError, match="MoRA makes no tokens, see adapt_molecules"):
        model.embed_molecules(["CCO"])
    with pytest.raises(TypeError, match="MoRA makes no tokens"):
        model.embed_graph(GraphBatch.pack(read_molecules(["CCO"])))
    with pytest.raises(TypeError, match="MoRA has no budget"):
        model.set_budget(anchors=1)
    other = make_model()
    with pytest.raises(TypeError, match="EDTFormer makes tokens, see embed_molecules"):
        other.adapt_molecules(["CCO"])
    adapters = model.adapt_molecules(["CCO"])
    with pytest.raises(TypeError, match="makes tokens, it has no adapters"), other.using(adapters):
        pass
