"""The connector of published size against the static Q-Former and padding.

Twelve layers of width 768 over 16 of the 256 molecules of C-S and 4 of the 64 of C-L: dense
products, which grow with the tokens, decide, so the ratios do not depend on how many molecules.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from bench import memory
from bench.connectors import Batch, build, flops, padded, ragged
from bench.contest import OURS, Contender, Task, Work
from bench.layouts import padded as padded_layout
from bench.workloads import ANCHORS, LARGE, LAYERS, SLOTS, SMALL, TRAIN_4, Workload, rows
from edt_former.connectors import QFormer

CASES = {"C-S": SMALL.first(16), "C-L": LARGE.first(4), "W-T 4": TRAIN_4}
connectors = cache(build)


def compared(connector: QFormer, grads: Sequence[Tensor]) -> Tensor:
    """The gradients outside the layers and of the first and the last one, as one vector."""
    inner = tuple(f".layer.{i}." for i in range(1, LAYERS - 1))
    names = [name for name, _ in connector.named_parameters()]
    kept = [
        grad.flatten().double()
        for name, grad in zip(names, grads, strict=True)
        if not any(layer in name for layer in inner)
    ]
    return torch.cat(kept)


@cache
def truth(case: str, static: bool, backward: bool) -> tuple[Tensor, ...]:
    """Tokens and gradients of the padded connector in float64."""
    workload = CASES[case]
    connector = connectors(torch.float64)[static]
    layout = padded_layout(offsets_of(workload, static))
    with torch.set_grad_enabled(backward):
        tokens = layout.back(padded(connector, Batch.of(workload, torch.float64), None))
    if not backward:
        return (tokens,)
    grads = torch.autograd.grad(
        tokens, list(connector.parameters()), upstream(len(tokens)).double()
    )
    return tokens.detach(), compared(connector, grads)


def offsets_of(workload: Workload, static: bool) -> Tensor:
    """Of the queries."""
    return ANCHORS * torch.arange(len(workload.atoms) + 1) if static else workload.query_offsets


def upstream(tokens: int) -> Tensor:
    return rows(tokens, connectors(torch.float32)[0].options.llm_width, seed=9)


def contender(
    name: str, case: str, dtype: torch.dtype, slots: int | None, *, backward: bool
) -> Contender:
    """The ragged connector, or a padded one; "static" in the name asks for the static Q-Former."""
    workload, static = CASES[case], name.startswith("static")
    connector, batch = connectors(dtype)[static], Batch.of(workload, dtype)
    offsets = offsets_of(workload, static)
    layout = padded_layout(offsets, slots)
    gradient = upstream(int(offsets[-1])).to(dtype) if backward else None
    if gradient is not None and name != OURS:
        gradient = layout.into(gradient)

    def run() -> Tensor:
        with torch.set_grad_enabled(backward):
            return ragged(connector, batch) if name == OURS else padded(connector, batch, slots)

    def packed(found: tuple[Tensor, ...]) -> list[Tensor]:
        tokens = found[0].detach() if name == OURS else layout.back(found[0].detach())
        return [tokens, *([compared(connector, found[1:])] if backward else [])]

    return Contender(
        name,
        run,
        truth(case, static, backward),
        tuple(connector.parameters()) if backward else (),
        (gradient,) if backward else (),
        packed,
    )


@pytest.mark.parametrize("case", CASES)
def test_connector(contest, goal, case, dtype, backward):
    """Inference, or forward and backward; attention, layer norms and feed-forward included."""
    if case == "C-L" and backward:
        pytest.skip("inference says what large molecules cost")
    workload = CASES[case]
    players = [
        contender(OURS, case, dtype, None, backward=backward),
        contender("static 32", case, dtype, ANCHORS, backward=backward),
        contender("padded", case, dtype, None, backward=backward),
        contender("padded 96", case, dtype, SLOTS, backward=backward),
    ]
    goals = {"padded 96": 2.0 if backward else 2.1} if case == "C-S" else {}
    if dtype == torch.bfloat16 and not backward:
        players.append(contender("padded 96, fp32", case, torch.float32, SLOTS, backward=False))
        goals |= {"padded 96, fp32": 10.0} if case == "C-S" else {}
    batch = Batch.of(workload, dtype)
    task = Task((batch.features.values,), players[0].upstream, players[0].truth, 1)
    weights = sum(p.nbytes for p in connectors(dtype)[0].parameters())
    outcome = contest(
        "connector",
        case,
        task,
        players,
        work=Work(weights * (2 if backward else 1), flops(workload) * (3 if backward else 1)),
        goals=goals,
    )
    queries = int(workload.query_offsets[-1])
    outcome.extra["molecules/s"] = len(workload.atoms) / outcome.entries[OURS].median
    outcome.extra["query tokens/s"] = queries / outcome.entries[OURS].median
    if case == "C-S" and not backward:
        more = queries / (ANCHORS * len(workload.atoms))
        title = f"connector, {outcome.title}: query tokens/s over the static Q-Former's"
        goal(title, more * outcome.entries["static 32"].ratio.value, 1.0)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_memory(benchmark, goal, name):
    """Peak of a training step above weights and gradients, each in a process of its own."""
    molecules = len(CASES["C-S"].atoms)
    ours = benchmark.pedantic(memory.peak, ("ragged", name, molecules), rounds=1)
    theirs = memory.peak("padded", name, molecules)
    if ours is None or theirs is None:
        pytest.skip("this system does not tell the peak memory of a process")
    benchmark.extra_info |= {"bytes": ours, "bytes of padded 96": theirs}
    goal(f"connector, C-S, {name}: peak memory of padded 96 over ours", theirs / ours, 2.0)
