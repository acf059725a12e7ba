"""Options, fixtures and the summary of the benchmarks: `pytest bench/ --benchmark-only`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bench import published, report
from bench.book import Book, Goal
from bench.contest import TOLERANCE, Contender, Outcome, Task, Work, play
from bench.machine import Machine, load_average, measure
from bench.workloads import SMALL, WORKLOADS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOOK = pytest.StashKey[Book]()
MISSED = pytest.StashKey[list[Goal]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--assert-goals", action="store_true", help="a missed goal fails the run")
    parser.addoption(
        "--keep-memory",
        action="store_true",
        help="freed memory stays in the process, as with other allocators than glibc's: no "
        "contender waits for fresh pages",
    )
    parser.addoption(
        "--bench-dir",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder for the JSON files and pictures of the contests",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BOOK] = Book()
    # The summary below is the report; `--benchmark-verbose` prints pytest-benchmark's own.
    config.option.benchmark_quiet = not config.option.benchmark_verbose
    cache = config.getoption("--bench-dir").resolve() / "compiled"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> object:
    """With `--assert-goals`, fails a test after it has recorded all its goals."""
    result = yield
    missed = item.stash.get(MISSED, [])
    if item.config.getoption("--assert-goals"):
        assert not missed, "; ".join(map(str, missed))
    return result


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    book = config.stash[BOOK]
    if not (book.outcomes or book.goals):
        return
    for line, colour in report.lines(book):
        terminalreporter.write_line(line, **({colour: True} if colour else {}))
    folder = config.getoption("--bench-dir")
    terminalreporter.write_line(report.save(book, folder))


@pytest.fixture(scope="session")
def book(pytestconfig: pytest.Config) -> Book:
    """Where results are kept for the summary."""
    return pytestconfig.stash[BOOK]


@pytest.fixture(scope="session")
def machine(pytestconfig: pytest.Config, book: Book) -> Machine:
    """What this machine is, with its copy bandwidth and matrix product rates of now."""
    book.machine = measure(keeps_memory=pytestconfig.getoption("--keep-memory"))
    return book.machine


@pytest.fixture(scope="session")
def caveats():
    """Why a loop of `published.py` is no baseline here; "" where it is one."""
    return {
        function: published.caveat(function)
        for function in (published.group_ids, published.pool_by_patch)
    }


@pytest.fixture(params=WORKLOADS, ids=lambda workload: workload.name.replace(" ", "-"))
def workload(request: pytest.FixtureRequest):
    return request.param


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[False, True], ids=["forward", "forward+backward"])
def backward(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="session")
def small():
    """Atoms and queries of 256 molecules of 30 +- 9 atoms (8 to 60)."""
    return SMALL.atoms, SMALL.queries


@pytest.fixture
def goal(request, benchmark, book):
    """Record a ratio beside its goal, and fail on a miss if `--assert-goals` was given."""

    def record(name: str, ratio: float, least: float, *, interval: str = "") -> None:
        entry = Goal(request.node.name, name, ratio, least, interval)
        book.goals.append(entry)
        if not entry.met:
            request.node.stash.setdefault(MISSED, []).append(entry)
        benchmark.extra_info[name] = round(ratio, 2)
        benchmark.extra_info[f"{name}, goal"] = least
        benchmark.extra_info["load"] = load_average()
        benchmark.extra_info["threads"] = torch.get_num_threads()

    return record


@pytest.fixture
def contest(request, benchmark, goal, machine, book):
    """Play a contest: check, time, judge goals, and hand our time to pytest-benchmark."""

    def run(
        op: str,
        case: str,
        task: Task,
        contenders: list[Contender],
        *,
        work: Work | None = None,
        goals: dict[str, float] | None = None,
        tolerance: float | None = None,
        budget: float = 0.6,
    ) -> Outcome:
        dtype = task.inputs[0].dtype
        name = next(name for name, value in DTYPES.items() if value == dtype)
        outcome = play(
            op,
            case,
            contenders,
            dtype=name,
            mode="forward+backward" if task.upstream else "forward",
            work=work or task.work(),
            machine=machine,
            tolerance=TOLERANCE[dtype] if tolerance is None else tolerance,
            budget=budget,
        )
        book.outcomes.append(outcome)
        ours = outcome.entries[contenders[0].name]
        calls = max(1, round(2e-3 / ours.median))
        rounds = 5 if ours.median < 0.1 else 1
        benchmark.group = f"{op}, {outcome.title}"
        benchmark.extra_info.update(report.extra_info(outcome, machine))
        benchmark.pedantic(contenders[0].step, rounds=rounds, iterations=calls)
        for peer, least in (goals or {}).items():
            title = f"{op}, {outcome.title}: times faster than {peer}"
            entry = outcome.entries[peer]
            if entry.note:
                book.goals.append(Goal(request.node.name, title, None, least, entry.note))
            else:
                interval = f"[{entry.ratio.low:.2f}, {entry.ratio.high:.2f}]"
                goal(title, entry.ratio.value, least, interval=interval)
        return outcome

    return run
