"""The training loop: a run that was stopped gives the numbers of one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edt_former.train.tiny import loop
from edt_former.train.tiny.loop import fit, trained_state

STEPS = 12


class Killed(Exception):
    pass


def make_model() -> nn.Module:
    """With dropout (torch's generator), batch statistics (buffers) and a frozen last layer."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1)
    )
    model[4].requires_grad_(False)
    return model


def make_loss(model: nn.Module, *, die_at: int | None = None):
    steps = iter(range(1000))

    def loss(rng: np.random.Generator):
        if next(steps) == die_at:
            raise Killed
        x = torch.from_numpy(rng.normal(size=(16, 4))).float()
        value = (model(x) - x.sum(1, keepdim=True)).square().mean()
        return value, {"error": value.item()}

    return loss


def run(checkpoint: Path, *, steps: int = STEPS, die_at: int | None = None, **options) -> nn.Module:
    model = make_model()
    settings = {"label": "toy", "lr": 1e-2, "seed": 5, "save_every": 4, **options}
    loss = make_loss(model, die_at=die_at)
    fit(model, loss, checkpoint=checkpoint, steps=steps, **settings)
    return model


def assert_same(model: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("die_at", [0, 3, 4, 5, 8, 11])
def test_a_run_that_stopped_goes_on_to_the_same_numbers(tmp_path, die_at):
    whole = run(tmp_path / "whole.pt")
    with pytest.raises(Killed):
        run(tmp_path / "cut.pt", die_at=die_at)
    assert_same(run(tmp_path / "cut.pt"), whole)


def test_a_run_may_stop_many_times(tmp_path):
    whole = run(tmp_path / "whole.pt")
    for _ in range(2):
        with pytest.raises(Killed):
            run(tmp_path / "cut.pt", die_at=5)
    assert_same(run(tmp_path / "cut.pt"), whole)


def test_a_finished_run_is_only_read(tmp_path):
    whole = run(tmp_path / "whole.pt")
    assert_same(run(tmp_path / "whole.pt", die_at=0), whole)


def test_numbers_do_not_depend_on_how_often_is_saved_or_on_torchs_generator(tmp_path):
    whole = run(tmp_path / "whole.pt")
    torch.rand(17)
    assert_same(run(tmp_path / "once.pt", save_every=1000), whole)


def test_seeds_give_different_runs(tmp_path):
    first, second = (run(tmp_path / f"{seed}.pt", seed=seed) for seed in (1, 2))
    assert not torch.equal(first[0].weight, second[0].weight)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
import test_loop
from edt_former.train.tiny import loop

save = loop._save
def saved(*args):
    save(*args)
    print("saved", flush=True)
    time.sleep(60)
loop._save = saved
test_loop.run(Path({checkpoint!r}))
"""


def test_a_run_that_was_killed_goes_on_to_the_same_numbers(tmp_path):
    """By the system, without a chance to tidy up."""
    checkpoint = tmp_path / "killed.pt"
    script = KILLED.format(here=str(Path(__file__).parent), checkpoint=str(checkpoint))
    # Sums are rounded as the number of threads says.
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    assert torch.load(checkpoint, weights_only=True)["step"] == 4
    assert_same(run(checkpoint), run(tmp_path / "whole.pt"))


def test_a_half_written_checkpoint_is_never_read(tmp_path, monkeypatch):
    """A write that breaks off leaves the checkpoint before it."""
    whole = run(tmp_path / "whole.pt")
    write, times = torch.save, iter(range(100))

    def break_off(state, path):
        write(state, path)
        if next(times) == 1:
            path.write_bytes(path.read_bytes()[:100])
            raise Killed

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(Killed):
        run(tmp_path / "cut.pt")
    monkeypatch.setattr(torch, "save", write)
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["step"] == 4
    assert_same(run(tmp_path / "cut.pt"), whole)


def test_frozen_parameters_neither_train_nor_are_saved(tmp_path):
    model = run(tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)["model"]
    assert saved.keys() == trained_state(model).keys()
    assert {"0.weight", "1.running_mean", "1.num_batches_tracked"} <= saved.keys()
    assert not any(name.startswith("4.") for name in saved)
    assert torch.equal(model[4].weight, make_model()[4].weight)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run(tmp_path / "run.pt")
    other = nn.Sequential(nn.Linear(4, 8))
    with pytest.raises(ValueError, match=r"run\.pt is of another model, they differ in 1\.bias"):
        fit(
            other, make_loss(other), label="", checkpoint=tmp_path / "run.pt", steps=1, lr=1, seed=0
        )


def test_a_checkpoint_of_a_longer_run_is_refused(tmp_path):
    run(tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"run\.pt is of step 12, this run has 8 steps"):
        run(tmp_path / "run.pt", steps=8)


def test_loss_falls(tmp_path):
    losses = []
    model = make_model()
    inner = make_loss(model)

    def loss(rng):
        value, figures = inner(rng)
        losses.append(value.item())
        return value, figures

    fit(model, loss, label="", checkpoint=tmp_path / "run.pt", steps=150, lr=3e-2, seed=0)
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])


def test_matrices_decay_and_vectors_do_not(tmp_path):
    """With no gradient but decay, lr * decay * weight is what a step takes away."""
    model = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(_):
        return sum(0 * p.sum() for p in model.parameters()), {}

    fit(
        model,
        loss,
        label="",
        checkpoint=tmp_path / "run.pt",
        steps=1,
        lr=0.1,
        seed=0,
        weight_decay=0.5,
        warmup=1.5,
    )
    rate = 0.1 * (1 / 1.5)
    torch.testing.assert_close(model.weight.data, before["weight"] * (1 - rate * 0.5))
    assert torch.equal(model.bias.data, before["bias"])


def test_gradients_are_clipped(tmp_path, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def watched(self):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(torch.cat([g.flatten() for g in grads]).norm().item())
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run(tmp_path / "run.pt", clip=0.125)
    assert len(seen) == STEPS and max(seen) <= 0.125 + 1e-6


def test_rate_rises_then_falls_to_nothing():
    rates = [loop._schedule((step + 1) / 100, 0.05) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(1.0)
    assert np.argmax(rates) == 4
    assert all(a >= b for a, b in pairwise(rates[4:]))
    assert rates[52] == pytest.approx(0.5, abs=0.02) and rates[-1] == pytest.approx(0.0, abs=1e-6)
