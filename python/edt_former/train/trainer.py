"""Hugging Face's Trainer for connectors: nothing frozen is saved, and a run can stop anywhere."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from edt_former.extras import need
from edt_former.language.frozen import read_weights
from edt_former.train.batches import Batches
from edt_former.train.collating import CollateRows
from edt_former.train.config import TrainingConfig
from edt_former.train.logs import Bar, Log, StopAtNaN
from edt_former.train.memory import checkpoint_layers, keep_memory
from edt_former.train.provenance import write_provenance
from edt_former.train.ranks import rank, world_size
from edt_former.train.sharding import (
    Sharded,
    gather_optimizer,
    gather_trained,
    shard,
    spread_optimizer,
    spread_trained,
)
from edt_former.train.trainable import Audit, TrainableSet
from edt_kernels.nn import CrossAttention

CHECKPOINT, COMPLETE = "checkpoint-", "complete"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
MODEL = "model"

Collate = Callable[[list[Any]], Mapping[str, Any]]


class ConnectorTrainer(Trainer):
    """Trains what a run declares, and only that.

    * The run is one pass over `Batches`; every pass draws from (seed, step, pass, process). A run
      that was killed goes on from its last whole checkpoint with the numbers of one that was not.
    * A checkpoint holds what is trained, by the model's own `save_pretrained`, the optimiser and
      the step; nothing frozen. It counts once it is whole.
    * Scalars in the model's output beside the loss are logged with it.

    Args:
        model: gives "loss" from a batch, has `save_pretrained(folder, state_dict=...)`, and
            `read_trained(folder)` unless its weights are in `model.safetensors`.
        collate: from rows to a batch.
        data: rows to train on.
        config: see `TrainingConfig`.
        out: the folder of the run.
        declared: names of the parameters that are trained.
        costs: tokens of every row, by which processes are balanced.
        validation: rows for `evaluate`.
        workers: processes that read and collate rows.
        seed: of everything that is drawn.
        tokenizer: saved beside the weights of a model that does not save its own.
        provenance: what made the model, written beside its weights.
        label: of the progress bar; None shows none.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: the model would train something else than declared.
    """

    def __init__(
        self,
        model: nn.Module,
        collate: Collate,
        data: Dataset,
        config: TrainingConfig,
        out: Path,
        declared: Iterable[str],
        *,
        costs: Sequence[int] | np.ndarray | None = None,
        validation: Dataset | None = None,
        workers: int = 0,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        provenance: Mapping[str, Any] | None = None,
        label: str | None = None,
    ) -> None:
        need("accelerate", extra="train", purpose="training")
        if config.evaluate_every and validation is None:
            raise ValueError("training.evaluate_every needs data.validation, there is none")
        if validation is not None and len(validation) < world_size():
            raise ValueError(
                f"data.validation must have a row per process ({world_size()}), "
                f"got {len(validation)}"
            )
        keep_memory()
        out.mkdir(parents=True, exist_ok=True)
        self.training, self.out, self.seed = config, out, seed
        self.declared, self.workers = set(declared), workers
        self.provenance = dict(provenance or {})
        if config.checkpointing:
            checkpoint_layers(model)
        trainable = TrainableSet.of(model)
        trainable.check(self.declared)
        arguments = _arguments(config, out, seed)
        self.whole_model = model
        self.sharded = config.sharding and world_size() > 1
        if self.sharded:
            model = shard(model.to(arguments.device), arguments.device)
            model.always_encodes = True
        self.passes, self.parts, self.passed = 0, {}, 0
        super().__init__(
            model,
            arguments,
            data_collator=collate,
            train_dataset=data,
            eval_dataset=validation,
            processing_class=tokenizer,
        )
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        callbacks = [_Watch(self, trainable), Log(out), StopAtNaN()]
        for callback in [*callbacks, *([Bar(label)] if label else [])]:
            self.add_callback(callback)
        self.batches = Batches(
            costs if config.balance else None,
            len(data),
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            steps=config.steps,
            seed=seed,
            rank=rank(),
            ranks=world_size(),
        )

    def run(self) -> Path:
        """Trains, from the last whole checkpoint where there is one; the folder of the result."""
        found = last_checkpoint(self.out)
        if rank() == 0:
            _remove_torn(self.out)
        self.train(resume_from_checkpoint=None if found is None else str(found))
        self.save_model(str(self.out / MODEL))
        return self.out / MODEL

    def get_train_dataloader(self) -> DataLoader:
        """All batches of the run."""
        return self._loader(self.train_dataset, batch_sampler=self.batches)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """The validation rows of this process: as many batches on each, of sizes that are equal or
        differ by 1, so that none is a last one of few rows."""
        rows = len(self.eval_dataset)
        steps = -(-rows // (self.training.batch_size * world_size()))
        steps = min(steps, rows // world_size())
        cut = np.array_split(np.arange(rows), steps * world_size())
        batches = [batch.tolist() for batch in cut[rank() :: world_size()]]
        return self._loader(self.eval_dataset, batch_sampler=batches)

    def _loader(self, data: Dataset, **options: Any) -> DataLoader:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return DataLoader(
            data,
            collate_fn=CollateRows(self.data_collator),
            num_workers=self.workers,
            pin_memory=self.args.device.type == "cuda",
            **options,
        )

    def training_step(self, model: nn.Module, inputs: Any, *rest: Any) -> Tensor:
        """As of Trainer, what is drawn depends on the step, the pass and the process alone."""
        self.passed = 0 if self.accelerator.sync_gradients else self.passed + 1
        torch.manual_seed(_seed(self.seed, self.state.global_step, self.passed, rank()))
        return super().training_step(model, inputs, *rest)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        """As of Trainer; scalars beside the loss are remembered for the log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if model.training:
            self.passes += 1
            for name, value in scalars(outputs).items():
                self.parts[name] = self.parts.get(name, 0.0) + value
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As of Trainer, with the means of what was remembered, and the true epochs."""
        if "loss" in logs and self.parts:
            names = sorted(self.parts)
            means = torch.stack([self.parts[name] for name in names]) / self.passes
            means = self.accelerator.reduce(means.to(self.args.device), "mean")
            logs = {**logs, **dict(zip(names, means.tolist(), strict=True))}
            self.parts, self.passes = {}, 0
        logs["epoch"] = self.state.global_step / self.batches.steps_per_epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Means over the validation rows of the loss and of the scalars beside it."""
        model = self.model_wrapped
        model.eval()
        sums: dict[str, Tensor] = {}
        torch.manual_seed(_seed(self.seed, rank()))
        loader = self.get_eval_dataloader()
        counts = [len(batch) for batch in loader.batch_sampler]
        for batch, count in zip(loader, counts, strict=True):
            inputs = self._prepare_inputs(batch)
            outputs = model(**inputs)
            found = {"loss": outputs["loss"].detach(), **scalars(outputs)}
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + count * value.float()
        names = sorted(sums)
        totals = torch.stack([sums[name] for name in names]).to(self.args.device)
        means = (self.accelerator.reduce(totals, "sum") / len(self.eval_dataset)).tolist()
        metrics = {f"eval_{name}": mean for name, mean in zip(names, means, strict=True)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The matrices of linear layers and of attention, which holds some of its own."""
        kinds = (nn.Linear, nn.MultiheadAttention, CrossAttention)
        return [
            f"{name}.{own}"
            for name, module in model.named_modules()
            if isinstance(module, kinds)
            for own, weight in module.named_parameters(recurse=False)
            if weight.dim() == 2
        ]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is trained, by the model's own `save_pretrained`."""
        folder = Path(output_dir or self.args.output_dir)
        state = gather_trained(self.model) if self.sharded else None
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.whole_model.save_pretrained(folder, state_dict=state)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            write_provenance(folder, {**self.provenance, "step": self.state.global_step})

    def _wrap_model(self, model: nn.Module, training: bool = True, **options: Any) -> nn.Module:
        if not self.sharded:
            return super()._wrap_model(model, training, **options)
        self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
        return Sharded(self.model)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if not self.sharded:
            return super()._clip_grad_norm(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        return norm.full_tensor()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            (self.out / f"{CHECKPOINT}{self.state.global_step}" / COMPLETE).touch()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gather_optimizer(self.model, self._bare_optimizer())
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = {}
        if rank() == 0:
            state = torch.load(Path(checkpoint, OPTIMIZER), weights_only=True)
        spread_optimizer(self.model, self._bare_optimizer(), state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER)))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        state = read_trained(self.whole_model, Path(resume_from_checkpoint))
        if self.sharded:
            spread_trained(self.model, state if rank() == 0 else {})
        else:
            self.whole_model.load_state_dict(state, strict=False)

    def _bare_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: what is drawn depends on the step alone."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing, likewise."""


