"""Models spread over the processes of a run (FSDP2), on GPUs or on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from edt_former.train.ranks import world_size

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_SPREAD = StateDictOptions(
    full_state_dict=True, broadcast_from_rank0=True, ignore_frozen_params=True, strict=False
)


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Spreads the parameters of `model` over all processes, in place.

    Layers are gathered one by one as they run, all else at the start. A layer is what can be
    checkpointed: those of transformers, and of the query transformer.

    Args:
        model: the same on every process, on `device`.
        device: of this process.

    Returns:
        The model, for a Trainer that must not wrap it again.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in [m for m in model.modules() if hasattr(type(m), "gradient_checkpointing")]:
        if layer is not model and any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Sharded(nn.Module):
    """A sharded model as a Trainer's wrapped one: it is neither moved nor copied by DDP.

    Args:
        model: what `shard` returned.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the model."""
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients stay where they are inside, for all passes of a step but the last."""
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)


def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters and all buffers, whole, on process 0; all processes must call it."""
    return get_model_state_dict(model, options=_GATHERED)


def spread_trained(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts what `gather_trained` gave, as process 0 has it, back into the processes."""
    set_model_state_dict(model, state, options=_SPREAD)


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state, whole, on process 0; all processes must call it."""
    return get_optimizer_state_dict(model, optimizer, options=_GATHERED)


def spread_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Puts what `gather_optimizer` gave, as process 0 has it, back into the processes."""
    set_optimizer_state_dict(model, optimizer, state, options=_SPREAD)
