"""The connector of published size against the static Q-Former and padding to 96 slots."""

import torch

import edt_kernels
from edt_former.report.speed import connector_speed


def test_published_size(benchmark, goal, small):
    offsets = edt_kernels.offsets_from_lengths(small[0][:16])
    surprise = torch.rand(int(offsets[-1]), generator=torch.Generator().manual_seed(2))
    patches = edt_kernels.find_patches(surprise, offsets).trim()
    ours, static, padded = benchmark.pedantic(
        connector_speed, (offsets, {"entropy": patches}), rounds=1
    )
    goal("times faster than padded to 96", padded.ratio, 1.0)
    benchmark.extra_info["query tokens/s over the static Q-Former"] = ours.queries / static.queries
