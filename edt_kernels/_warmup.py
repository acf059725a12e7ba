"""Compiles the Triton kernels before they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edt_kernels import _library


def warmup(
    device: torch.device | str = "cuda",
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
) -> None:
    """Compile the Triton kernels of all ops, so that no later call has to.

    A kernel is compiled when it is first launched, unless Triton finds it in its cache on disk
    (`TRITON_CACHE_DIR`). That does not belong into a timed loop, nor into the capture of a CUDA
    graph. Every kernel is launched here on next to nothing, forward and backward.

    Args:
        device: the GPU to compile for; kernels are kept per device.
        dtypes: of the numbers that ops will be called with: float32, bfloat16, float16, float64.

    Raises:
        ValueError: `device` is no CUDA device.
        RuntimeError: there is no GPU that torch can use, or Triton is not installed.

    What a kernel depends on beside the dtype: whether offsets are int64 (compiled here) or int32,
    whether a width is 1, divisible by 16 (compiled here) or not, its next power of two up to a few
    hundred columns, and the options of a call. Numbers of molecules, atoms and patches compile
    nothing. A combination that is not among the configurations is compiled by its first call.

    Example:
        >>> import torch, edt_kernels
        >>> if torch.cuda.is_available():
        ...     edt_kernels.warmup("cuda")
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA device, got {device}")
    if not torch.cuda.is_available():
        raise RuntimeError("warmup needs a GPU that torch can use, torch.cuda has none")
    if not _library.has_triton():
        raise RuntimeError("warmup needs Triton, which is not installed: pip install triton")
    from edt_kernels.triton import configurations

    for dtype in dtypes:
        for configuration in configurations(device, dtype):
            configuration.launcher(*configuration.arguments)
    torch.cuda.synchronize(device)
