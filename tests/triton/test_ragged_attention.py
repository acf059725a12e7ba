"""What the compiled kernels of attention leave room for."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 compiles nothing", allow_module_level=True)

from edt_kernels.triton import ragged_attention
from edt_kernels.triton.launch import record
from tests.triton.compiling import resources

# Of a multiprocessor of an H200. Registers of a warp are handed out by eights, and every program
# takes 1 KB of shared memory for the system.
REGISTERS, SHARED_BYTES = 65536, 227 << 10


# By the name of a configuration: programs that wait for memory together, forward and backward.
@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [("64", 5, 3), ("causal-64", 4, 3), ("grouped-64", 5, 3), ("pairs-64", 4, 2)],
)
def test_programs_share_a_multiprocessor(name, forward, backward):
    wanted = {"_forward_kernel": forward, "_backward_kernel": backward, "_pair_offsets_kernel": 1}
    seen = set()
    for configuration in ragged_attention.configurations(torch.device("meta"), torch.bfloat16):
        for launch in record(configuration) if configuration.name == name else ():
            needed = resources(launch, "sm_90")
            warps = launch.options.get("num_warps", 4)
            programs = min(
                REGISTERS // (-(-needed.registers // 8) * 8 * 32 * warps),
                SHARED_BYTES // (needed.shared + 1024),
            )
            kernel = launch.kernel.__name__
            assert programs >= wanted[kernel], f"{programs} {kernel}: {needed}"
            seen.add(kernel)
    assert seen >= {"_forward_kernel", "_backward_kernel"}
