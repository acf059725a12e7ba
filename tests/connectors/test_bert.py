"""A query transformer that starts from a BERT reads a text as transformers' BERT does."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from edt_former.connectors import QFormer, QueryTransformer, load_bert
from edt_former.train.objectives import RepresentationLearning

SIZE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
BERT = BertConfig(
    vocab_size=40, intermediate_size=48, max_position_embeddings=20, initializer_range=0.5, **SIZE
)
OURS = {"width": 24, "layers": 3, "heads": 4, "ffn": 48}
LENGTHS = [5, 1, 12]


def transformer(**options: object) -> QueryTransformer:
    torch.manual_seed(7)
    sizes = {**OURS, "key_width": 8, "text_vocab_size": 41, "text_positions": 30, **options}
    return QueryTransformer(**sizes).eval()


def saved(folder, kind=BertModel, **options):
    torch.manual_seed(0)
    config = BertConfig(**{**BERT.to_dict(), **options})
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.tie_weights()
    model.save_pretrained(folder)
    return model


def texts():
    torch.manual_seed(1)
    ids = torch.randint(40, (sum(LENGTHS),))
    return ids, F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0))


def read_text(model: QueryTransformer, ids, offsets) -> torch.Tensor:
    none = torch.zeros_like(offsets)
    return model(torch.zeros(0, 24), none, torch.zeros(0, 8), none, ids, offsets).text


def padded(bert, ids, offsets):
    pieces = ids.split(LENGTHS)
    rows = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    mask = torch.arange(rows.shape[1]) < torch.tensor(LENGTHS)[:, None]
    return bert(input_ids=rows, attention_mask=mask.long()), mask


@torch.no_grad()
@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForPreTraining])
def test_a_text_alone_is_read_as_transformers_does(tmp_path, kind):
    reference, model = saved(tmp_path, kind), transformer()
    load_bert(model, tmp_path)
    inner = reference if kind is BertModel else reference.bert
    out, mask = padded(inner, *texts())
    found = read_text(model, *texts())
    torch.testing.assert_close(found, out.last_hidden_state[mask], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_word_head_gives_the_logits_of_transformers(tmp_path):
    reference = saved(tmp_path, BertForMaskedLM)
    sizes = {**OURS, "llm_width": None, "encoder_width": 8, "text_vocab_size": 41}
    task = RepresentationLearning(QFormer(sizes), embed_dim=4, begin_id=40).eval()
    last = task.cls.predictions.bias[40].item()
    load_bert(task.connector.Qformer, tmp_path, word_head=task.cls)
    out, mask = padded(reference, *texts())
    words = task.connector.Qformer.bert.embeddings.word_embeddings.weight
    logits = task.cls.predictions(read_text(task.connector.Qformer, *texts()), words)
    torch.testing.assert_close(logits[:, :40], out.logits[mask], rtol=0, atol=1e-4)
    assert task.cls.predictions.bias[40] == last


def test_what_comes_from_where(tmp_path):
    reference, model, before = saved(tmp_path), transformer(), transformer().state_dict()
    load_bert(model, tmp_path)
    after, bert = model.state_dict(), reference.state_dict()
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed == {n for n in after if ".crossattention." not in n}
    for name in ("intermediate.dense", "output.dense", "output.LayerNorm"):
        module, _, rest = name.partition(".")
        for kind in ("weight", "bias"):
            value = bert[f"encoder.layer.2.{name}.{kind}"]
            assert torch.equal(after[f"bert.encoder.layer.2.{name}.{kind}"], value)
            assert torch.equal(after[f"bert.encoder.layer.2.{module}_query.{rest}.{kind}"], value)
    words, at = (
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
    )
    assert torch.equal(after[words][40], before[words][40])
    kind = bert["embeddings.token_type_embeddings.weight"][0]
    torch.testing.assert_close(after[at][:20], bert["embeddings.position_embeddings.weight"] + kind)
    torch.testing.assert_close(after[at][20:], before[at][20:] + kind)


def test_without_a_text_branch_the_queries_start_from_bert(tmp_path):
    saved(tmp_path)
    with_text, alone = transformer(), transformer(text_vocab_size=None)
    for model in (with_text, alone):
        load_bert(model, tmp_path)
    for name, value in alone.state_dict().items():
        if ".crossattention." not in name:
            assert torch.equal(value, with_text.state_dict()[name]), name


def test_shorter_texts_take_the_first_positions(tmp_path):
    reference, model = saved(tmp_path), transformer(text_positions=12)
    load_bert(model, tmp_path)
    with torch.no_grad():
        out, mask = padded(reference, *texts())
        found = read_text(model, *texts())
    torch.testing.assert_close(found, out.last_hidden_state[mask], rtol=0, atol=1e-5)


def test_a_pickled_file_and_the_names_of_old_files(tmp_path):
    saved(tmp_path)
    expected = transformer()
    load_bert(expected, tmp_path)
    weights = BertModel.from_pretrained(tmp_path).state_dict()
    old = {
        f"bert.{n}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): x
        for n, x in weights.items()
    }
    torch.save(old, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    model = transformer()
    load_bert(model, tmp_path)
    assert all(torch.equal(x, expected.state_dict()[n]) for n, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 32, "ffn": 48}, "hidden_size .* must be 32, got 24"),
        ({"layers": 2}, "num_hidden_layers .* must be 2, got 3"),
        ({"heads": 3}, "num_attention_heads .* must be 3, got 4"),
        ({"ffn": 24}, "intermediate_size .* must be 24, got 48"),
        ({"text_vocab_size": 39}, r"word_embeddings.weight is \[40, 24\], .* fit \[39, 24\]"),
    ],
)
def test_another_size_is_refused(tmp_path, options, message):
    saved(tmp_path)
    model = transformer(**options)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_bert(model, tmp_path)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_act", "relu"), ("layer_norm_eps", 1e-5), ("model_type", "roberta")],
)
def test_another_kind_is_refused(tmp_path, name, value):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ValueError, match=f"{name} of the BERT in .* got {value!r}"):
        load_bert(transformer(), tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    model = saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = model.state_dict()
    del weights["encoder.layer.1.attention.self.key.bias"]
    torch.save({**weights, "adapter.weight": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"key.bias is missing; adapter.weight is unexpected"):
        load_bert(transformer(), tmp_path)


def test_a_head_that_is_not_there(tmp_path):
    saved(tmp_path)
    sizes = {**OURS, "llm_width": None, "encoder_width": 8, "text_vocab_size": 41}
    task = RepresentationLearning(QFormer(sizes), embed_dim=4)
    with pytest.raises(ValueError, match=r"cls.predictions.bias is missing"):
        load_bert(task.connector.Qformer, tmp_path, word_head=task.cls)


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_bert(transformer(), tmp_path)
