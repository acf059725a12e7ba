"""Ragged cross-attention against torch's attention on padded molecules, interleaved."""

import statistics
import time

import pytest
import torch
import torch.nn.functional as F

import edt_kernels

HEADS, WIDTH = 12, 64
ROUNDS = 9


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_small_molecules(benchmark, goal, small, dtype, backward):
    atoms, queries = small
    k_offsets = edt_kernels.offsets_from_lengths(atoms)
    q_offsets = edt_kernels.offsets_from_lengths(queries)
    generator = torch.Generator().manual_seed(1)

    def rows(offsets):
        x = torch.randn(int(offsets[-1]), HEADS, WIDTH, generator=generator, dtype=dtype)
        return x.requires_grad_(backward)

    q, k, v = rows(q_offsets), rows(k_offsets), rows(k_offsets)
    # The peers get their layout for nothing: [B, H, L, D], a boolean mask of real keys.
    padded, masks = [], []
    for x, offsets in ((q, q_offsets), (k, k_offsets), (v, k_offsets)):
        dense, mask = edt_kernels.pad(x.detach(), offsets)
        padded.append(dense.transpose(1, 2).contiguous().requires_grad_(backward))
        masks.append(mask)
    key_mask = masks[1][:, None, None]

    def ragged():
        return edt_kernels.ragged_attention(q, k, v, q_offsets, k_offsets)

    def dense():
        return F.scaled_dot_product_attention(*padded, attn_mask=key_mask)

    expected = dense().transpose(1, 2)[masks[0]]
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ragged(), expected, atol=tolerance, rtol=tolerance)

    gradients = torch.randn_like(ragged()), torch.randn_like(dense())

    def timed(run, gradient):
        start = time.perf_counter()
        out = run()
        if backward:
            out.backward(gradient)
        return time.perf_counter() - start

    pairs = [(timed(ragged, gradients[0]), timed(dense, gradients[1])) for _ in range(ROUNDS + 2)][
        2:
    ]
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    goal("times faster than padded attention", ratio, 1.0)
    benchmark.pedantic(timed, (ragged, gradients[0]), rounds=ROUNDS, warmup_rounds=2)
