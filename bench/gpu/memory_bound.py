"""Entropy, patches, pooling, packing: what a copy of as many bytes takes is the ceiling."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import edt_kernels
from bench.contest import OURS, Task, Work, compiled
from bench.gpu.contests import BACKWARD, FORWARD, GRAPH, goal_of_ceiling, goal_of_time, play
from bench.gpu.run import Run, Section
from bench.peers import (
    by_masked_scatter,
    by_scatter_reduce,
    by_segment_reduce,
    by_where,
    from_log_softmax,
    mean_by_index_add,
    quantile_rule,
    torch_scatter,
)
from bench.workloads import ANCHORS, HEAD_WIDTH, HEADS, SCREEN_LARGE, SCREEN_SMALL, Workload, rows

WIDTH = HEADS * HEAD_WIDTH
PROMPT, LLM_WIDTH, BEFORE = 128, 4096, 20
ROWS = 256  # of a prompt, in the contest of splice
LEAST = 0.8  # share of the copy bandwidth


def run(run: Run, section: Section) -> None:
    """At screening size in bfloat16; entropies of a next-atom predictor and of a language model."""
    small, large = (
        (workload.first(4) if run.tiny else workload).to(run.device)
        for workload in (SCREEN_SMALL, SCREEN_LARGE)
    )
    rows_of_llm = 8 if run.tiny else 8192
    work = {
        "segment_pool, W-S": partial(_pool, run, section, small),
        "segment_pool, W-L": partial(_pool, run, section, large),
        "splice": partial(_splice, run, section, small.first(ROWS)),
        "entropy, V=32000": partial(_entropy, run, section, "8192 rows", rows_of_llm, 32000),
        "entropy, V=38": partial(_entropy, run, section, "W-S", int(small.atoms.sum()), 38),
        "find_patches": partial(_find_patches, run, section, small),
        "entropy_patches": partial(_entropy_patches, run, section, small),
        "ragged_cat": partial(_ragged_cat, run, section, small),
        "segment_softmax": partial(_softmax, run, section, small),
    }
    section.all(work)


def _modes(task: Task) -> dict[str, Work]:
    """Of a linear op: each moves inputs and outputs, or their gradients, once."""
    size = task.inputs[0].element_size()
    read = sum(x.nbytes for x in task.inputs)
    written = sum(x.numel() * size for x in task.truth[: task.outputs] if x.is_floating_point())
    return {FORWARD: Work(read + written), BACKWARD: Work(read + written)}


def _pool(run: Run, section: Section, workload: Workload) -> None:
    patches = workload.patches
    offsets, ids = patches.atom_offsets, workload.patch_ids
    counts = offsets.diff()
    segment_csr = torch_scatter("segment_csr", reduce="mean")
    x = rows(len(ids), WIDTH, dtype=torch.bfloat16, device=run.device)
    by_index_add = mean_by_index_add(ids, counts)
    task = Task.of(by_index_add, [x], backward=True)
    contenders = [
        task.contender(OURS, lambda x: edt_kernels.segment_pool(x, offsets, reduce="mean")),
        task.contender("index_add", by_index_add),
        task.contender("scatter_reduce", by_scatter_reduce(ids, len(counts), "mean")),
        task.contender("segment_reduce", by_segment_reduce(offsets, "mean")),
        task.contender("torch-scatter", lambda x: segment_csr(x, offsets)),
        task.contender("compiled", compiled(by_index_add, backend=run.backend)),
    ]
    found = play(
        *(run, section, "segment_pool", f"{workload.name} mean", contenders),
        dtype=torch.bfloat16,
        modes=_modes(task),
    )
    for mode in (FORWARD, BACKWARD):
        goal_of_ceiling(section, found.get(mode), LEAST)


def _splice(run: Run, section: Section, workload: Workload) -> None:
    place = torch.arange(PROMPT, device=run.device)
    slots = (place >= BEFORE) & (place < BEFORE + workload.queries.unsqueeze(1))
    offsets = workload.query_offsets
    at = slots.flatten().nonzero().squeeze(1)
    width = 64 if run.tiny else LLM_WIDTH
    draw = partial(rows, dtype=torch.bfloat16, device=run.device)
    inputs = [draw(len(slots), PROMPT, width), draw(int(offsets[-1]), width, seed=2)]

    def by_index_put(embeds: Tensor, tokens: Tensor) -> Tensor:
        return embeds.flatten(0, 1).index_put((at,), tokens).view_as(embeds)

    task = Task.of(by_where(slots), inputs, backward=True)
    contenders = [
        task.contender(OURS, lambda e, t: edt_kernels.splice(e, t, offsets, slots)),
        task.contender("masked_scatter", by_masked_scatter(slots)),
        task.contender("index_put", by_index_put),
        task.contender("cumsum, where", by_where(slots)),
        task.contender("compiled where", compiled(by_where(slots), backend=run.backend)),
    ]
    # Text rows that tokens replace need not be read; their gradient is 0.
    text, tokens = (x.nbytes for x in inputs)
    modes = {FORWARD: Work(2 * text), BACKWARD: Work(2 * text + tokens)}
    found = play(
        *(run, section, "splice", f"{len(slots)} prompts", contenders),
        dtype=torch.bfloat16,
        modes=modes,
    )
    goal_of_ceiling(section, found.get(FORWARD), LEAST)


def _entropy(run: Run, section: Section, case: str, count: int, v: int) -> None:
    logits = rows(count, v, dtype=torch.bfloat16, device=run.device)
    task = Task.of(from_log_softmax, [logits], backward=True)
    contenders = [
        task.contender(OURS, edt_kernels.entropy),
        task.contender("log_softmax", from_log_softmax),
        task.contender("compiled", compiled(from_log_softmax, backend=run.backend)),
    ]
    read = logits.nbytes + 2 * count
    modes = {FORWARD: Work(read), BACKWARD: Work(2 * logits.nbytes + 2 * count)}
    small = v < 1000
    modes |= {GRAPH: Work(read)} if small else {}
    found = play(
        *(run, section, "entropy", f"{case}, V={v}", contenders),
        dtype=torch.bfloat16,
        modes=modes,
    )
    if small:
        goal_of_time(section, found.get(GRAPH), 5)
    else:
        for mode in (FORWARD, BACKWARD):
            goal_of_ceiling(section, found.get(mode), LEAST)


def _find_patches(run: Run, section: Section, workload: Workload) -> None:
    """float32, as entropies are; all molecules have one size, so a rectangle is no padding."""
    offsets = workload.atom_offsets
    atoms = int(workload.atoms[0])
    entropy = rows(int(offsets[-1]), device=run.device).abs()

    def by_padding(h: Tensor) -> Tensor:
        return quantile_rule(h.unflatten(0, (-1, atoms))).flatten()

    task = Task((entropy,), (), (by_padding(entropy.double()),), 1)
    contenders = [
        task.contender(OURS, lambda h: edt_kernels.find_patches(h, offsets, rule="published").ids),
        task.contender("padded torch", by_padding),
    ]
    work = Work(entropy.nbytes + 8 * len(entropy))
    found = play(
        *(run, section, "find_patches", f"{workload.name} published", contenders),
        dtype=torch.float32,
        modes={FORWARD: work, GRAPH: work},
    )
    goal_of_time(section, found.get(GRAPH), 6)


def _entropy_patches(run: Run, section: Section, workload: Workload) -> None:
    offsets = workload.atom_offsets
    logits = rows(int(offsets[-1]), 38, device=run.device)

    def steps(x: Tensor) -> tuple[Tensor, Tensor]:
        h = edt_kernels.entropy(x)
        return h, edt_kernels.find_patches(h.detach(), offsets).ids

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        h, patches = edt_kernels.entropy_patches(x, offsets)
        return h, patches.ids

    task = Task.of(steps, [logits], backward=False)
    contenders = [
        task.contender(OURS, ours),
        task.contender("entropy, find_patches", steps),
    ]
    work = Work(logits.nbytes + 12 * len(logits))
    play(
        *(run, section, "entropy_patches", f"{workload.name} local_max", contenders),
        dtype=torch.float32,
        modes={FORWARD: work, GRAPH: work},
    )


def _ragged_cat(run: Run, section: Section, workload: Workload) -> None:
    """Anchors and dynamic queries."""
    offsets = workload.patches.patch_offsets
    draw = partial(rows, dtype=torch.bfloat16, device=run.device)
    inputs = [draw(ANCHORS, WIDTH), draw(int(offsets[-1]), WIDTH, seed=2)]
    place = torch.arange(int(workload.query_offsets[-1]), device=run.device)
    molecule = torch.searchsorted(workload.query_offsets, place, right=True) - 1
    within = place - workload.query_offsets[molecule]
    source = torch.where(within < ANCHORS, within, offsets[molecule] + within)

    def by_index(anchors: Tensor, queries: Tensor) -> Tensor:
        return torch.cat([anchors, queries]).index_select(0, source)

    task = Task.of(by_index, inputs, backward=True)
    contenders = [
        task.contender(OURS, lambda a, b: edt_kernels.ragged_cat([a, b], [None, offsets])[0]),
        task.contender("cat, index_select", by_index),
    ]
    written = len(place) * WIDTH * 2
    modes = {FORWARD: Work(written + inputs[1].nbytes), BACKWARD: Work(2 * written)}
    play(
        *(run, section, "ragged_cat", f"{workload.name} anchors, patches", contenders),
        dtype=torch.bfloat16,
        modes=modes,
    )


def _softmax(run: Run, section: Section, workload: Workload) -> None:
    offsets, atoms = workload.atom_offsets, int(workload.atoms[0])
    x = rows(int(offsets[-1]), HEADS, device=run.device)

    def by_rectangle(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, atoms)).softmax(1).flatten(0, 1)

    task = Task.of(by_rectangle, [x], backward=True)
    contenders = [
        task.contender(OURS, lambda x: edt_kernels.segment_softmax(x, offsets)),
        task.contender("softmax of a rectangle", by_rectangle),
    ]
    modes = {FORWARD: Work(2 * x.nbytes), BACKWARD: Work(3 * x.nbytes)}
    play(
        *(run, section, "segment_softmax", workload.name, contenders),
        dtype=torch.float32,
        modes=modes,
    )
