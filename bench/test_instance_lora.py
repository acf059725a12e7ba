"""Low-rank adapters of their own for every prompt against batched products, padded if need be."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import edt_kernels
from bench.contest import OURS, PACKED, Layout, Task, Work, compiled
from bench.layouts import padded
from bench.workloads import rows
from edt_kernels import offsets_from_lengths

PROMPTS, LENGTH, WIDTH = 16, 128, 2048
TYPES = "qkvom"
"""The linear layers of a transformer layer that MoRA adapts; q, k and v read the same rows."""


def two_einsums(x: Tensor, a: Tensor, b: Tensor, base: Tensor) -> Tensor:
    """As the published program writes it: x and base [B, L, d], B expanded to every prompt."""
    up = b.T.expand(len(a), -1, -1)
    return base + torch.einsum("blr,brd->bld", torch.einsum("bld,bdr->blr", x, a), up)


def two_products(x: Tensor, a: Tensor, b: Tensor, base: Tensor) -> Tensor:
    """The fewest passes that torch has: the second product adds to the base as it writes."""
    shrunk = torch.bmm(x, a).flatten(0, 1)
    return torch.addmm(base.flatten(0, 1), shrunk, b.T).view_as(base)


def operands(count: int, rank: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """x, a, b and base of `count` rows, of sizes that a model has."""
    draw = partial(rows, dtype=dtype)
    a = draw(PROMPTS, WIDTH, rank, seed=seed + 2) / WIDTH**0.5
    b = draw(WIDTH, rank, seed=seed + 3) / rank**0.5
    return [draw(count, WIDTH, seed=seed + 1), a, b, draw(count, WIDTH, seed=seed + 4)]


def work(inputs: list[Tensor], *, backward: bool) -> Work:
    """Two products forward and four backward; the gradient of the base is that of the output."""
    x, a, b, base = inputs
    forward = x.nbytes + a.nbytes + b.nbytes + 2 * base.nbytes
    gradients = base.nbytes + 2 * (x.nbytes + a.nbytes + b.nbytes)
    return Work(
        forward + backward * gradients,
        (3 if backward else 1) * 2 * len(x) * a.shape[2] * (x.shape[1] + base.shape[1]),
    )


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_prompts(contest, dtype, backward, rank, ragged):
    lengths = torch.full((PROMPTS,), LENGTH)
    if ragged:  # from an eighth to fifteen eighths, the mean is the same
        lengths = (LENGTH * torch.linspace(0.125, 1.875, PROMPTS)).round().long()
    offsets = offsets_from_lengths(lengths)
    inputs = operands(int(offsets[-1]), rank, dtype)
    batch = padded(offsets) if ragged else Layout(lambda x: x.unflatten(0, (PROMPTS, -1)), _flat)

    def formula(x: Tensor, a: Tensor, b: Tensor, base: Tensor) -> Tensor:
        return batch.back(two_einsums(batch.into(x), a, b, batch.into(base)))

    task = Task.of(formula, inputs, backward=backward)
    layouts = {"inputs": [batch, PACKED, PACKED, batch], "outputs": [batch]}
    contest(
        "instance_lora",
        f"{PROMPTS} {'ragged' if ragged else 'equal'} prompts, r={rank}",
        task,
        [
            task.contender(
                OURS, lambda x, a, b, base: edt_kernels.instance_lora(x, a, b, offsets, base=base)
            ),
            task.contender("two einsums", two_einsums, **layouts),
            task.contender("bmm, addmm", two_products, **layouts),
            task.contender("compiled", compiled(two_einsums), optional=True, **layouts),
        ],
        work=work(inputs, backward=backward),
        goals={"two einsums": 1.5, "bmm, addmm": 1.5} if backward else None,
    )


@pytest.mark.parametrize("rank", [16, 64])
def test_a_step_of_decoding(contest, dtype, rank):
    """One row per prompt, the five types of a layer at once."""
    offsets = torch.arange(PROMPTS + 1)
    layers = [operands(PROMPTS, rank, dtype, seed=10 * k) for k in range(len(TYPES))]
    for layer in layers[1:3]:
        layer[0] = layers[0][0]
    inputs = [x for layer in layers for x in layer]

    def columns(tensors: tuple[Tensor, ...]) -> list[list[Tensor]]:
        return [list(tensors[k :: len(layers[0])]) for k in range(len(layers[0]))]

    def in_one_call(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, a, b, base = columns(tensors)
        return tuple(edt_kernels.instance_lora_many(x, a, b, offsets, base=base))

    def one_by_one(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            edt_kernels.instance_lora(x, a, b, offsets, base=base)
            for x, a, b, base in zip(*columns(tensors), strict=True)
        )

    def by(form, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            form(x.unsqueeze(1), a, b, base.unsqueeze(1)).squeeze(1)
            for x, a, b, base in zip(*columns(tensors), strict=True)
        )

    task = Task.of(partial(by, two_einsums), inputs, backward=False)
    needed = [work(layer, backward=False) for layer in layers]
    contest(
        "instance_lora_many",
        f"a step of {PROMPTS} prompts, r={rank}",
        task,
        [
            task.contender(OURS, in_one_call),
            task.contender("two einsums", partial(by, two_einsums)),
            task.contender("bmm, addmm", partial(by, two_products)),
            task.contender("one call per type", one_by_one),
        ],
        work=Work(sum(w.bytes for w in needed), sum(w.flops for w in needed)),
        goals={"two einsums": 1.5},
    )


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)
