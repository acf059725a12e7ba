"""What the processes of a training run know of each other's batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from edt_former.extras import need


def start_processes() -> None:
    """Connects the processes that torchrun or accelerate started; nothing where there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        accelerate = need("accelerate", extra="train", purpose="training with several processes")
        accelerate.PartialState(cpu=not torch.cuda.is_available())


def end_processes() -> int:
    """Disconnects them; which one this was."""
    this = rank()
    if world_size() > 1:
        dist.destroy_process_group()
    return this


@contextmanager
def main_first() -> Iterator[None]:
    """Process 0 is inside first, the others when it has left."""
    if world_size() > 1 and rank() > 0:
        dist.barrier()
    yield
    if world_size() > 1 and rank() == 0:
        dist.barrier()


def world_size() -> int:
    """How many processes train together; 1 where none was started for it.

    >>> world_size()
    1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """The rows [n_r, ...] of every rank r, end to end, with their gradients.

    The gradient of a rank's rows is the sum over all ranks of what each rank's loss says of them,
    so what follows may differ from rank to rank.

    Returns:
        [sum n_r, ...] and how many rows each rank has, int64 [ranks] on the CPU.

    >>> gather_rows(torch.ones(2, 3))[1]
    tensor([2])
    """
    if world_size() == 1:
        return values, torch.tensor([len(values)])
    counts = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(values)], device=values.device))
    counts = torch.cat(counts).cpu()
    return _GatherRows.apply(values, counts), counts


def global_share(count: int) -> float:
    """What a mean over `count` items of this rank is multiplied with, before ranks are averaged,
    so that the result is the mean over the items of all ranks.

    >>> global_share(7)
    1.0
    """
    if world_size() == 1:
        return 1.0
    total = torch.tensor([float(count)], device=_device())
    dist.all_reduce(total)
    return count * world_size() / float(total)


def _device() -> torch.device:
    """Where the backend of the processes communicates."""
    backend = dist.get_backend()
    return torch.device("cuda" if "nccl" in backend else "cpu")


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, counts: Tensor) -> Tensor:
        ctx.counts = counts
        longest = int(counts.max())
        padded = values.new_zeros(longest, *values.shape[1:])
        padded[: len(values)] = values
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        return torch.cat([part[:n] for part, n in zip(found, counts.tolist(), strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        # Every rank sums all of it and takes its own: gloo has no reduce-scatter.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        first = int(ctx.counts[: rank()].sum())
        return gradient[first : first + int(ctx.counts[rank()])], None
