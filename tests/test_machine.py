from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from edt_former import machine

LINUX_X86 = """processor\t: 0
model name\t: A Processor
flags\t\t: fpu sse2 avx2 fma f16c avx512f amx_tile hypervisor

processor\t: 1
model name\t: A Processor
"""
LINUX_ARM = """processor\t: 0
Features\t: fp asimd sve i8mm bf16 crc32
"""


@pytest.mark.parametrize(
    ("text", "model", "features"),
    [
        pytest.param(
            LINUX_X86, "A Processor", ["amx_tile", "avx2", "avx512f", "f16c", "fma"], id="x86"
        ),
        pytest.param(LINUX_ARM, None, ["asimd", "bf16", "i8mm", "sve"], id="arm"),
    ],
)
def test_the_processor(monkeypatch, text, model, features):
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    found = machine.cpu()
    assert found["features"] == features
    assert found["model"] == model if model else found["model"]


def test_a_system_that_tells_nothing(monkeypatch):
    def nothing(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", nothing)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "getloadavg", raising=False)
    found = machine.cpu()
    assert found["model"] and found["cores"] == os.cpu_count() and found["features"] == []
    assert machine.load() is None and machine.busy() is None


@pytest.mark.parametrize(
    ("load", "cores", "threads", "warns"),
    [(0.2, 2, 2, False), (0.6, 2, 2, True), (1.4, 2, 1, False), (1.6, 2, 1, True)],
)
def test_a_busy_machine_is_told_of(monkeypatch, load, cores, threads, warns):
    monkeypatch.setattr(machine, "load", lambda: load)
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    warning = machine.busy()
    assert (warning is not None) == warns
    if warns:
        told = f"the machine is busy (load {load}, {cores} cores, {threads} threads wanted): "
        assert warning.startswith(told) and "\n" not in warning


def test_threads_and_the_variables_that_set_them(monkeypatch):
    for name in machine.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = machine.threads()
    assert found == {"torch": torch.get_num_threads(), "environment": {"OMP_NUM_THREADS": "3"}}


def test_commands_that_do_not_answer():
    assert machine.first_line(sys.executable, "-c", "print('one\\ntwo')") == "one"
    assert machine.first_line(sys.executable, "-c", "print()") is None
    assert machine.first_line(sys.executable, "-c", "raise SystemExit(3)") is None
    assert machine.first_line("/no/such/command") is None


def test_versions_of_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("numpy", "no-such-package"))
    found = machine.versions()
    assert found["numpy"] and found["no-such-package"] is None


def test_a_gpu(monkeypatch):
    class Facts:
        name, major, minor, total_memory = "A GPU", 9, 0, 1 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Facts)
    monkeypatch.setattr(machine, "driver", lambda: "580.1")
    assert machine.gpu() == {
        "name": "A GPU",
        "capability": "9.0",
        "memory": 1 << 30,
        "driver": "580.1",
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.gpu() is None
