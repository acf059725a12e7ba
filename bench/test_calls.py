"""What a call costs where the input is tiny: checks, dispatch, autograd."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import edt_kernels
from bench.book import CALL_GOALS, Call
from bench.contest import interleave


def tiny_calls() -> dict[str, tuple[Callable[..., object], tuple[Tensor, ...], bool]]:
    """Per op a call on two molecules of three and two atoms, and whether it has a gradient."""
    atoms, offsets = torch.randn(5, 4), torch.tensor([0, 3, 5])
    heads = torch.randn(5, 1, 4)
    ids = torch.tensor([0, 0, 0, 1, 1])
    slots = torch.tensor([[True, True, True, False], [True, True, False, False]])
    k = edt_kernels
    calls = {
        "torch.sin": (torch.sin, (atoms,), True),
        "entropy": (k.entropy, (atoms,), True),
        "linear_entropy": (k.linear_entropy, (atoms, torch.randn(3, 4)), True),
        "find_patches": (lambda h: k.find_patches(h, offsets), (atoms[:, 0].contiguous(),), False),
        "entropy_patches": (lambda x: k.entropy_patches(x, offsets), (atoms,), True),
        "segment_pool": (lambda x: k.segment_pool(x, offsets), (atoms,), True),
        "pool_by_id": (lambda x: k.pool_by_id(x, ids, 2), (atoms,), True),
        "segment_softmax": (lambda x: k.segment_softmax(x, offsets), (atoms,), True),
        "ragged_attention": (
            lambda q, kv: k.ragged_attention(q, kv, kv, offsets, offsets),
            (heads, heads.clone()),
            True,
        ),
        "ragged_cat": (
            lambda a, b: k.ragged_cat([a, b], [None, offsets]),
            (atoms[:2], atoms),
            True,
        ),
        "splice": (
            lambda e, t: k.splice(e, t, offsets, slots),
            (torch.randn(2, 4, 4), atoms),
            True,
        ),
    }
    a, b = torch.randn(2, 4, 2), torch.randn(3, 2)
    calls["instance_lora"] = (
        lambda x, a, b: k.instance_lora(x, a, b, offsets),
        (atoms, a, b),
        True,
    )
    calls["instance_lora_many"] = (
        lambda x, a, b: k.instance_lora_many([x], [a], [b], offsets),
        (atoms, a, b),
        False,
    )
    if hasattr(k, "insert"):
        texts, at = torch.randn(5, 4), torch.tensor([1, 3])
        calls["insert"] = (lambda e, t: k.insert(e, offsets, t, offsets, at), (texts, atoms), True)
    return calls


def test_calls(benchmark, goal, book):
    calls = tiny_calls()
    steps: dict[str, Callable[[], object]] = {}
    for name, (run, inputs, differentiable) in calls.items():
        steps[name] = lambda run=run, inputs=inputs: run(*inputs)
        if differentiable:
            leaves = [x.clone().requires_grad_() for x in inputs]
            steps[f"{name}, recorded"] = lambda run=run, leaves=leaves: run(*leaves)
    seconds = interleave(steps, budget=2.0)
    microseconds = {name: 1e6 * statistics.median(times) for name, times in seconds.items()}
    for name in calls:
        call = Call(name, microseconds[name], microseconds.get(f"{name}, recorded"))
        book.calls.append(call)
        if name == "torch.sin":
            continue
        for kind, figure in (("plain", call.plain), ("recorded", call.recorded)):
            if figure is not None:
                least = CALL_GOALS[kind]
                goal(f"{name}: {least:g} us over those of a {kind} call", least / figure, 1)
    benchmark.group = "calls"
    benchmark.pedantic(steps["entropy"], rounds=5, iterations=1000)
