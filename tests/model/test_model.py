from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from edt_former.chem import ConformerOptions, motif_features
from edt_former.config import MoleculeConfig
from edt_former.connectors import MoleculeTokens, make_connector
from edt_former.graph import GraphBatch, PretrainGNN, make_encoder
from edt_former.language import save_part
from edt_former.model import MoleculeLM
from edt_former.processor import read_all

ARCHITECTURES = ["llama", "qwen2", "gpt2", "gemma", "gemma2", "gemma3", "granite", "falcon_h1"]
CONNECTORS = ["edt_former", "edt_former_brics", "qformer", "llamo"]

TEXTS = [
    "<mol> question: how many rings ? answer:",
    "how many ?",
    "<mol> <mol> question: does <mol> have rings ? answer:",
]
MOLECULES = [["CC(=O)Oc1ccccc1C(=O)O"], [], ["CCO", "[Na+]", "C1CC1"]]
FLAT = [smiles for row in MOLECULES for smiles in row]


def logits(model, inputs, row):
    """Logits of the tokens of one row that are no padding."""
    with torch.no_grad():
        return model(**inputs).logits[row][inputs["attention_mask"][row].bool()]


def greedy(model, inputs, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**inputs, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_text_only_row_gives_the_plain_language_models_logits(make_model, architecture):
    model = make_model(architecture)
    inputs = model.processor(["how many rings ?"])
    plain = model.language_model(input_ids=inputs["input_ids"]).logits[0]
    torch.testing.assert_close(logits(model, inputs, 0), plain, rtol=0, atol=1e-6)
    beside = logits(model, model.processor(["how many rings ?", TEXTS[0]], MOLECULES[0]), 0)
    torch.testing.assert_close(beside, plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_does_not_depend_on_the_others_on_either_side_of_padding(make_model, architecture):
    """Up to the rounding of torch's dense products, which Granite's multipliers enlarge."""
    model = make_model(architecture)
    sides = ["left", "right"] if architecture != "falcon_h1" else ["left"]
    for row, (text, molecules) in enumerate(zip(TEXTS, MOLECULES, strict=True)):
        alone = logits(model, model.processor([text], [molecules]), 0)
        for side in sides:
            batch = model.processor(TEXTS, MOLECULES, padding_side=side)
            torch.testing.assert_close(logits(model, batch, row), alone, rtol=0, atol=2e-4)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_connector_fills_its_slots_in_order(make_model, connector):
    model = make_model(connector=connector)
    inputs = model.processor(TEXTS, MOLECULES)
    slots = inputs["input_ids"] == model.config.mol_token_id
    prompt = model.embed_prompt(
        *(inputs[k] for k in ("input_ids", "graph", "patches")), inputs["molecule_counts"]
    )
    tokens = model.embed_molecules(FLAT)
    torch.testing.assert_close(prompt[slots], tokens.values, rtol=0, atol=1e-5)
    text = model.get_input_embeddings()(inputs["input_ids"].masked_fill(slots, 0))
    assert torch.equal(prompt[~slots], text[~slots])
    counts = tokens.offsets.diff().tolist()
    assert counts == model.processor.token_counts(FLAT)


@pytest.mark.parametrize("architecture", ["gemma", "granite", "falcon_h1"])
def test_a_molecule_token_stands_on_the_scale_of_embedded_text(make_model, architecture):
    model = make_model(architecture, connector="qformer")
    ids = torch.tensor([[5, 6, 7]])
    plain = model.language_model(input_ids=ids).logits[0]
    inputs = model.processor(["<mol>"], ["C"], add_special_tokens=False)
    text = model.get_input_embeddings()(ids[0]).detach()
    tokens = MoleculeTokens(text, torch.tensor([0, 3]))
    model.connector.forward = lambda features, patches: tokens
    torch.testing.assert_close(logits(model, inputs, 0), plain, rtol=0, atol=1e-5)


def test_the_loss_is_that_of_the_answers_alone(make_model):
    model = make_model()
    inputs = model.processor(TEXTS[:2], MOLECULES[:2], answers=["3", "no"])
    out = model(**inputs)
    labels, scores = inputs["labels"][:, 1:], out.logits[:, :-1]
    learned = labels != -100
    assert learned.sum(1).tolist() == [2, 2]
    expected = torch.nn.functional.cross_entropy(scores[learned], labels[learned])
    torch.testing.assert_close(out.loss, expected)


def test_molecule_tokens_and_new_tokens_are_never_learned(make_model):
    model = make_model(new_tokens=["<end>"])
    inputs = model.processor(["<mol> <end> yes no"], ["C"])
    every = model(**inputs, labels=inputs["input_ids"]).loss
    only = inputs["input_ids"].clone()
    only[only >= model.config.mol_token_id] = -100
    assert torch.equal(every, model(**inputs, labels=only).loss)


@pytest.mark.parametrize("train_embeddings", ["new_rows", "all", "none"])
def test_one_step_moves_what_trains_and_nothing_else(make_model, train_embeddings):
    model = make_model(new_tokens=["<end>"], train_embeddings=train_embeddings).train()
    inputs = model.processor(
        ["<mol> <end> how many rings ?"] * 2, ["CCO", "c1ccccc1"], answers=["0", "1"]
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**inputs).loss.backward()
    optimizer.step()
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    table = "language_model.model.embed_tokens.weight"
    expected = {n for n, _ in model.named_parameters() if n.startswith("connector.")}
    expected |= {"new_rows"} if train_embeddings != "none" else set()
    expected |= {table} if train_embeddings == "all" else set()
    # A bias of keys shifts all scores of a query alike, so its gradient is zero.
    assert moved <= expected
    assert {n for n in expected - moved if "key.bias" not in n} == set()
    counts = model.trainable_parameters()
    assert counts["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["graph_encoder"] == counts["predictor"] == 0
    assert counts["language_model"] == (24 * 16 if train_embeddings == "all" else 0)


def test_frozen_parts_stay_in_eval(make_model):
    model = make_model("gpt2").train()
    assert model.training and model.connector.training
    for part in (model.language_model, model.graph_encoder, model.predictor):
        assert not any(module.training for module in part.modules())


def test_gradient_checkpointing_works_in_the_frozen_language_model(make_model):
    model = make_model()
    inputs = model.processor(["<mol> how many ?"], ["CCO"], answers=["0"])

    def gradients():
        model.zero_grad()
        model(**inputs).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.activation_checkpointing_enable()
    model.train()
    runs = []
    layer = model.language_model.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    found = gradients()
    assert len(runs) == 2
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_text_only_batch_trains_with_zero_gradients(make_model):
    model = make_model().train()
    model(**model.processor(["how many ?"], answers=["3"])).loss.backward()
    gradients = [p.grad for p in model.connector.parameters() if p.grad is not None]
    assert gradients
    assert all(not g.any() for g in gradients)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "granite"])
def test_greedy_generation_continues_the_forward_pass(make_model, architecture):
    model = make_model(architecture)
    inputs = model.processor(TEXTS, MOLECULES)
    tokens = greedy(model, inputs)
    assert tokens.shape == (3, 6)
    assert torch.equal(tokens, greedy(model, inputs, num_beams=1))
    for row, (text, molecules) in enumerate(zip(TEXTS, MOLECULES, strict=True)):
        alone = model.processor([text], [molecules])
        assert torch.equal(greedy(model, alone)[0], tokens[row])
        step = dict(alone)
        for token in tokens[row].tolist():
            best = model(**step).logits[0, -1]
            best[model.config.mol_token_id] = -torch.inf
            assert best.argmax() == token
            more = torch.tensor([[token]])
            step["input_ids"] = torch.cat([step["input_ids"], more], 1)
            step["attention_mask"] = torch.ones_like(step["input_ids"])


def test_beams_and_samples_keep_every_row_with_its_molecules(make_model):
    model = make_model()
    inputs = model.processor(TEXTS, MOLECULES)
    together = greedy(model, inputs, num_beams=4, num_return_sequences=2)
    assert together.shape == (6, 6)
    for row, (text, molecules) in enumerate(zip(TEXTS, MOLECULES, strict=True)):
        alone = model.processor([text], [molecules])
        found = greedy(model, alone, num_beams=4, num_return_sequences=2)
        assert torch.equal(found, together[2 * row : 2 * row + 2])
    options = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(1)
    first = greedy(model, inputs, **options)
    torch.manual_seed(1)
    assert first.shape == (9, 6)
    assert torch.equal(first, greedy(model, inputs, **options))


def test_tokens_that_only_stand_in_prompts_are_never_generated(make_model):
    model = make_model(new_tokens=["yes"])
    with torch.no_grad():
        model.get_output_embeddings().weight[:] = 0
        model.get_output_embeddings().weight[model.config.new_token_ids] = 1e-3
    tokens = greedy(model, model.processor(TEXTS, MOLECULES))
    assert not torch.isin(tokens, torch.tensor(model.config.new_token_ids)).any()


def test_new_rows_start_at_the_table_and_are_what_the_model_reads(make_model):
    beyond = [f"<{n}>" for n in range(5)]
    model = make_model("gemma", new_tokens=["yes", *beyond])
    assert model.config.new_token_ids == [13, 20, 21, 22, 23, 24]
    table = model.get_input_embeddings()
    torch.testing.assert_close(model.new_rows[0], table(torch.tensor(13)))
    torch.testing.assert_close(model.new_rows[-1], table(torch.arange(24)).mean(0))
    prompt = model.embed_prompt(model.processor(["no <4> yes"])["input_ids"])
    assert torch.equal(prompt[0, -2:], model.new_rows[[-1, 0]])


def test_answers_come_one_per_question_whatever_the_batch(make_model):
    model = make_model()
    molecules = ["CCO", ["c1ccccc1", "C"], "[Na+]"]
    short = {"max_new_tokens": 4}
    every = model.answer(molecules, "how many rings ?", batch_size=2, **short)
    each = [model.answer([m], "how many rings ?", **short)[0] for m in molecules]
    assert every == each
    asked = model.answer("CCO", ["how many rings ?", "yes"], **short)
    assert asked == [each[0], *model.answer("CCO", "yes", **short)]
    column = np.array(["CCO", "[Na+]"], dtype=object)
    assert model.answer(column, "how many rings ?", **short) == [each[0], each[2]]
    with pytest.raises(ValueError, match="as many, got 2 and 3"):
        model.answer(["C", "CC"], ["yes"] * 3)
    with pytest.raises(TypeError, match=r"questions\[1\] must be a string, got int"):
        model.answer("C", ["yes", 3])


def test_embeddings_of_molecules_do_not_depend_on_the_batch(make_model):
    model = make_model(connector="edt_former_brics")
    molecules = FLAT
    together = model.embed_molecules(molecules)
    for m, smiles in enumerate(molecules):
        start, stop = together.offsets[m : m + 2].tolist()
        alone = model.embed_molecules(read_all([smiles]))
        torch.testing.assert_close(alone.values, together.values[start:stop], rtol=0, atol=1e-5)
    assert model.embed_molecules([]).offsets.tolist() == [0]


def test_errors_name_the_row_and_the_numbers(make_model):
    model = make_model(connector="qformer")
    inputs = dict(model.processor(TEXTS, MOLECULES))
    short = {**inputs, "input_ids": inputs["input_ids"].clone()}
    short["input_ids"][2, -4] = model.config.mol_token_id
    found = (short["input_ids"] == model.config.mol_token_id).sum(1).tolist()
    assert found == [3, 0, 10]
    with pytest.raises(ValueError, match=r"row 2 of input_ids has 10 placeholders.* 9 tokens"):
        model(**short)
    with pytest.raises(ValueError, match="sum to the molecules of graph, 4, got 3"):
        model(**{**inputs, "molecule_counts": torch.tensor([1, 0, 2])})
    with pytest.raises(ValueError, match=r"row 0 of input_ids has 3 placeholders.* 0 tokens"):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match="row 1 ends in padding"):
        model.generate(**model.processor(TEXTS[:2], MOLECULES[:2], padding_side="right"))
    with pytest.raises(ValueError, match="300 tokens, the language model reads at most 256"):
        model(input_ids=torch.ones(1, 300, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens and max_new_tokens=250.*at most 256"):
        model.generate(**inputs, max_new_tokens=250)
    long = GenerationConfig(max_new_tokens=250)
    with pytest.raises(ValueError, match=r"tokens and max_new_tokens=250.*at most 256"):
        model.generate(**inputs, generation_config=long)
    with pytest.raises(ValueError, match=r"tokens and max_new_tokens=\d+.*at most 256"):
        model.generate(**inputs, max_length=1000)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.answer("CCO", "how many ?", batch_size=0)


def test_tokens_that_a_generation_config_suppresses_stay_so(make_model):
    model = make_model("llama")
    inputs = model.processor(TEXTS[:2], MOLECULES[:2])
    first = int(greedy(model, inputs)[0, 0])
    told = GenerationConfig(suppress_tokens=[first], do_sample=False, max_new_tokens=6)
    assert first not in model.generate(**inputs, generation_config=told)
    model.language_model.generation_config.suppress_tokens = [first]
    assert first not in greedy(model, inputs)
    assert first in greedy(model, inputs, suppress_tokens=None)


def test_a_single_molecule_is_one(make_model):
    model = make_model("llama")
    tokens = model.embed_molecules("CCO")
    assert torch.equal(tokens.values, model.embed_molecules(["CCO"]).values)
    counts = model.processor.token_counts("CCO")
    assert counts == model.processor.token_counts(["CCO"]) == tokens.offsets.diff().tolist()


def test_texts_and_answers_are_strings(make_model):
    processor = make_model("llama").processor
    with pytest.raises(TypeError, match=r"text\[1\] must be a string, got int"):
        processor(["how many ?", 3])
    with pytest.raises(TypeError, match=r"answers\[0\] must be a string, got float"):
        processor("how many ?", answers=[2.0])


def test_a_damaged_processor_is_named(make_model, tmp_path):
    model = make_model("llama")
    model.processor.save_pretrained(tmp_path)
    for content in ("{}", "no JSON"):
        (tmp_path / "processor.json").write_text(content)
        with pytest.raises(ValueError, match=r"processor\.json is damaged"):
            type(model.processor).from_pretrained(tmp_path)


def test_no_row_at_all(make_model):
    model = make_model("llama")
    inputs = model.processor([])
    assert inputs["molecule_counts"].dtype == torch.int64 and len(inputs["input_ids"]) == 0


def test_parts_that_do_not_fit_are_refused(make_parts, make_tokenizer):
    text_model, encoder, connector, predictor = make_parts()
    wide = make_connector({**connector.config, "llm_width": 32})
    with pytest.raises(ValueError, match="llm_width must be 16, got 32"):
        MoleculeLM.from_parts(text_model, encoder, wide, predictor, tokenizer=make_tokenizer())
    other = make_connector({**connector.config, "encoder_width": 9})
    with pytest.raises(ValueError, match="encoder_width must be 8, got 9"):
        MoleculeLM.from_parts(text_model, encoder, other, predictor, tokenizer=make_tokenizer())


@pytest.mark.parametrize("train_embeddings", ["new_rows", "all"])
def test_a_checkpoint_with_its_frozen_parts_gives_the_same_logits(
    make_model, tmp_path, train_embeddings
):
    model = make_model("qwen2", new_tokens=["<end>"], train_embeddings=train_embeddings)
    inputs = model.processor(["<mol> <end> how many ?"], ["CCO"])
    model.save_pretrained(tmp_path, save_frozen=True)
    read = MoleculeLM.from_pretrained(tmp_path)
    again = read.processor(["<mol> <end> how many ?"], ["CCO"])
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    assert torch.equal(read(**again).logits, model(**inputs).logits)
    assert read.trainable_parameters() == model.trainable_parameters()
    assert not read.training
    saved = load_file(tmp_path / "model.safetensors")
    table = "language_model.model.embed_tokens.weight"
    assert {n for n in saved if not n.startswith("connector.")} == (
        {"new_rows", table} if train_embeddings == "all" else {"new_rows"}
    )


def test_checkpoints_share_frozen_parts_and_can_be_moved_with_them(
    make_parts, make_tokenizer, tmp_path
):
    text_model, encoder, first, predictor = make_parts()
    second = make_connector({**first.config, "num_queries": 5})
    home = tmp_path / "home"
    models = {}
    for name, connector in {"first": first, "second": second}.items():
        parts = (text_model, encoder, connector, predictor)
        models[name] = MoleculeLM.from_parts(*parts, tokenizer=make_tokenizer()).eval()
        models[name].save_pretrained(
            home / name, save_frozen=name == "first", frozen_folder=home, dtype=torch.bfloat16
        )
    part = json.loads((home / "second" / "manifest.json").read_text())["parts"]["language_model"]
    assert part["path"] == "../language_model"
    assert not (home / "second" / "tokenizer.json").exists()
    shutil.move(home, tmp_path / "moved")
    for name, model in models.items():
        read = MoleculeLM.from_pretrained(tmp_path / "moved" / name)
        assert {p.dtype for p in read.parameters()} == {torch.float32}
        rounded = {n: x.bfloat16() for n, x in model.state_dict().items() if x.is_floating_point()}
        model.load_state_dict(rounded, strict=False)
        inputs = read.processor(TEXTS, MOLECULES)
        torch.testing.assert_close(read(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


def test_frozen_parts_of_one_kind_can_be_side_by_side(make_parts, make_tokenizer, tmp_path):
    text_model, encoder, connector, predictor = make_parts()
    torch.manual_seed(1)
    other = make_encoder(encoder.config).eval()
    for name, graph_encoder in {"graph_encoder": encoder, "other": other}.items():
        parts = (text_model, graph_encoder, connector, predictor)
        MoleculeLM.from_parts(*parts, tokenizer=make_tokenizer()).save_pretrained(
            tmp_path / "of" / name,
            save_frozen=True,
            frozen_folder=tmp_path,
            frozen_names={"graph_encoder": name},
        )
    manifest = json.loads((tmp_path / "of" / "other" / "manifest.json").read_text())["parts"]
    assert manifest["graph_encoder"]["path"] == "../../other"
    assert manifest["graph_encoder"]["name"] == "other"
    assert manifest["language_model"]["path"] == "../../language_model"
    for name, graph_encoder in {"graph_encoder": encoder, "other": other}.items():
        read = MoleculeLM.from_pretrained(tmp_path / "of" / name).graph_encoder.state_dict()
        state = graph_encoder.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in read.items())


def test_a_checkpoint_holds_no_path_of_this_machine(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "first", save_frozen=True)
    read = MoleculeLM.from_pretrained(tmp_path / "first")
    assert str(tmp_path) in read.config.text_config.name_or_path
    read.save_pretrained(tmp_path / "second")
    assert str(tmp_path) in read.config.text_config.name_or_path
    for file in (tmp_path / "second").glob("*.json"):
        assert str(tmp_path) not in file.read_text(), file.name


def test_a_checkpoint_without_its_frozen_parts_takes_them_as_given(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "connector")
    model.language_model.save_pretrained(tmp_path / "llm")
    save_part(model.graph_encoder, tmp_path / "gin")
    with pytest.raises(FileNotFoundError, match="language_model= is needed"):
        MoleculeLM.from_pretrained(tmp_path / "connector")
    read = MoleculeLM.from_pretrained(
        tmp_path / "connector",
        language_model=tmp_path / "llm",
        graph_encoder=str(tmp_path / "gin"),
        predictor=model.predictor,
        dtype=torch.bfloat16,
    )
    assert read.language_model.dtype == torch.bfloat16
    assert next(read.connector.parameters()).dtype == torch.float32
    inputs = model.processor(TEXTS, MOLECULES)
    given = MoleculeLM.from_pretrained(
        tmp_path / "connector",
        language_model=model.language_model,
        graph_encoder=model.graph_encoder,
        predictor=model.predictor,
    )
    assert torch.equal(given(**inputs).logits, model(**inputs).logits)
    assert read(**inputs).logits.shape == model(**inputs).logits.shape
    read.save_pretrained(tmp_path / "again")
    parts = json.loads((tmp_path / "again" / "manifest.json").read_text())["parts"]
    assert parts["language_model"]["path"] == "../llm"


def test_another_language_model_is_refused_unless_not_verified(make_model, make_parts, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    rest = {"graph_encoder": model.graph_encoder, "predictor": model.predictor}
    other = make_parts()[0]
    with pytest.raises(ValueError, match="language_model given is not the one"):
        MoleculeLM.from_pretrained(tmp_path, language_model=other, **rest)
    MoleculeLM.from_pretrained(tmp_path, language_model=other, **rest, verify=False)


def test_weights_that_do_not_fit_are_named(make_model, make_parts, tmp_path):
    model = make_model()
    rest = {n: getattr(model, n) for n in ("language_model", "graph_encoder", "predictor")}
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["connector_config"]["num_queries"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"of another shape: connector.query_tokens \[1, 2, 16\]"):
        MoleculeLM.from_pretrained(tmp_path, **rest)
    config["connector_config"] = make_parts("llama", "qformer")[2].config | {"num_queries": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unexpected: connector.*crossattention.* more"):
        MoleculeLM.from_pretrained(tmp_path, **rest)
    config["connector_config"]["name"] = "unheard-of"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"known connector, .*'edt_former'.*'unheard-of'"):
        MoleculeLM.from_pretrained(tmp_path, **rest)


def test_a_language_model_with_missing_weights_is_refused(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, save_frozen=True)
    file = tmp_path / "language_model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"language_model in .* is not the one"):
        MoleculeLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: model.norm.weight"):
        MoleculeLM.from_pretrained(tmp_path, verify=False)


def test_a_model_is_built_from_its_config_alone(make_model):
    config = make_model("gpt2", new_tokens=["<end>"]).config
    model = MoleculeLM(type(config).from_dict(config.to_dict()))
    assert isinstance(model, AutoModelForCausalLM._model_mapping[type(config)])
    ids = torch.tensor([[1, 5, config.new_token_ids[0]]])
    assert model(input_ids=ids).logits.shape == (1, 3, 24)


def test_a_trainer_runs_saves_the_connector_and_resumes(make_model, tmp_path, caplog):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = make_model(new_tokens=["<end>"])
    rows = [("<mol> <end> how many ?", [s], "3") for s in ("CCO", "C", "c1ccccc1")]
    rows = [*rows, ("how ?", [], "no")] * 3

    def collate(batch):
        texts, molecules, answers = zip(*batch, strict=True)
        return model.processor(texts, list(molecules), answers=answers)

    def train(steps, **options):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            remove_unused_columns=False,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
        trainer.train(**options)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = train(3)
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(name.startswith(("connector.", "new_rows")) for name in saved)
    assert train(3, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))[-1] == losses[-1]
    assert "missing keys" not in caplog.text
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())


def test_an_encoder_of_other_features_gets_them(make_parts, make_tokenizer, tmp_path):
    text_model, _, connector, predictor = make_parts()
    encoder = PretrainGNN("gcn", layers=2, width=8)
    tokenizer = make_tokenizer()
    model = MoleculeLM.from_parts(text_model, encoder, connector, predictor, tokenizer=tokenizer)
    inputs = model.processor("<mol> how many", "C/C=C/C")
    assert inputs["graph"].features == encoder.features == model.config.features
    expected = model(**inputs).logits
    assert torch.isfinite(model.embed_molecules(["C/C=C/C"]).values).all()
    model.save_pretrained(tmp_path, save_frozen=True)
    again = MoleculeLM.from_pretrained(tmp_path)
    assert again.processor.features == encoder.features
    inputs = again.processor("<mol> how many", "C/C=C/C")
    torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_scheme_of_features_that_the_encoder_does_not_read(make_parts):
    text_model, _, connector, predictor = make_parts()
    parts = {"language_model": text_model, "connector": connector, "predictor": predictor}
    config = MoleculeConfig(text_config=text_model.config)
    with pytest.raises(ValueError, match=r"reads, 'pretrain-gnns-2-2', got 'ogb-9-3'"):
        MoleculeLM(config, graph_encoder=PretrainGNN(layers=2, width=8), **parts)
    with pytest.raises(ValueError, match=r"features must be one of 'ogb-9-3', .* got 'ecfp'"):
        MoleculeConfig(features="ecfp")


@pytest.mark.parametrize("encoder", ["unimol", "blended"])
def test_a_model_with_a_3d_encoder_reads_molecules_and_comes_back(make_model, tmp_path, encoder):
    model = make_model(connector="qformer", encoder=encoder, conformers=ConformerOptions(seed=5))
    inputs = model.processor("<mol> how", "OCC")
    with torch.no_grad():
        expected = model(**inputs).logits
        tokens = model.encode(inputs["graph"], inputs["patches"]).values
    torch.testing.assert_close(model.embed_molecules(["OCC"]).values, tokens)
    model.save_pretrained(tmp_path, save_frozen=True)
    again = MoleculeLM.from_pretrained(tmp_path)
    assert again.processor.conformers == ConformerOptions(seed=5)
    inputs = again.processor("<mol> how", "OCC")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, expected)
    again.train()
    assert not any(module.training for module in again.graph_encoder.modules())


def test_blending_trains_where_it_should_and_is_in_the_checkpoint(make_model, tmp_path):
    model = make_model(connector="qformer", encoder="blended")
    config = {**model.graph_encoder.config, "train_blending": True}
    parts = model.language_model, make_encoder(config), model.connector
    model = MoleculeLM.from_parts(*parts, tokenizer=model.processor.tokenizer)
    trained = [n for n, p in model.graph_encoder.named_parameters() if p.requires_grad]
    assert {name.split(".")[0] for name in trained} == {"ln_graph", "blending_module"}
    model.train()
    assert model.graph_encoder.blending_module.training
    encoders = model.graph_encoder.graph_encoder.values()
    assert not any(m.training for encoder in encoders for m in encoder.modules())
    model.save_pretrained(tmp_path, save_frozen=True)
    with safe_open(tmp_path / "model.safetensors", "pt") as written:
        assert {f"graph_encoder.{name}" for name in trained} < set(written.keys())


@pytest.mark.parametrize("encoder", ["gin", "unimol", "blended"])
def test_llamo_reads_every_encoder_and_a_saved_one_answers_alike(make_model, tmp_path, encoder):
    model = make_model(connector="llamo", encoder=encoder, conformers=ConformerOptions(seed=5))
    inputs = model.processor(TEXTS, MOLECULES)
    before = logits(model, inputs, 0)
    model.save_pretrained(tmp_path, save_frozen=True)
    read = MoleculeLM.from_pretrained(tmp_path)
    assert read.config.connector_config["name"] == "llamo"
    again = read.processor(TEXTS, MOLECULES)
    assert torch.equal(again["graph"].motifs.values, inputs["graph"].motifs.values)
    torch.testing.assert_close(logits(read, again, 0), before, rtol=0, atol=1e-5)
    assert len(read.answer(["CCO", "C"], "how many ?", max_new_tokens=2)) == 2


def test_llamo_without_motifs_in_the_batch_is_told_where_they_come_from(make_model):
    model = make_model(connector="llamo")
    graph = GraphBatch.pack(read_all(FLAT))
    with pytest.raises(ValueError, match="must have the motifs of 4 molecules, got none"):
        model.embed_graph(graph)
    motifs = motif_features(read_all(FLAT))
    tokens = model.embed_graph(GraphBatch.pack(read_all(FLAT), motifs=motifs))
    torch.testing.assert_close(tokens.values, model.embed_molecules(FLAT).values)
