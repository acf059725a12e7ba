"""The connector of published size: screening, training steps, memory, molecules in bulk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import connectors
from bench.connectors import Batch
from bench.contest import WrongResultError, relative_error
from bench.gpu.run import Run, Section
from bench.layouts import padded as padded_layout
from bench.workloads import ANCHORS, SCREEN_SMALL, SLOTS, TRAIN_48, Workload
from edt_former.connectors import QFormer

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}
CHECKED = 16  # molecules compared with float64
ROUNDS = 3


def run(run: Run, section: Section) -> None:
    """Forward at W-S, a training step of 48 molecules, its memory."""
    models = _Models(run)
    if "forward, W-S" not in section.done:
        _correct(run, section, models)
    work = {
        "forward, W-S": partial(_forward, run, section, models),
        "training step, W-T 48": partial(_training, run, section, models),
        "memory, W-T 48": partial(_memory, run, section, models),
    }
    section.all(work)


class _Models:
    """EDT-Former's connector and the static Q-Former of its weights, in eval mode."""

    def __init__(self, run: Run) -> None:
        self._device = run.device
        self._changed = {"layers": 1, "ffn": 64} if run.tiny else {}

    def of(self, dtype: torch.dtype, device: str | None = None) -> tuple[QFormer, QFormer]:
        built = connectors.build(dtype, **self._changed)
        dynamic, static = (x.to(device or self._device).eval() for x in built)
        return dynamic, static


def _correct(run: Run, section: Section, models: _Models) -> None:
    """Ragged in both dtypes against padded in float64 on the CPU; raises before a time is taken."""
    workload = TRAIN_48.first(2 if run.tiny else CHECKED)
    layout = padded_layout(workload.query_offsets)
    with torch.no_grad():
        wide, _ = models.of(torch.float64, "cpu")
        truth = layout.back(connectors.padded(wide, Batch.of(workload, torch.float64), None))
        for dtype, allowed in TOLERANCE.items():
            dynamic, _ = models.of(dtype)
            batch = Batch.of(workload, dtype).to(run.device)
            found = connectors.ragged(dynamic, batch)[: len(truth)]
            error = relative_error(found.cpu(), truth)
            if not error <= allowed:
                raise WrongResultError(f"the connector is off by {error:.3g} in {dtype}")
            section.add(f"correct, {dtype}".replace("torch.", ""), **{"largest error": error})


def _forward(run: Run, section: Section, models: _Models) -> None:
    """bfloat16. Padded contenders are timed call by call: each lasts milliseconds."""
    workload = (SCREEN_SMALL.first(2) if run.tiny else SCREEN_SMALL).to(run.device)
    dynamic, static = models.of(torch.bfloat16)
    batch = Batch.of(workload, torch.bfloat16)
    steps = {
        "ours": lambda: connectors.ragged(dynamic, batch),
        "padded 96": lambda: connectors.padded(dynamic, batch, SLOTS),
        "static 32": lambda: connectors.padded(static, batch, ANCHORS),
    }
    with torch.no_grad():
        seconds = _interleaved(run, steps)
        seconds["ours in a graph"] = [run.clock.replayed(steps["ours"]) for _ in range(ROUNDS)]
    median = {name: sorted(all)[len(all) // 2] for name, all in seconds.items()}
    molecules, queries = len(workload.atoms), int(workload.query_offsets[-1])
    ours = median["ours in a graph"]
    share = connectors.flops(workload) / ours / run.ceilings["bf16"]
    section.add(
        f"forward, {workload.name}, bf16",
        **{f"{name}, ms": 1e3 * value for name, value in median.items()},
        **{"molecules/s": molecules / ours, "query tokens/s": queries / ours},
        **{"share of the product's rate": share, "seconds": seconds},
    )
    title = f"connector, {workload.name}, bf16, forward in a graph"
    section.goal(f"{title}: molecules/s of padded 96", median["padded 96"] / ours, 2.1)
    more = queries / (ANCHORS * molecules)
    section.goal(f"{title}: query tokens/s of static 32", more * median["static 32"] / ours, 1.0)
    section.goal(f"{title}: share of the product's rate", share, 0.55)


def _training(run: Run, section: Section, models: _Models) -> None:
    """Forward and backward of all weights: call by call, and ours in a graph."""
    steps = _training_steps(run, models)
    seconds = _interleaved(run, steps)
    if run.on_gpu:
        seconds["ours in a graph"] = [run.clock.replayed(steps["ours"]) for _ in range(ROUNDS)]
    median = {name: sorted(all)[len(all) // 2] for name, all in seconds.items()}
    section.add(
        "training step, W-T 48, bf16",
        **{f"{name}, ms": 1e3 * value for name, value in median.items()},
        seconds=seconds,
    )
    for name in ("ours", "ours in a graph"):
        if name in median:
            ratio = median["padded 96"] / median[name]
            section.goal(f"connector, W-T 48, bf16, training step, {name}: padded 96", ratio, 3.0)


def _training_steps(run: Run, models: _Models) -> dict[str, Callable[[], object]]:
    workload: Workload = (TRAIN_48.first(2) if run.tiny else TRAIN_48).to(run.device)
    dynamic, _ = models.of(torch.bfloat16)
    batch = Batch.of(workload, torch.bfloat16)
    weights = list(dynamic.parameters())

    def step(read: Callable[[], Tensor]) -> object:
        tokens = read()
        return torch.autograd.grad(tokens, weights, torch.ones_like(tokens))

    return {
        "ours": partial(step, lambda: connectors.ragged(dynamic, batch)),
        "padded 96": partial(step, lambda: connectors.padded(dynamic, batch, SLOTS)),
    }


def _memory(run: Run, section: Section, models: _Models) -> None:
    """Peak of a training step on top of weights and inputs."""
    if not run.on_gpu:
        section.add("memory, W-T 48", skipped="torch counts the memory of a GPU only")
        return
    peaks = {}
    for name, step in _training_steps(run, models).items():
        step()  # what is allocated once
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before
    ratio = peaks["padded 96"] / peaks["ours"]
    section.add("memory, W-T 48, bf16", **{f"{name}, MB": p / 1e6 for name, p in peaks.items()})
    section.goal("connector, W-T 48, bf16: peak memory of padded 96 over ours", ratio, 1 / 0.45)


def _interleaved(run: Run, steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds by round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 if run.tiny else ROUNDS):
        for name, step in steps.items():
            seconds[name].append(run.clock.launched(step))
    return seconds
