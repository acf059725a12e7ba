"""Options and workloads shared by the benchmarks."""

import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--assert-goals", action="store_true", help="a missed goal fails the run")


@pytest.fixture
def goal(request, benchmark):
    """Record a ratio beside its goal, and fail on a miss if `--assert-goals` was given."""

    def record(name: str, ratio: float, least: float) -> None:
        benchmark.extra_info[name] = round(ratio, 2)
        benchmark.extra_info[f"{name}, goal"] = least
        benchmark.extra_info["load"] = os.getloadavg()[0]
        benchmark.extra_info["threads"] = torch.get_num_threads()
        if request.config.getoption("--assert-goals"):
            assert ratio >= least, f"{name} is {ratio:.2f}, the goal is {least}"

    return record


@pytest.fixture(scope="session")
def small():
    """256 molecules of 30 +- 9 atoms (8 to 60); 32 anchors and a dynamic query per 4 atoms."""
    generator = torch.Generator().manual_seed(0)
    atoms = (30 + 9 * torch.randn(256, generator=generator)).round().clamp(8, 60).long()
    return atoms, 32 + atoms // 4
