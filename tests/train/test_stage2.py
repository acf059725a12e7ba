"""The second stage and its language model: labels, what trains, what comes back and answers."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edt_former.data import PreparedData, PrepareOptions, Row, prepare
from edt_former.language.manifest import Manifest
from edt_former.model import MoleculeLM
from edt_former.processor import load_tokenizer
from edt_former.train.config import QuestionConfig
from edt_former.train.conversations import ConversationBatch, question_of
from edt_former.train.language import train_language_model
from edt_former.train.stage1 import train_stage1
from edt_former.train.stage2 import train_stage2
from edt_former.train.trainer import ConnectorTrainer
from tests.train import runs
from tests.train.test_stage1 import stop_at

pytest.importorskip("accelerate", reason="training needs accelerate")
pytestmark = pytest.mark.usefixtures("as_shipped")


@pytest.fixture(scope="module")
def parts(prepared_data, tmp_path_factory, miniature):
    """A language model and a connector of the first stage."""
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_former.shipped.folder", lambda: miniature)
        training = {"steps": 100, "batch_size": 16, "learning_rate": 1e-2, "save_every": 50}
        size = {"width": 32, "layers": 2, "ffn": 64}
        made = train_language_model(
            runs.language(folder / "lm", prepared_data, training=training, **size)
        )
        stage1 = train_stage1(runs.stage1(folder / "stage1", prepared_data))
    return made, stage1


def test_the_language_model_learns_its_texts(parts):
    model, _ = parts
    values = runs.losses(model.parent)
    assert values[-1] < 0.5 * values[0]
    tokenizer = load_tokenizer(model)
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    language_model = AutoModelForCausalLM.from_pretrained(model)
    text = "question: Describe the molecule. answer: a chain of carbon carbon oxygen ."
    ids = tokenizer(text, return_tensors="pt").input_ids
    other = ids[:, torch.randperm(ids.shape[1])]
    with torch.no_grad():
        likely, unlikely = (language_model(input_ids=x, labels=x).loss for x in (ids, other))
    assert likely < unlikely - 1


@pytest.fixture(scope="module")
def whole(parts, prepared_data, tmp_path_factory, miniature):
    """A run that nobody stopped, on the connector of the first stage."""
    out = tmp_path_factory.mktemp("whole") / "run"
    language_model, stage1 = parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_former.shipped.folder", lambda: miniature)
        train_stage2(
            runs.stage2(
                out, prepared_data, language_model, stage1=str(stage1), new_tokens=["<end>"]
            )
        )
    return out


def test_a_checkpoint_is_the_connector_and_where_the_rest_is(whole, parts):
    saved = load_file(whole / "model/model.safetensors")
    assert all(name.startswith(("connector.", "new_rows")) for name in saved)
    trained = json.loads((whole / "trainable.json").read_text())
    assert sum(x.numel() for x in saved.values()) == trained["total"]
    manifest = Manifest.read(whole / "model")
    assert set(manifest.parts) == {"language_model", "graph_encoder", "predictor"}
    assert manifest.folder("language_model") == parts[0].resolve()
    assert not any("text" in name or "word_embeddings" in name for name in saved)


def test_the_connector_of_the_first_stage_goes_on(parts, prepared_data, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        ConnectorTrainer, "run", lambda self: started.append(self.whole_model) or self.out
    )
    train_stage2(runs.stage2(tmp_path, prepared_data, parts[0], stage1=str(parts[1])))
    before = load_file(parts[1] / "connector/model.safetensors")
    state = started[0].connector.state_dict()
    new = {name for name in state if name not in before}
    assert new == {"llm_proj.weight", "llm_proj.bias"}
    assert all(torch.equal(state[name], before[name]) for name in state.keys() - new)
    left = {name for name in before if name not in state}
    assert left and all("embeddings" in n or ".intermediate." in n or ".output." in n for n in left)


def test_the_model_comes_back_and_answers(whole):
    model = MoleculeLM.from_pretrained(whole / "model")
    answers = model.answer(["CCO", "CCN"], "Describe the molecule.", max_new_tokens=8)
    assert all(answer.startswith("a") for answer in answers), answers


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_that_was_stopped_goes_on_to_the_digit(
    whole, parts, tmp_path, prepared_data, monkeypatch, step
):
    options = {"stage1": str(parts[1]), "new_tokens": ["<end>"]}
    config = runs.stage2(tmp_path, prepared_data, parts[0], **options)
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(KeyboardInterrupt):
            train_stage2(config)
    train_stage2(config)
    assert runs.losses(tmp_path) == runs.losses(whole)


@pytest.mark.parametrize("train_embeddings", ["new_rows", "all", "none"])
def test_embeddings_train_as_declared(parts, tmp_path, prepared_data, train_embeddings):
    """The audit is on, so nothing else has changed."""
    prompt = {"questions": ["<end> Describe the molecule."]}
    options = {"train_embeddings": train_embeddings, "new_tokens": ["<end>"], "prompt": prompt}
    made = train_stage2(runs.stage2(tmp_path, prepared_data, parts[0], **options))
    saved = load_file(made / "model.safetensors")
    table = "language_model.model.embed_tokens.weight"
    before = load_file(parts[0] / "model.safetensors")["model.embed_tokens.weight"]
    assert (table in saved) is (train_embeddings == "all")
    if train_embeddings == "all":
        used = load_tokenizer(parts[0])("Describe the molecule. chain carbon").input_ids
        assert (saved[table] != before).any(1)[used].all()
    names = set(json.loads((tmp_path / "trainable.json").read_text())["parameters"])
    assert ("new_rows" in names) is (train_embeddings != "none")
    again = MoleculeLM.from_pretrained(made)
    assert torch.equal(again.new_rows, saved["new_rows"])


@pytest.mark.parametrize("kind", runs.CONNECTORS)
def test_losses_fall_with_every_connector(parts, tmp_path, prepared_data, kind):
    training = {"steps": 80, "learning_rate": 1e-2, "save_every": 80, "batch_size": 16}
    config = runs.stage2(tmp_path, prepared_data, parts[0], training=training)
    connector = {**runs.CONNECTORS[kind], **runs.SIZE, "dropout": 0.0}
    train_stage2(replace(config, connector=connector))
    values = runs.losses(tmp_path)
    assert sum(values[-15:]) < 0.95 * sum(values[:15]), values


def test_accumulation_equals_one_batch_and_checkpointing_changes_nothing(
    parts, tmp_path, prepared_data
):
    connector = {**runs.CONNECTORS["edt_former"], **runs.SIZE, "dropout": 0.0}
    settings = {
        "a": {},
        "b": {"checkpointing": True},
        "c": {"batch_size": 2, "accumulation": 3},
        "d": {"bf16": True},
    }
    found = {}
    for name, training in settings.items():
        out = tmp_path / name
        train_stage2(
            runs.stage2(out, prepared_data, parts[0], connector=connector, training=training)
        )
        found[name] = runs.losses(out)
    assert found["b"] == pytest.approx(found["a"], rel=1e-5)
    assert found["c"] == pytest.approx(found["a"], rel=1e-5), "means over all tokens of a step"
    assert found["d"] == pytest.approx(found["a"], rel=3e-2) and found["d"] != found["a"]


def test_validation_is_a_perplexity_that_the_run_logs(parts, tmp_path, prepared_data):
    data = {"validation": [str(prepared_data)]}
    config = runs.stage2(
        tmp_path, prepared_data, parts[0], data=data, training={"evaluate_every": 6}
    )
    train_stage2(config)
    (value,) = runs.losses(tmp_path, "eval_loss")
    assert 0 < value < math.log(300)


@pytest.fixture
def rows(tmp_path, as_shipped):
    """A text, a conversation of two turns about two molecules, and one about none."""
    records = [
        {"smiles": "CCO", "text": "a chain of carbon carbon oxygen ."},
        {
            "smiles": ["CCO", "CCN"],
            "conversations": [
                {"user": "Compare <mol> with <mol>.", "assistant": "carbon"},
                {"user": "And?", "assistant": "oxygen"},
            ],
        },
        {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "of"))]},
    ]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare([file], tmp_path / "rows", PrepareOptions(), progress=False)
    data = PreparedData(tmp_path / "rows")
    return [data[i] for i in range(3)]


def said(inputs, tokenizer) -> list[str]:
    labels = inputs["labels"]
    return [tokenizer.decode(row[row >= 0]).strip() for row in labels]


def test_only_what_the_assistant_says_is_learned(whole, rows):
    processor = MoleculeLM.from_pretrained(whole / "model").processor
    batch = ConversationBatch(processor, QuestionConfig(), stored=False)
    inputs = batch(rows)
    tokenizer, eos = processor.tokenizer, processor.tokenizer.eos_token
    assert said(inputs, tokenizer) == [
        f"a chain of carbon carbon oxygen .{eos}",
        f"carbon{eos} oxygen{eos}",
        f"of{eos}",
    ]
    assert inputs["molecule_counts"].tolist() == [1, 2, 0]
    plain = processor.prompt("Describe the molecule.")
    prompt = processor([plain], ["CCO"])["input_ids"][0]
    assert torch.equal(inputs["input_ids"][0, : len(prompt)], prompt), "as it will be asked"


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_labels_follow_a_chat_template(whole, rows):
    processor = MoleculeLM.from_pretrained(whole / "model").processor
    processor.tokenizer.chat_template = TEMPLATE
    batch = ConversationBatch(processor, QuestionConfig(system="Be brief."), stored=False)
    inputs = batch(rows)
    eos = processor.tokenizer.eos_token
    assert said(inputs, processor.tokenizer) == [
        f"a chain of carbon carbon oxygen .{eos}",
        f"carbon{eos}oxygen{eos}",
        f"of{eos}",
    ]
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.startswith(f"<system>Be brief.{eos}<user><mol>")
    processor.tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="must write a turn alike whatever follows"):
        batch(rows)


def test_long_texts_lose_their_end_and_molecules_do_not(whole, rows):
    processor = MoleculeLM.from_pretrained(whole / "model").processor
    batch = ConversationBatch(processor, QuestionConfig(), stored=False)
    full = batch(rows[:1])
    length = full["input_ids"].shape[1]
    short = ConversationBatch(processor, QuestionConfig(), stored=False, max_length=length - 4)
    cut = short(rows[:1])
    assert torch.equal(cut["input_ids"], full["input_ids"][:, :-4])
    assert torch.equal(cut["labels"], full["labels"][:, :-4])
    tiny = ConversationBatch(processor, QuestionConfig(), stored=False, max_length=3)
    with pytest.raises(ValueError, match="the language model reads at most 3"):
        tiny(rows[:1])
    assert processor.max_length == 128, "that of generation stays"


def test_a_row_without_room_is_left_out_aloud(whole, rows, caplog):
    processor = MoleculeLM.from_pretrained(whole / "model").processor
    alone = ConversationBatch(processor, QuestionConfig(), stored=False)(rows[2:])
    length = alone["input_ids"].shape[1]
    short = ConversationBatch(processor, QuestionConfig(), stored=False, max_length=length)
    inputs = short(rows)
    assert torch.equal(inputs["input_ids"], alone["input_ids"])
    assert torch.equal(inputs["labels"], alone["labels"])
    left_out = [record.message for record in caplog.records if "is left out" in record.message]
    assert [message.split(" is left out")[0] for message in left_out] == [
        "row 0 (no id)",
        "row 1 (no id)",
    ]


def test_questions_by_row(rows):
    config = QuestionConfig(questions=("What is {smiles}?", "Describe it."))
    assert question_of(rows[0], config) == "What is CCO?"
    assert question_of(Row(number=3), config) == "Describe it."


def test_errors(parts, tmp_path, prepared_data):
    def config(**changes):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        return runs.stage2(out, prepared_data, parts[0], **changes)

    with pytest.raises(ValueError, match="must be a known connector"):
        train_stage2(config(connector={"name": "none"}))
    with pytest.raises(ValueError, match="graph_encoder must be given"):
        train_stage2(config(graph_encoder=None))
    with pytest.raises(ValueError, match=r"connector: .*'heights'"):
        train_stage2(config(connector={"heights": 2}))
