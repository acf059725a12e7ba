"""Fine-tuning: adapters alone or with the connector, and heads that predict properties."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edt_former.chem import read_molecule
from edt_former.data import Columns, PreparedData, PrepareOptions, prepare
from edt_former.language.manifest import Manifest
from edt_former.model import MoleculeLM
from edt_former.train.finetune import finetune
from edt_former.train.molecules import MoleculeBatch
from edt_former.train.properties import PropertyModel
from tests.conftest import WRITTEN
from tests.train import runs
from tests.train.test_stage1 import stop_at

pytest.importorskip("accelerate", reason="training needs accelerate")
pytestmark = pytest.mark.usefixtures("as_shipped")

LORA = {"rank": 2, "alpha": 8, "dropout": 0.1}


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="LoRA needs peft")


def trained(out) -> set[str]:
    return set(json.loads((out / "trainable.json").read_text())["parameters"])


@pytest.mark.usefixtures("peft")
@pytest.mark.parametrize("train_connector", [True, False])
def test_adapters_train_and_come_back(tmp_path, prepared_data, miniature, train_connector):
    model = miniature / "edt_former"
    config = runs.finetune(
        tmp_path, prepared_data, model, lora=LORA, train_connector=train_connector
    )
    made = finetune(config)
    names = trained(tmp_path)
    assert {n.split(".")[0] for n in names} == {"language_model"} | (
        {"connector"} if train_connector else set()
    )
    assert all(".lora_" in n or n.startswith("connector.") for n in names)
    saved, before = load_file(made / "model.safetensors"), load_file(model / "model.safetensors")
    moved = {n for n in before if not torch.equal(saved[n], before[n])}
    assert bool(moved) is train_connector
    assert any(x.any() for n, x in saved.items() if "lora_B" in n)

    again = MoleculeLM.from_pretrained(made)
    assert again.config.lora["rank"] == 2 and not again.training
    inputs = again.processor(["<mol> how many rings does it have ?"], ["CCO"])
    with torch.no_grad():
        logits = again(**inputs).logits
        again.language_model.disable_adapter_layers()
        without = again(**inputs).logits
    assert not torch.allclose(logits, without, atol=1e-6)
    assert len(again.answer("CCO", "how many rings does it have?", max_new_tokens=3)) == 1
    if not train_connector:
        plain = MoleculeLM.from_pretrained(model)
        with torch.no_grad():
            torch.testing.assert_close(plain(**inputs).logits, without)


@pytest.mark.usefixtures("peft")
def test_adapters_resume_to_the_digit(tmp_path, prepared_data, miniature, monkeypatch):
    model = miniature / "edt_former"
    finetune(runs.finetune(tmp_path / "whole", prepared_data, model, lora=LORA))
    config = runs.finetune(tmp_path / "stopped", prepared_data, model, lora=LORA)
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    finetune(config)
    assert runs.losses(tmp_path / "stopped") == runs.losses(tmp_path / "whole")


@pytest.mark.usefixtures("peft")
def test_a_model_with_adapters_is_saved_with_a_plain_language_model(
    tmp_path, prepared_data, miniature
):
    made = finetune(
        runs.finetune(tmp_path / "run", prepared_data, miniature / "edt_former", lora=LORA)
    )
    model = MoleculeLM.from_pretrained(made)
    model.save_pretrained(tmp_path / "whole", save_frozen=True)
    base, shipped = (
        load_file(folder / "language_model/model.safetensors")
        for folder in (tmp_path / "whole", miniature)
    )
    assert base.keys() == shipped.keys()
    assert all(torch.equal(base[name], shipped[name]) for name in base)
    parts = Manifest.read(tmp_path / "whole").parts
    assert parts["language_model"].sha256 == Manifest.read(made).parts["language_model"].sha256
    again = MoleculeLM.from_pretrained(tmp_path / "whole")
    inputs = again.processor(["<mol> rings ?"], ["CCO"])
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="has adapters already"):
        again.add_lora({**LORA, "targets": ["q_proj"]})


def test_the_connector_alone(tmp_path, prepared_data, miniature):
    finetune(runs.finetune(tmp_path, prepared_data, miniature / "qformer_32"))
    assert all(name.startswith("connector.") for name in trained(tmp_path))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Chains with their number of atoms and whether they end in oxygen; some not known."""
    folder = tmp_path_factory.mktemp("numbers")
    rows = [f"{s},{len(s) if i % 9 else ''},{int(s.endswith('O'))}" for i, s in enumerate(WRITTEN)]
    (folder / "numbers.csv").write_text("\n".join(["smiles,size,acid", *rows]) + "\n")
    for name in ("size", "acid"):
        options = PrepareOptions(columns=Columns(targets=(name,)))
        prepare([folder / "numbers.csv"], folder / name, options, progress=False)
    return folder