class _Watch(TrainerCallback):
    """Prints and asserts what is trained, and looks after the first step whether it was all."""

    def __init__(self, trainer: ConnectorTrainer, trainable: TrainableSet) -> None:
        self.trainer, self.trainable = trainer, trainable
        self.audit: Audit | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Before the first step of a start."""
        model = self.trainer.whole_model
        if state.is_world_process_zero:
            self.trainable.keep(self.trainer.out)
            tqdm.write(self.trainable.table(model), file=sys.stderr)
        if not self.trainer.sharded:
            TrainableSet.of(model).check(self.trainer.declared)
        self.audit = Audit(model, self.trainer.declared)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After it."""
        if self.audit is not None:
            self.audit.check(self.trainer.whole_model)
            self.audit = None


def scalars(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The single numbers in a model's output beside its loss, without gradients."""
    return {
        name: value.detach().float()
        for name, value in outputs.items()
        if name != "loss" and isinstance(value, Tensor) and value.dim() == 0
    }


def read_trained(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What `save_pretrained` wrote of a model, by the model's names."""
    read = getattr(model, "read_trained", None)
    return dict(read_weights(folder)) if read is None else read(folder)


def last_checkpoint(out: Path) -> Path | None:
    """The whole checkpoint of the highest step in the folder of a run, None for none.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in (10, 20):
    ...         Path(folder, f"checkpoint-{step}").mkdir()
    ...     Path(folder, "checkpoint-10", "complete").touch()
    ...     last_checkpoint(Path(folder)).name
    'checkpoint-10'
    """
    whole = [file.parent for file in out.glob(f"{CHECKPOINT}*/{COMPLETE}")]
    return max(whole, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def _remove_torn(out: Path) -> None:
    """Checkpoints that a kill left half written would count among those that stay."""
    for folder in out.glob(f"{CHECKPOINT}*"):
        if not (folder / COMPLETE).exists():
            shutil.rmtree(folder)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _arguments(config: TrainingConfig, out: Path, seed: int) -> TrainingArguments:
    schedule = config.schedule
    if schedule == "constant" and config.warmup:
        schedule = "constant_with_warmup"
    return TrainingArguments(
        output_dir=str(out),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        save_total_limit=config.keep,
        eval_strategy="steps" if config.evaluate_every else "no",
        eval_steps=config.evaluate_every or None,
        seed=seed,
        report_to=[],
        label_names=["labels"],
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
