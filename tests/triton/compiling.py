"""Ahead-of-time compilation of recorded launches, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import KernelParam

from edt_kernels.triton.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.int8: "i8",
    torch.uint8: "u8",
}


class Resources(NamedTuple):
    """What a compiled kernel needs, and what it leaves alone.

    Attributes:
        registers: of a thread.
        shared: bytes of a program.
        spills: bytes of a thread that do not fit its registers.
        ignored: tensors that it neither reads nor writes: its code was thrown away.
    """

    registers: int
    shared: int
    spills: int
    ignored: list[str]


def resources(launch: Launch, target: str) -> Resources:
    """Compile a launch and read what it needs from the binary."""
    signature, constants, attributes = specialised(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=launch.options)
    read = _of_amdgcn if target.startswith("gfx") else _of_cubin
    registers, spills = read(compiled.asm)
    pointers = re.findall(r"%([\w.]+): !tt.ptr", compiled.asm["ttgir"])
    ignored = [p for p in pointers if len(re.findall(rf"%{p}\b", compiled.asm["ttgir"])) == 1]
    return Resources(registers, compiled.metadata.shared, spills, ignored)


def specialised(launch: Launch) -> tuple[dict, dict, dict]:
    """Types, constants and divisibility by 16, as a launch with aligned tensors has them."""
    signature, constants, attributes = {}, {}, {}

    def kind(value: object, path: tuple[int, ...], param: KernelParam | None) -> object:
        """The type of an argument, or the types of a tuple."""
        if isinstance(value, tuple):
            # Triton specialises what is in a tuple whatever the parameter says.
            return tuple(kind(entry, (*path, i), None) for i, entry in enumerate(value))
        free = param is None or not param.do_not_specialize
        constant = value is None or (free and type(value) is int and value == 1)
        if constant or (param is not None and param.is_constexpr):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (free and type(value) is int and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return f"*{TYPES[value.dtype]}"
        if isinstance(value, float):
            return param.annotation_type or "fp32"
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, param in enumerate(launch.kernel.params):
        value = launch.arguments.get(param.name, param.default)
        signature[param.name] = kind(value, (i,), param)
    return signature, constants, attributes


def _of_cubin(asm: dict) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    used = dict(re.findall(r"(\w+):(\d+)", printed))
    return int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"])


def _of_amdgcn(asm: dict) -> tuple[int, int]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", asm["amdgcn"])[1])

    return number("vgpr_count"), number("private_segment_fixed_size")
