"""The first stage: it learns, saves what it trains, and goes on after any stop."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from edt_former.connectors import Connector, MoleculeTokens, register_connector
from edt_former.connectors import connector as connectors
from edt_former.language.manifest import Manifest
from edt_former.tokens import PatchOptions
from edt_former.train.stage1 import Stage1Model, train_stage1
from edt_former.train.trainer import ConnectorTrainer
from edt_former.train.words import SPECIAL
from tests.train import runs

pytest.importorskip("accelerate", reason="training needs accelerate")
pytestmark = pytest.mark.usefixtures("as_shipped")


@pytest.mark.parametrize("connector", runs.CONNECTORS)
def test_losses_fall(tmp_path, prepared_data, connector):
    training = {"steps": 40, "learning_rate": 1e-2, "save_every": 20, "batch_size": 12}
    config = runs.stage1(
        tmp_path, prepared_data, connector, training=training, connector={"dropout": 0.0}
    )
    train_stage1(config)
    for name in ("loss", "contrast", "captioning"):
        values = runs.losses(tmp_path, name)
        assert len(values) == 40
        assert sum(values[-5:]) < 0.9 * sum(values[:5]), name
    total = [sum(parts) for parts in zip(*(runs.losses(tmp_path, n) for n in PARTS), strict=True)]
    assert runs.losses(tmp_path) == pytest.approx(total, rel=1e-5)
    assert (tmp_path / "loss.png").stat().st_size > 1000


PARTS = ("contrast", "matching", "captioning")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As the process that is killed: sums of torch's products depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(prepared_data, tmp_path_factory, miniature):
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_former.shipped.folder", lambda: miniature)
        train_stage1(runs.stage1(out, prepared_data))
    return out


def test_a_checkpoint_holds_what_is_trained_and_where_the_rest_is(whole, prepared_data, miniature):
    model = whole / "model"
    assert {file.name for file in model.iterdir()} == {
        *("connector", "heads", "words", "manifest.json", "provenance.json")
    }
    manifest = Manifest.read(model)
    assert set(manifest.parts) == {"graph_encoder", "predictor"}
    assert manifest.folder("graph_encoder") == miniature / "graph_encoder"
    provenance = json.loads((model / "provenance.json").read_text())
    assert (provenance["stage"], provenance["step"], provenance["rows"]) == ("stage1", 6, 49)
    assert provenance["config"] == json.loads((whole / "config.json").read_text())
    assert provenance["data"][0]["files"][0]["name"] == "captions.txt"
    trained = json.loads((whole / "trainable.json").read_text())
    saved = sum(
        load_file(model / part / "model.safetensors")[name].numel()
        for part in ("connector", "heads")
        for name in load_file(model / part / "model.safetensors")
    )
    assert saved == trained["total"]
    assert sorted(p.name for p in whole.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    if any((whole / "tensorboard").glob("*")):
        assert len(list((whole / "tensorboard").glob("events.*"))) == 1


def test_the_model_comes_back(whole, prepared_data):
    model = Stage1Model.from_pretrained(whole / "model")
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    saved = load_file(whole / "model/connector/model.safetensors")
    for name, value in model.objective.connector.state_dict().items():
        assert torch.equal(value, saved[name])


def stop_at(step: int, monkeypatch) -> None:
    """Ctrl-C in the middle of a step."""
    run = ConnectorTrainer.training_step

    def stopping(self, *args):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(ConnectorTrainer, "training_step", stopping)


@pytest.mark.parametrize("step", [0, 3, 5])
def test_a_run_that_was_stopped_goes_on_to_the_digit(
    whole, tmp_path, prepared_data, monkeypatch, step
):
    config = runs.stage1(tmp_path, prepared_data)
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(KeyboardInterrupt):
            train_stage1(config)
    # A checkpoint that was being written does not count.
    torn = tmp_path / "checkpoint-900"
    torn.mkdir()
    train_stage1(config)
    assert not torn.exists()
    for name in ("loss", "grad_norm", "learning_rate", *PARTS):
        assert runs.losses(tmp_path, name) == runs.losses(whole, name), name
    for part in ("connector", "heads"):
        mine, other = (
            load_file(run / f"model/{part}/model.safetensors") for run in (tmp_path, whole)
        )
        assert all(torch.equal(mine[name], other[name]) for name in other)


KILLED = """
import os, signal, sys
from pathlib import Path
from edt_former import shipped
from edt_former.train.stage1 import train_stage1
from edt_former.train.trainer import ConnectorTrainer
from tests.train import runs

