"""Two processes (gloo) train as one does with their rows together, sharded or not, and end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edt_former.model import MoleculeLM
from edt_former.train.language import train_language_model
from edt_former.train.stage1 import Stage1Model
from tests.train import processes, runs

pytest.importorskip("accelerate", reason="training needs accelerate")


@pytest.fixture(scope="module")
def both(prepared_data, tmp_path_factory, miniature):
    """All runs: in two processes, and the same in this one."""
    out = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_former.shipped.folder", lambda: miniature)
        patch.setattr("edt_former.train.objectives.draw_negatives", None)
        size = {"width": 32, "layers": 2, "ffn": 64}
        language_model = train_language_model(runs.language(out / "lm", prepared_data, **size))
        processes.fix_negatives()
        processes.stage1(out / "stage1", prepared_data)
        processes.stage2(out / "stage2", prepared_data, language_model)
    path = os.pathsep.join(path for path in sys.path if path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", "0", "--standalone", "-m", "tests.train.processes"]
    done = subprocess.run(
        [*launch, out, prepared_data, language_model, miniature],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("name", ["stage1-ddp", "stage1-sharded"])
def test_two_processes_equal_one_big_batch_in_the_first_stage(both, name):
    for part in ("contrast", "matching", "captioning", "loss", "grad_norm"):
        expected = runs.losses(both / "stage1", part)
        assert runs.losses(both / name, part) == pytest.approx(expected, rel=1e-4), part


@pytest.mark.parametrize("name", ["stage2-ddp", "stage2-sharded", "stage2-summed"])
def test_two_processes_equal_one_big_batch_in_the_second_stage(both, name):
    """The sharded run was stopped at step 3 and went on."""
    for part in ("loss", "grad_norm"):
        expected = runs.losses(both / "stage2", part)
        assert runs.losses(both / name, part) == pytest.approx(expected, rel=1e-4), part


@pytest.mark.parametrize("name", ["text-ddp", "text-sharded"])
def test_a_process_without_molecules_trains_and_evaluates(both, name):
    assert len(runs.losses(both / name)) == 6
    evaluated = runs.losses(both / name, "eval_loss")
    assert len(evaluated) == 2
    assert runs.losses(both / "text-sharded") == pytest.approx(runs.losses(both / "text-ddp"))


def test_a_sharded_model_is_spread(both):
    found = [json.loads((both / f"shards-{rank}.json").read_text()) for rank in (0, 1)]
    for one in found:
        assert one["spread"] == one["all"] > 20
        assert one["own"] < 0.6 * one["whole"]
    assert sum(one["own"] for one in found) == found[0]["whole"]


def test_what_was_sharded_is_saved_whole(both):
    for stage, files in (
        ("stage1", ("connector/model.safetensors", "heads/model.safetensors")),
        ("stage2", ("model.safetensors",)),
    ):
        for file in files:
            expected = load_file(both / stage / "model" / file)
            found = load_file(both / f"{stage}-sharded/model" / file)
            assert found.keys() == expected.keys()
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    Stage1Model.from_pretrained(both / "stage1-sharded/model")
    model = MoleculeLM.from_pretrained(both / "stage2-sharded/model")
    assert len(model.answer("CCO", "Describe the molecule.", max_new_tokens=4)) == 1
