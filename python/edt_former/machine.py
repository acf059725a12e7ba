"""What a time depends on that no option says: processor, threads, load, versions, GPU.

Torch is imported where it is asked, so that the rest can be told where torch is broken.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_AFFINITY")
FEATURES = ("avx2", "fma", "f16c", "avx_vnni", "avx512", "amx", "asimd", "sve", "bf16", "i8mm")
"""Prefixes of the processor features that kernels choose by."""
PACKAGES = ("edt-kernels", "torch", "numpy", "rdkit", "transformers", "safetensors")


def machine() -> dict[str, object]:
    """All of this module but the GPU, for a record beside times.

    >>> sorted(machine())
    ['cpu', 'load', 'platform', 'threads', 'versions']
    """
    return {
        "cpu": cpu(),
        "threads": threads(),
        "load": load(),
        "platform": platform.platform(),
        "versions": versions(),
    }


def cpu() -> dict[str, object]:
    """`model`, `cores` that this process may use, and those `features` that kernels choose by.

    >>> cpu()["cores"] >= 1
    True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    pairs = (line.partition(":") for line in reversed(lines))
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return {
        "model": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "features": sorted(flag for flag in flags if flag.startswith(FEATURES)),
    }


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads() -> dict[str, object]:
    """Torch's threads, and the environment variables that set them.

    >>> threads()["torch"] >= 1
    True
    """
    import torch

    variables = {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    return {"torch": torch.get_num_threads(), "environment": variables}


def load() -> float | None:
    """How many threads wanted a core in the last minute, on average; None where nobody counts."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def busy() -> str | None:
    """A warning where other work leaves fewer cores than torch has threads; None where not."""
    import torch

    wanted, now = torch.get_num_threads(), load()
    if now is None or now + wanted <= cores() + 0.5:
        return None
    return (
        f"the machine is busy (load {now}, {cores()} cores, {wanted} threads wanted): "
        "times are too long; ratios, taken in turns, suffer less"
    )


def versions() -> dict[str, str | None]:
    """Of Python and the packages that a time depends on; None for one that is not installed.

    >>> versions()["python"] == platform.python_version()
    True
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def gpu(device: int = 0) -> dict[str, object] | None:
    """`name`, `capability`, `memory` in bytes and `driver` of a CUDA device; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory": facts.total_memory,
        "driver": driver(),
    }


def driver() -> str | None:
    """Version of the NVIDIA driver where there is a GPU; None where `nvidia-smi` finds none."""
    return first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def first_line(*command: str) -> str | None:
    """What a command prints first; None where it is not there, fails or takes longer than 20 s.

    >>> first_line("no-such-command", "--version") is None
    True
    """
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.partition("\n")[0].strip() or None
