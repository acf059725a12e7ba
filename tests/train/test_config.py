"""What a run is told is checked key by key."""

import json

import pytest

from edt_former.train.config import (
    FinetuneConfig,
    LoraConfig,
    Stage1Config,
    Stage2Config,
    TrainingConfig,
    build,
    effective,
    read_config,
)
from edt_former.train.start import begin
from tests.train import runs

BASE = {
    "out": "runs/a",
    "data": {"train": ["a"]},
    "text": {"vocabulary": 100},
    "connector": {"name": "qformer"},
    "training": {"steps": 10},
}


def refused(kind, content) -> str:
    with pytest.raises(ValueError) as caught:
        build(kind, content)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sede": 1}, "unknown key sede, did you mean seed?"),
        ({"training": {"step": 3}}, "unknown key training.step, did you mean training.steps?"),
        ({"objective": {"tau": 1}}, "unknown key objective.tau, known are embed_dim, "),
        ({"training": {"steps": "many"}}, "training.steps must be an integer, got 'many'"),
        ({"training": {"steps": True}}, "training.steps must be an integer, got True"),
        ({"training": {"bf16": 1}}, "training.bf16 must be true or false, got 1"),
        ({"data": {"train": 3}}, "data.train must be a list, got 3"),
        ({"data": {"train": [3]}}, "data.train[0] must be a text, got 3"),
        ({"data": "a"}, "data must hold keys, got 'a'"),
        ({"training": {"steps": 0}}, "training.steps must be at least 1, got 0"),
        ({"training": {"schedule": "step"}}, "training.schedule must be one of 'cosine', "),
        ({"training": {"log_every": 7}}, "save_every must be a multiple of log_every"),
        ({"text": {"bert": "b"}}, "text must have one of bert and vocabulary"),
        ({"text": {"vocabulary": [1]}}, "text.vocabulary cannot be [1]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_named(changes, message):
    assert message in refused(Stage1Config, runs.merged(BASE, changes))


def test_missing_keys_and_choices():
    assert refused(Stage1Config, {}) == "key out is missing"
    stage2 = {"out": "a", "data": {"train": ["a"]}, "language_model": "b", "training": {"steps": 1}}
    assert "one of stage1 and connector" in refused(Stage2Config, stage2)
    assert "train_embeddings must be one of" in refused(
        Stage2Config, {**stage2, "stage1": "s", "train_embeddings": "some"}
    )
    tuned = {"out": "a", "data": {"train": ["a"]}, "model": "b", "training": {"steps": 1}}
    assert "nothing would be trained" in refused(
        FinetuneConfig, {**tuned, "train_connector": False}
    )
    assert "cannot be given both" in refused(
        FinetuneConfig, {**tuned, "lora": {}, "head": {"kind": "regression"}}
    )
    assert "head.kind must be one of" in refused(FinetuneConfig, {**tuned, "head": {"kind": "x"}})


def test_numbers_lists_and_defaults():
    config = build(Stage1Config, runs.merged(BASE, {"training": {"learning_rate": "1e-4"}}))
    assert config.training.learning_rate == 1e-4 and config.objective.matching == "all"
    assert build(LoraConfig, {"alpha": 16, "targets": "q_proj"}) == LoraConfig(
        alpha=16.0, targets=("q_proj",)
    )


def test_yaml_and_overrides(tmp_path):
    yaml = pytest.importorskip("yaml", reason="recipes in YAML need pyyaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE) + "seed: 3\n")
    told = ["training.steps=20", "training.learning_rate=2e-3", "out=b", 'data.train=["x","y"]']
    config = read_config(Stage1Config, path, told)
    assert (config.seed, config.training.steps, config.out) == (3, 20, "b")
    assert config.training.learning_rate == 2e-3 and config.data.train == ("x", "y")
    with pytest.raises(ValueError, match="must be key=value, got 'steps'"):
        read_config(Stage1Config, path, ["steps"])
    with pytest.raises(ValueError, match=r"out\.a cannot be set: out holds no keys"):
        read_config(Stage1Config, path, ["out.a=1"])
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is no YAML"):
        read_config(Stage1Config, path)
    with pytest.raises(ValueError, match=r"must end in \.yaml, \.yml or \.json"):
        read_config(Stage1Config, __file__)


def test_the_effective_configuration_is_saved_and_must_not_change(tmp_path):
    content = {**BASE, "out": str(tmp_path / "run")}
    config = build(Stage1Config, content)
    out = begin(config)
    saved = json.loads((out / "config.json").read_text())
    assert saved == effective(config)
    assert saved["training"]["weight_decay"] == 0.05, "defaults are in it"
    kind = saved.pop("kind")
    assert kind == "Stage1Config" and build(Stage1Config, saved) == config
    assert begin(config) == out
    other = build(Stage1Config, runs.merged(content, {"training": {"steps": 11}, "seed": 5}))
    with pytest.raises(ValueError, match=r"told otherwise: seed, training\.steps differ"):
        begin(other)


def test_every_recipe_of_the_package_is_valid():
    pytest.importorskip("yaml", reason="recipes in YAML need pyyaml")
    from edt_former.train import recipes

    kinds = {"stage1": Stage1Config, "stage2": Stage2Config, "finetune": FinetuneConfig}
    found = recipes.names()
    assert found
    for name in found:
        kind = next((k for stage, k in kinds.items() if stage in name), None)
        if kind is not None:
            read_config(kind, recipes.path(name))


def test_checkpoints_that_stay():
    with pytest.raises(ValueError, match=r"training\.keep must be at least 2, got 1"):
        TrainingConfig(steps=1, keep=1)
