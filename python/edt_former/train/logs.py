"""What a run says while it trains: lines of JSON, TensorBoard, a picture, a bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG, PLOT, TENSORBOARD = "log.jsonl", "loss.png", "tensorboard"
SECONDS_IN_A_FILE = 30
"""Between two states of a bar that is no terminal's."""

HIDDEN = ("total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second")


class Log(TrainerCallback):
    """Writes what the Trainer logs to `log.jsonl`, one object per line, and plots the losses.

    A run that resumes first takes back the lines behind its checkpoint: every step is there once,
    as if the run had never stopped.

    Args:
        folder: of the run.
        tensorboard: also write events for TensorBoard, where it is installed.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = True) -> None:
        self.folder, self.file = folder, folder / LOG
        self.writer = None
        self.tensorboard = tensorboard and find_spec("tensorboard") is not None
        self.started = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Opens the log at the step from which training goes on."""
        if not state.is_world_process_zero:
            return
        self.started = time.perf_counter()
        if self.file.exists():
            kept = [line for line in read_log(self.file) if line["step"] <= state.global_step]
            partial = self.file.with_name(f"{LOG}.partial")
            partial.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
            os.replace(partial, self.file)
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(
                str(self.folder / TENSORBOARD), purge_step=state.global_step + 1
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Writes a line."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        seconds = round(time.perf_counter() - self.started, 2)
        line = {"step": state.global_step, **logs, "seconds": seconds}
        with self.file.open("a") as file:
            file.write(f"{json.dumps(line)}\n")
        if self.writer is not None:
            for name, value in logs.items():
                self.writer.add_scalar(name, value, state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Plots the losses so far."""
        if state.is_world_process_zero and self.file.exists():
            loss_plot(read_log(self.file)).savefig(self.folder / PLOT, dpi=120)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Plots all of it."""
        self.on_save(args, state, control)
        if self.writer is not None:
            self.writer.close()


class Bar(TrainerCallback):
    """A progress bar with the last losses."""

    def __init__(self, label: str) -> None:
        self.label, self.bar = label, None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begins where training does."""
        if state.is_world_process_zero:
            done = state.global_step
            seldom = 0.1 if sys.stderr.isatty() else SECONDS_IN_A_FILE
            self.bar = tqdm(
                total=state.max_steps,
                initial=done,
                desc=self.label,
                unit="step",
                file=sys.stderr,
                mininterval=seldom,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """One more."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Shows the losses."""
        if self.bar is not None and logs and "loss" in logs:
            shown = {k: v for k, v in logs.items() if k not in ("epoch", "learning_rate")}
            self.bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()}, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Closes it."""
        if self.bar is not None:
            self.bar.close()


class StopAtNaN(TrainerCallback):
    """Ends a run whose loss is no number any more."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Looks at the loss.

        Raises:
            RuntimeError: it is NaN or infinite.
        """
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss} at step {state.global_step}")


def read_log(file: Path | str) -> list[dict[str, float]]:
    """The lines of `log.jsonl`; a line that was cut off by a kill is left out."""
    lines = []
    for text in Path(file).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def loss_plot(lines: Sequence[Mapping[str, float]]) -> Figure:
    """The losses of a log over the steps, those on validation rows dashed.

    >>> log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.5}]
    >>> [line.get_label() for line in loss_plot(log).axes[0].lines]
    ['loss', 'eval_loss']
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    names = _losses(lines)
    trained = [name for name in names if not name.startswith("eval_")]
    for name in names:
        points = [(line["step"], line[name]) for line in lines if name in line]
        part = name.removeprefix("eval_")
        # A loss has one colour, trained or validated.
        color = f"C{trained.index(part) if part in trained else len(trained)}"
        style = "-" if name == part else "--o"
        axes.plot(*zip(*points, strict=True), style, color=color, label=name, lw=1.2, ms=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _losses(lines: Iterable[Mapping[str, float]]) -> list[str]:
    others = ("step", "epoch", "learning_rate", "grad_norm", "seconds", *HIDDEN)
    names = dict.fromkeys(name for line in lines for name in line if name not in others)
    return [name for name in names if not name.endswith("perplexity")]