out, data, miniature = map(Path, sys.argv[1:])
shipped.folder = lambda: miniature
run = ConnectorTrainer.training_step

def dying(self, *args):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(self, *args)

ConnectorTrainer.training_step = dying
train_stage1(runs.stage1(out, data))
"""


def test_a_run_that_was_killed_goes_on_to_the_digit(whole, tmp_path, prepared_data, miniature):
    path = os.pathsep.join(path for path in sys.path if path)
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path, prepared_data, miniature],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert len(runs.losses(tmp_path)) == 5 and not (tmp_path / "model").exists()
    train_stage1(runs.stage1(tmp_path, prepared_data))
    assert runs.losses(tmp_path) == runs.losses(whole)


def test_rows_with_patches_give_the_same(whole, tmp_path, caption_file, miniature):
    from edt_former.data import PrepareOptions, prepare

    options = PrepareOptions(
        patches=PatchOptions(sources=("brics", "entropy")), predictor=miniature / "predictor"
    )
    prepare([caption_file], tmp_path / "data", options, progress=False)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_former.train.molecules.find_patch_sets", lambda *_: seen.append(1))
        train_stage1(runs.stage1(tmp_path / "run", tmp_path / "data"))
    assert seen == [] and runs.losses(tmp_path / "run") == runs.losses(whole)


def test_workers_and_no_balance_and_validation(whole, tmp_path, prepared_data, monkeypatch):
    batches, loader = [], ConnectorTrainer.get_eval_dataloader

    def read(self):
        made = loader(self)
        batches.append(list(made.batch_sampler))
        return made

    monkeypatch.setattr(ConnectorTrainer, "get_eval_dataloader", read)
    data = {"workers": 1, "validation": [str(prepared_data)]}
    config = runs.stage1(tmp_path, prepared_data, data=data, training={"evaluate_every": 3})
    train_stage1(config)
    assert runs.losses(tmp_path) == runs.losses(whole)
    evaluated = runs.losses(tmp_path, "eval_loss")
    assert len(batches) == 2 and batches[0] == batches[1]
    assert sorted(row for batch in batches[0] for row in batch) == list(range(49))
    assert {len(batch) for batch in batches[0]} == {5, 6}
    assert len(evaluated) == 2 and all(0 < value < 20 for value in evaluated)
    parts = [runs.losses(tmp_path, f"eval_{name}") for name in PARTS]
    assert evaluated == pytest.approx([sum(p) for p in zip(*parts, strict=True)], rel=1e-5)


def test_accumulation_checkpointing_and_bfloat16(tmp_path, prepared_data):
    exact = {"connector": {"dropout": 0.0}}
    plain = runs.stage1(tmp_path / "a", prepared_data, **exact)
    again = runs.stage1(tmp_path / "b", prepared_data, **exact, training={"checkpointing": True})
    half = runs.stage1(tmp_path / "c", prepared_data, **exact, training={"bf16": True})
    summed = runs.stage1(
        tmp_path / "d", prepared_data, **exact, training={"batch_size": 3, "accumulation": 2}
    )
    for config in (plain, again, half, summed):
        train_stage1(config)
    expected = runs.losses(tmp_path / "a")
    assert runs.losses(tmp_path / "b") == pytest.approx(expected, rel=1e-5)
    found = runs.losses(tmp_path / "c")
    assert found == pytest.approx(expected, rel=2e-2) and found != expected
    saved = load_file(tmp_path / "c/model/connector/model.safetensors")
    assert all(value.dtype == torch.float32 for value in saved.values())
    captioning = runs.losses(tmp_path / "a", "captioning")
    # Contrast is among the rows of a pass; captions are means over words, pass by pass.
    assert runs.losses(tmp_path / "d", "captioning")[0] == pytest.approx(captioning[0], rel=2e-2)


def test_a_tuned_encoder_is_trained_and_saved(tmp_path, prepared_data, miniature):
    made = train_stage1(runs.stage1(tmp_path, prepared_data, tune_graph_encoder=True))
    tuned = load_file(made / "graph_encoder/model.safetensors")
    before = load_file(miniature / "graph_encoder/model.safetensors")
    assert any(not torch.equal(tuned[name], before[name]) for name in before)
    assert Manifest.read(made).folder("graph_encoder") == made / "graph_encoder"
    model = Stage1Model.from_pretrained(made)
    assert all(torch.equal(x, tuned[n]) for n, x in model.graph_encoder.state_dict().items())


def test_a_bert_is_where_the_text_branch_starts(tmp_path, prepared_data, monkeypatch):
    pieces = [*SPECIAL, "a", "chain", "of", "carbon", "oxygen", "."]
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(vocab_size=len(pieces), intermediate_size=24, **size))
    bert.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert/vocab.txt").write_text("\n".join(pieces) + "\n")
    text = {"bert": str(tmp_path / "bert"), "vocabulary": None}
    stop_at(0, monkeypatch)
    started = []
    monkeypatch.setattr(
        ConnectorTrainer, "run", lambda self: started.append(self.whole_model) or self.out
    )
    train_stage1(runs.stage1(tmp_path / "run", prepared_data, text=text))
    words = started[0].objective.connector.Qformer.bert.embeddings.word_embeddings.weight
    assert words.shape == (len(pieces) + 1, 16)
    assert torch.equal(words[:-1], bert.get_input_embeddings().weight)
    assert started[0].objective.begin_id == len(pieces)
    head = started[0].objective.cls.predictions.transform.dense.weight
    assert torch.equal(head, bert.cls.predictions.transform.dense.weight)


def test_what_is_trained_must_stay_the_same(tmp_path, prepared_data, monkeypatch):
    config = runs.stage1(tmp_path, prepared_data)
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train_stage1(config)
    file = tmp_path / "trainable.json"
    content = json.loads(file.read_text())
    del content["parameters"]["objective.gtm_head.bias"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"now it would train .*: objective\.gtm_head\.bias"):
        train_stage1(config)


def test_a_frozen_encoder_that_moves_ends_the_run(tmp_path, prepared_data, monkeypatch):
    forward = Stage1Model.forward

    def drifting(self, *args, **kwargs):
        self.graph_encoder.molecule_node_model.batch_norms[0].running_mean.add_(1e-3)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Stage1Model, "forward", drifting)
    with pytest.raises(RuntimeError, match=r"changed what is not trained: graph_encoder.*mean"):
        train_stage1(runs.stage1(tmp_path, prepared_data))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, prepared_data):
    training = {"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup": 0}
    with pytest.raises(RuntimeError, match="the loss is nan at step"):
        train_stage1(runs.stage1(tmp_path, prepared_data, training=training))


def test_errors(tmp_path, prepared_data, monkeypatch):
    monkeypatch.setattr(connectors, "_CONNECTORS", dict(connectors._CONNECTORS))

    @register_connector("means")
    class Means(Connector):
        def __init__(self, config):
            super().__init__()
            self.config, self.patch_options = dict(config), PatchOptions(sources=())

        def forward(self, features, patches):
            return MoleculeTokens(features.values, features.offsets)

        def token_counts(self, patch_counts, num_molecules):
            return [1] * num_molecules

    def config(**changes):
        return runs.stage1(tmp_path / str(len(list(tmp_path.iterdir()))), prepared_data, **changes)

    with pytest.raises(ValueError, match=r"needs a connector with a text branch.*'means' is none"):
        train_stage1(config(connector={"name": "means"}))
    with pytest.raises(ValueError, match=r"connector: .*unexpected keyword argument 'wide'"):
        train_stage1(config(connector={"wide": 1}))
    with pytest.raises(FileNotFoundError, match="graph_encoder must be a folder"):
        train_stage1(config(graph_encoder=str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match=r"are not there: no data\.json"):
        train_stage1(config(data={"train": [str(tmp_path / "none")]}))
    with pytest.raises(ValueError, match="must be at most the 49 rows there are, got 64"):
        train_stage1(config(training={"batch_size": 64}))
    with pytest.raises(ValueError, match=r"evaluate_every needs data\.validation"):
        train_stage1(config(training={"evaluate_every": 2}))
    monkeypatch.setattr("edt_former.train.trainer.world_size", lambda: 50)
    with pytest.raises(ValueError, match=r"validation must have a row per process \(50\), got 49"):
        train_stage1(config(data={"validation": [str(prepared_data)]}))
