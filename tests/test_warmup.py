from __future__ import annotations

import pytest
import torch

import edt_kernels.triton
from edt_kernels import _library, build_info, warmup
from edt_kernels.triton.launch import Configuration


def test_needs_a_cuda_device(monkeypatch):
    with pytest.raises(ValueError, match="device must be a CUDA device, got cpu"):
        warmup("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"warmup needs a GPU that torch can use, torch\.cuda has none"
    ):
        warmup()


def test_needs_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match=r"needs Triton, .*: pip install triton"):
        warmup()


def test_launches_every_configuration_of_every_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(_library, "has_triton", lambda: True)
    launched = []
    monkeypatch.setattr(
        edt_kernels.triton,
        "configurations",
        lambda device, dtype: [
            Configuration(name, lambda *call: launched.append(call), (str(device), dtype, name))
            for name in ("a", "b")
        ],
    )
    warmup("cuda:1", dtypes=[torch.float16, torch.float64])
    assert launched == [
        ("cuda:1", dtype, name) for dtype in (torch.float16, torch.float64) for name in ("a", "b")
    ]


def test_every_op_with_a_launcher_is_served_by_it():
    info = build_info()
    expected = dict.fromkeys(info["ops"], "reference")
    if info["triton"]:
        expected |= dict.fromkeys(_library.LAUNCHERS, "triton")
    assert info["cuda_ops"] == expected
    assert set(_library.LAUNCHERS) <= set(info["ops"])
