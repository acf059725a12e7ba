"""MoRA's weight generator: a batch of molecules against one by one, and the cost over their size.

The language model has the shapes of Llama 3.2 1B (16 layers of width 2048, keys and values of 512),
adapters of rank 16 in every fourth layer; generators of two layers of width 512, of which the full
heads, as published, have most of the weights. The published program makes one molecule at a time.
"""

from __future__ import annotations

import statistics
from functools import cache

import pytest
import torch
from torch import Tensor

from bench.contest import interleave, paired_ratio
from edt_former.connectors import MoRA, make_connector
from edt_former.graph import GraphFeatures

LLM = {"llm_width": 2048, "llm_layers": 16, "widths": {"k": (2048, 512), "v": (2048, 512)}}
SIZE = {"rank": 16, "width": 512, "layers": 2, "heads": 16, "ffn": 2048}
MOLECULES, LEAST = 64, 3.0
ATOMS = (5, 10, 30, 100, 300)
AT_A_TIME, FLAT = 16, 0.75
"""Molecules of a batch over sizes; what a small one must cost at least beside a large one."""


@cache
def generator(head: str) -> MoRA:
    torch.manual_seed(0)
    model = make_connector({"name": "mora", **LLM, **SIZE, "head": head})
    return model.eval().requires_grad_(False)


def features(lengths: Tensor) -> GraphFeatures:
    drawn = torch.Generator().manual_seed(1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return GraphFeatures(torch.randn(int(lengths.sum()), 300, generator=drawn), offsets)


def singles(batch: GraphFeatures) -> list[GraphFeatures]:
    parts = batch.values.split(batch.offsets.diff().tolist())
    return [GraphFeatures(part, torch.tensor([0, len(part)])) for part in parts]


@pytest.mark.parametrize("head", ["full", "factorised"])
def test_a_batch_against_one_by_one(benchmark, goal, small, head):
    model = generator(head)
    batch = features(small[0][:MOLECULES])
    each = singles(batch)
    together = model(batch, {})
    for molecule, alone in enumerate(each):
        own = model(alone, {})
        for kind, a in together.a.items():
            torch.testing.assert_close(a[:, molecule], own.a[kind][:, 0], rtol=1e-4, atol=1e-4)
    steps = {
        "together": lambda: model(batch, {}),
        "one by one": lambda: [model(alone, {}) for alone in each],
    }
    seconds = interleave(steps, budget=6.0)
    ratio = paired_ratio(seconds["one by one"], seconds["together"])
    interval = f"[{ratio.low:.2f}, {ratio.high:.2f}]"
    name = f"MoRA's generator, {head} heads, {MOLECULES} molecules: times faster than one by one"
    goal(name, ratio.value, LEAST, interval=interval)
    benchmark.group = "MoRA's generator"
    times = {n: round(1e3 * statistics.median(s) / MOLECULES, 3) for n, s in seconds.items()}
    benchmark.extra_info |= {f"ms per molecule, {name}": value for name, value in times.items()}
    benchmark.pedantic(steps["together"], rounds=3, iterations=1)


def test_the_cost_of_a_molecule_over_its_size(benchmark, goal):
    model = generator("factorised")
    batches = {atoms: features(torch.full((AT_A_TIME,), atoms)) for atoms in ATOMS}
    steps = {str(n): (lambda batch=batch: model(batch, {})) for n, batch in batches.items()}
    seconds = interleave(steps, budget=6.0)
    ratio = paired_ratio(seconds[str(ATOMS[0])], seconds[str(ATOMS[-1])])
    interval = f"[{ratio.low:.2f}, {ratio.high:.2f}]"
    name = f"MoRA's generator: cost at {ATOMS[0]} over that at {ATOMS[-1]} atoms"
    goal(name, ratio.value, FLAT, interval=interval)
    benchmark.group = "MoRA's generator"
    for atoms, times in seconds.items():
        spent = 1e3 * statistics.median(times) / AT_A_TIME
        benchmark.extra_info[f"ms per molecule of {atoms} atoms"] = round(spent, 3)
    benchmark.pedantic(steps[str(ATOMS[-1])], rounds=3, iterations=1)
