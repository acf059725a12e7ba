"""From a table to a model that answers, by commands alone; and how they fail."""

import csv
import json
import math
import shutil

import pytest

from tests.train import runs

for name in ("pyarrow", "accelerate", "yaml"):
    pytest.importorskip(name, reason="edt prepare and train need the train extra")
pytestmark = pytest.mark.usefixtures("as_shipped")


def recipe(path, config) -> str:
    import yaml

    from edt_former.train.config import effective

    content = effective(config)
    del content["kind"]
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture(scope="module")
def made(caption_file, tmp_path_factory, miniature):
    """Data, and the models of every stage, made by commands."""
    from edt_former.cli.main import main

    folder = tmp_path_factory.mktemp("made")
    data = folder / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_former.shipped.folder", lambda: miniature)
        patch.setenv("TQDM_DISABLE", "1")
        assert main(["prepare", str(caption_file), "--out", str(data), "--patches", "entropy"]) == 0
        training = {"steps": 40, "batch_size": 16, "learning_rate": 1e-2, "save_every": 40}
        recipes = {
            "language": runs.language(
                *(folder / "language", data),
                **{"training": {**training, "steps": 100}, "width": 32, "layers": 2, "ffn": 64},
            ),
            "stage1": runs.stage1(folder / "stage1", data, training=training),
            "stage2": runs.stage2(
                *(folder / "stage2", data, folder / "language/model"),
                stage1=str(folder / "stage1/model"),
            ),
        }
        for stage, config in recipes.items():
            file = recipe(folder / f"{stage}.yaml", config)
            assert main(["train", stage, "--config", file]) == 0
    return folder


@pytest.fixture
def vocabulary(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "chain", "of", "carbon", "oxygen"]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, "."]) + "\n")
    return tmp_path / "vocab.txt"


def test_prepare_says_what_came_of_it(edt, caption_file, tmp_path):
    test = tmp_path / "test.smi"
    test.write_text("CCC propane\nc1ccccc1 benzene\n")
    arguments = ("--out", tmp_path / "a", "--overlap", test, "--rows-per-part", 20)
    status, out, _ = edt("prepare", caption_file, *arguments)
    assert status == 0
    assert out == [
        f"49 of 50 rows are usable, in {tmp_path / 'a'}",
        "        1  unclosed ring",
        "here are 1 of the 2 molecules of test.smi (50.0%)",
    ]
    status, out, _ = edt("prepare", caption_file, "--out", tmp_path / "b", "--exclude", test)
    assert out[1:] == ["        1  unclosed ring", "        1  is in test.smi"]


def test_prepare_fails_with_a_clear_line(fails, tmp_path, caption_file):
    out = tmp_path / "out"
    assert fails("prepare", tmp_path / "none.csv", "--out", out).startswith("[Errno 2]")
    assert "sources must be a subset" in fails(
        "prepare", caption_file, "--out", out, "--patches", "x"
    )
    table = tmp_path / "a.csv"
    table.write_text("smiles,y\nCC,1\n")
    assert "has no column 'z'" in fails("prepare", table, "--out", out, "--targets", "z")


def test_the_tuned_model_answers(edt, made):
    model = made / "stage2/model"
    question = "Describe the molecule."
    status, out, _ = edt("describe", "CCO", "--model", model, "--ask", question, "--json")
    assert status == 0
    (answer,) = json.loads("\n".join(out))["answers"]
    assert answer["question"] == question and answer["answer"].startswith("a")


def test_a_recipe_is_checked_and_values_can_be_set(edt, fails, made, tmp_path):
    file = made / "stage1.yaml"
    message = fails("train", "stage1", "--config", file, "--set", "training.step=3")
    assert message == "unknown key training.step, did you mean training.steps?"
    assert "language_model" in fails("train", "stage2", "--config", file)
    out = tmp_path / "run"
    told = ("--out", out, "--set", "training.steps=2", "--set", "training.save_every=2")
    status, printed, _ = edt("train", "stage1", "--config", file, *told)
    assert (status, printed[-1]) == (0, str(out / "model"))
    assert json.loads((out / "config.json").read_text())["training"]["steps"] == 2
    message = fails("train", "stage1", "--config", file, "--out", out)
    assert (
        "has a run that was told otherwise: training.save_every, training.steps differ" in message
    )


