"""One training loop for every part of the recipe: seeded, with a bar, resumable at any time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import trange

from edt_former.train.memory import keep_memory

Loss = Callable[[np.random.Generator], tuple[Tensor, dict[str, float]]]


def fit(
    model: nn.Module,
    loss: Loss,
    *,
    label: str,
    checkpoint: Path,
    steps: int,
    lr: float,
    seed: int,
    weight_decay: float = 0.01,
    warmup: float = 0.05,
    clip: float = 1.0,
    save_every: int = 200,
) -> None:
    """Train `model` in place for `steps` steps of AdamW with warm-up and cosine decay.

    Every step draws from a generator seeded by (seed, step), torch's own included, so a run that
    was killed at any moment and started again gives the numbers of a run that was not.

    Args:
        model: its parameters that require a gradient are trained.
        loss: from a generator to (loss, figures to show).
        label: names the progress bar.
        checkpoint: a file; read when it exists, written every `save_every` steps and at the end.
        warmup: share of the steps in which the rate rises from 0 to `lr`.

    Raises:
        ValueError: the checkpoint is of another model, or of a longer run.
    """
    keep_memory()
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1]
    rest = [p for p in parameters if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    first = _resume(checkpoint, model, optimizer)
    if first > steps:
        raise ValueError(f"{checkpoint} is of step {first}, this run has {steps} steps")
    bar = trange(first, steps, desc=label, initial=first, total=steps, unit="step")
    shown: dict[str, float] = {}
    for step in bar:
        torch.manual_seed(seed * 1_000_003 + step)
        value, figures = loss(np.random.default_rng((seed, step)))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        rate = lr * _schedule((step + 1) / steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for name, figure in figures.items():
            shown[name] = 0.95 * shown.get(name, figure) + 0.05 * figure
        if step % 10 == 0:
            bar.set_postfix({name: f"{figure:.3f}" for name, figure in shown.items()})
        if (step + 1) % save_every == 0 or step + 1 == steps:
            _save(checkpoint, model, optimizer, step + 1)


def _schedule(progress: float, warmup: float) -> float:
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": trained_state(model), "optimizer": optimizer.state_dict(), "step": step}
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    differing = sorted(trained_state(model).keys() ^ state["model"].keys())
    if differing:
        raise ValueError(f"{path} is of another model, they differ in {', '.join(differing[:5])}")
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, and all buffers (the statistics of a trained BatchNorm)."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: x for name, x in model.state_dict().items() if name not in frozen}