TRAINING = {"steps": 60, "batch_size": 16, "learning_rate": 1e-2, "save_every": 60}


def predicted(model: PropertyModel, folder) -> tuple[np.ndarray, np.ndarray]:
    data = PreparedData(folder, wants=("targets", "molecule"))
    rows = [data[i] for i in range(len(data))]
    batch = MoleculeBatch(model.graph_encoder, model.connector, model.predictor)
    return model.predict(*batch(rows)).numpy()[:, 0], np.array([row.targets[0] for row in rows])


def test_a_head_regresses(tmp_path, numbers, miniature):
    head = {"kind": "regression", "width": 16, "dropout": 0.0}
    config = runs.finetune(
        tmp_path, numbers / "size", miniature / "edt_former", head=head, training=TRAINING
    )
    made = finetune(config)
    assert {n.split(".")[0] for n in trained(tmp_path)} == {"connector", "head"}
    model = PropertyModel.from_pretrained(made)
    found, true = predicted(model, numbers / "size")
    assert len(true) == 42, "rows without a value do not count"
    assert model.options.targets == ("size",)
    assert model.options.mean[0] == pytest.approx(true.mean())
    assert np.abs(found - true).mean() < 0.5 * np.abs(true - true.mean()).mean()
    (one,) = model.predict(
        *MoleculeBatch(model.graph_encoder, model.connector, model.predictor)(
            [PreparedData(numbers / "size")[5]]
        )
    )
    assert one.item() == pytest.approx(found[4], rel=1e-4)
    single = model.predict_molecules(WRITTEN[5])
    assert single.shape == (1, 1) and single.item() == pytest.approx(found[4], rel=1e-4)
    assert read_molecule(WRITTEN[5]).num_atoms == len(WRITTEN[5])


def test_classes_are_0_and_1(tmp_path, numbers, miniature):
    head = {"kind": "classification", "width": 16, "dropout": 0.0}
    config = runs.finetune(tmp_path, numbers / "size", miniature / "edt_former", head=head)
    with pytest.raises(ValueError, match=r"size must be 0 or 1 for classification, got \d"):
        finetune(config)


def test_a_head_classifies_on_a_frozen_connector(tmp_path, numbers, miniature):
    head = {"kind": "classification", "width": 16, "dropout": 0.0}
    config = runs.finetune(
        *(tmp_path, numbers / "acid", miniature / "edt_former"),
        **{"head": head, "train_connector": False, "training": TRAINING},
    )
    made = finetune(config)
    assert {n.split(".")[0] for n in trained(tmp_path)} == {"head"}
    before = load_file(miniature / "edt_former/model.safetensors")
    after = load_file(made / "connector/model.safetensors")
    assert all(torch.equal(before[f"connector.{name}"], x) for name, x in after.items())
    found, true = predicted(PropertyModel.from_pretrained(made), numbers / "acid")
    assert ((found >= 0) & (found <= 1)).all()
    assert found.mean() == pytest.approx(true.mean(), abs=0.05)
    assert found[true == 1].mean() > found[true == 0].mean()