def test_a_recipe_of_the_package_has_a_name(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = fails("train", "stage1", "--config", "captions_stage1")
    assert message == "prepared data in data/captions are not there: no data.json"
    message = fails("train", "stage1", "--config", "captions_stage9")
    assert message.startswith("a recipe must be one of captions_language, captions_stage1, ")


def test_eval_retrieves(edt, made, tmp_path):
    results = tmp_path / "scores.json"
    arguments = ("--data", made / "data", "--batch-size", 16, "--rerank", 4, "--out", results)
    status, out, _ = edt("eval", made / "stage1/model", *arguments)
    assert status == 0 and out[0] == "stage 1, 49 rows"
    assert out[1].split() == ["recall@1", "recall@5", "recall@20"]
    assert out[-1].split() == ["chance", "in", "a", "batch", "0.0625", "0.3125", "1.0000"]
    found = json.loads(results.read_text())
    assert len(found["scores"]) == 7 and found["settings"]["data"][0]["usable"] == 49
    with_limit = ("--data", made / "data", "--batch-size", 16, "--limit", 20)
    assert edt("eval", made / "stage1/model", *with_limit)[1][0] == "stage 1, 20 rows"


def test_eval_captions_beside_baselines(edt, made, tmp_path, vocabulary):
    pytest.importorskip("nltk", reason="scores of captions need the eval extra")
    data, results, texts = made / "data", tmp_path / "scores.json", tmp_path / "texts.csv"
    status, out, _ = edt(
        *("eval", made / "stage2/model", "--data", data, "--known", data, "--limit", 12),
        *("--vocabulary", vocabulary, "--out", results, "--texts", texts, "--max-new-tokens", 16),
    )
    assert status == 0 and out[0] == "language model with molecules, 12 rows"
    found = json.loads(results.read_text())
    scores = found["scores"]
    assert list(scores) == [
        *("perplexity, own molecule", "perplexity, another's molecule", "captions"),
        *("captions, nearest neighbour", "captions, any caption"),
    ]
    assert scores["captions, nearest neighbour"]["bleu2"] > 0.8, "itself, or a longer chain"
    assert 0 < scores["captions"]["bleu2"] < 1
    assert scores["perplexity, own molecule"][""] > 1
    assert found["settings"]["decoding"] == {"max_new_tokens": 16, "num_beams": 1}
    assert found["settings"]["questions"] == ["Describe the molecule."]
    rows = list(csv.DictReader(texts.open()))
    assert len(rows) == 12 and set(rows[0]) == {"id", "true", "said"}
    if scores["captions"]["meteor"] is None:
        assert out[-1].startswith("meteor: WordNet is not there")


def test_eval_of_a_file_and_of_nothing(edt, fails, made, tmp_path, vocabulary):
    pytest.importorskip("nltk", reason="scores of captions need the eval extra")
    file = tmp_path / "said.txt"
    file.write_text("SMILES\tground truth\toutput\nCC\ta chain of carbon .\ta chain of carbon .\n")
    status, out, _ = edt("eval", file, "--vocabulary", vocabulary)
    assert status == 0 and out[0] == "captions, 1 rows" and out[2].split()[1] == "1.0000"
    assert "--vocabulary is needed" in fails("eval", file)
    assert "--data is needed" in fails("eval", made / "stage1/model")
    stage2 = ("eval", made / "stage2/model", "--data", made / "data")
    assert "limit must be at least 1, got 0" in fails(*stage2, "--limit", 0)
    assert "beams must be at least 1, got 0" in fails(*stage2, "--beams", 0)
    no_words = ("--texts", tmp_path / "texts.csv", "--limit", 2)
    assert "--texts needs captions" in edt(*stage2, *no_words)[2][-1]
    odd = tmp_path / "odd.txt"
    odd.write_text("a\nb\n")
    assert f"{odd} is no vocabulary" in fails(*stage2, "--vocabulary", odd)
    assert "must be a model that edt train made" in fails("eval", tmp_path, "--data", made / "data")
    file.write_text("a\tb\n")
    assert "has no column 'ground truth'" in fails("eval", file, "--vocabulary", vocabulary)


def test_finetune_a_head_and_evaluate_it(edt, fails, made, tmp_path, miniature):
    pytest.importorskip("sklearn", reason="scores of properties need the eval extra")
    table = tmp_path / "sizes.csv"
    table.write_text("smiles,size\n" + "".join(f"{'C' * n},{n}\n" for n in range(1, 25)))
    data = tmp_path / "sizes"
    assert edt("prepare", table, "--out", data, "--targets", "size")[0] == 0
    config = runs.finetune(
        *(tmp_path / "run", data, miniature / "edt_former"), head={"kind": "regression"}
    )
    status, _, _ = edt("train", "finetune", "--config", recipe(tmp_path / "f.yaml", config))
    assert status == 0
    texts = tmp_path / "predicted.csv"
    status, out, _ = edt("eval", tmp_path / "run/model", "--data", data, "--texts", texts)
    assert status == 0 and out[0] == "properties, 24 rows"
    rows = list(csv.DictReader(texts.open()))
    assert [float(row["true size"]) for row in rows] == list(range(1, 25))
    assert all(math.isfinite(float(row["predicted size"])) for row in rows)
    assert "has a property head" in fails("describe", "CCO", "--model", tmp_path / "run/model")
    assert out[2].startswith("size") and out[3].startswith("size, training mean")
    assert float(out[3].split()[3]) == pytest.approx(6.0), "of 1 to 24, from their mean"


def test_inspect_names_parts_and_provenance(edt, made):
    status, out, _ = edt("inspect", made / "stage2/model", "--verify")
    assert status == 0
    text = "\n".join(out)
    for part in ("language_model", "graph_encoder", "predictor"):
        assert any(line.startswith(part) and "verified" in line for line in out), part
    assert "trained by its run: " in text and "stage: stage2, step 6, 49 rows of data" in text
    status, out, _ = edt("inspect", made / "stage1/model", "--json")
    found = json.loads("\n".join(out))
    assert {part["where"] for part in found["parts"]} == {"connector", "heads"}
    trained = json.loads((made / "stage1/trainable.json").read_text())["total"]
    assert found["trained"] == trained == sum(part["values"] for part in found["parts"])
    assert found["provenance"]["config"]["training"]["steps"] == 40


def test_inspect_sees_what_is_missing(edt, fails, made, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(made / "stage2/model", model)
    content = json.loads((model / "manifest.json").read_text())
    content["parts"]["graph_encoder"]["path"] = "nowhere"
    content["parts"]["predictor"]["sha256"] = "0" * 64
    predictor = (made / "stage2/model" / content["parts"]["predictor"]["path"]).resolve()
    content["parts"]["predictor"]["path"] = str(predictor)
    (model / "manifest.json").write_text(json.dumps(content))
    status, out, _ = edt("inspect", model, "--verify")
    assert status == 1
    states = {line.split()[0]: line for line in out if line.startswith(("graph", "predictor"))}
    assert "missing" in states["graph_encoder"] and "another one" in states["predictor"]
    (tmp_path / "empty").mkdir()
    assert "neither weights nor a manifest.json" in fails("inspect", tmp_path / "empty")
