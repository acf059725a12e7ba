"""The script behind every figure of a GPU, as far as a CPU goes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import edt_kernels
from bench.contest import Entry, Outcome, Ratio, Task, Work, WrongResultError
from bench.gpu import __main__ as script
from bench.gpu import checks, contests, few, kernels, machine, summary
from bench.gpu.bulk import chains
from bench.gpu.cases import Call, cases
from bench.gpu.clock import HostClock
from bench.gpu.run import CRASHED, CheckError, Run, Section
from bench.workloads import TRAIN_4

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
CASES = {case.name: case for case in cases()}


@pytest.fixture
def run(tmp_path):
    ceilings = {"copy": 1e10, "fp32": 1e10, "bf16": 1e10}
    return Run(CPU, tmp_path, HostClock(), True, time.time() + 60, {"date": "today"}, ceilings)


@pytest.fixture
def section(run):
    return Section(run, "checks", run.deadline)


def test_the_whole_script_on_a_cpu(tmp_path):
    """Every section is complete, nothing fails, and nothing is judged: this is no GPU."""
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--tiny", "--out"]
    done = subprocess.run([*command, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = summary.read(tmp_path, list(script.SECTIONS))
    assert [s["section"] for s in sections] == list(script.SECTIONS)
    for found in sections:
        assert found["complete"] and found["entries"] and not found["running"]
        assert "no figure here is of a GPU" in found["device"]
    judged = summary.goals(sections)
    assert len(judged) >= 20 and all(goal["ratio"] is None for goal in judged)
    assert (tmp_path / "ragged_attention.png").exists()
    reasons = [e["skipped"] for s in sections for e in s["entries"] if "skipped" in e]
    assert any("captures no graphs" in reason for reason in reasons)
    assert not any("time is over" in reason for reason in reasons)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err


def test_neither_rdkit_nor_transformers_is_needed():
    hide = "import sys; sys.modules['rdkit'] = sys.modules['transformers'] = None\n"
    code = f"{hide}import bench.gpu.__main__"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BROKEN = {
    "wrong values": (checks.correct, lambda x, *_: 1.001 * x),
    "wrong gradients": (checks.correct, lambda x, *_: x + (x - x.detach()) / 100),
    "NaN": (checks.correct, lambda x, *_: x.clone().index_fill_(0, torch.tensor([3]), torch.nan)),
    "other bits every time": (checks.repeats, lambda x, *_: x + torch.rand(()) / 1e6),
    "bits of the batch": (checks.batch_invariant, lambda x, v, o: x + v.shape[0] / 1e6),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_check_finds(fault, monkeypatch):
    check, spoil = BROKEN[fault]
    softmax = edt_kernels.segment_softmax
    check(CASES["segment_softmax, ()"], CPU, torch.float32)

    def broken(values, offsets):
        found = softmax(values, offsets)
        truth = values.dtype == torch.float64
        return found if truth else spoil(found, values, offsets)

    monkeypatch.setattr(edt_kernels, "segment_softmax", broken)
    with pytest.raises(CheckError, match="segment_softmax"):
        check(CASES["segment_softmax, ()"], CPU, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_correct_on_a_cpu(name):
    for dtype in (torch.float32, torch.bfloat16):
        assert checks.correct(CASES[name], CPU, dtype)["largest error"] < 1e-2


def test_every_op_has_a_case():
    ops = set(edt_kernels.__all__) & {*edt_kernels.build_info()["ops"], "pool_by_id"}
    assert ops == {name.split(",")[0] for name in CASES} & ops


def test_every_call_is_compiled_in_some_part():
    parts = [kernels.compile_part(part, 50, CPU) for part in (0, 49)]
    whole = len(CASES) * len(checks.DTYPES)
    assert parts == [len(range(part, whole, 50)) for part in (0, 49)]


def test_picked_molecules_keep_their_rows():
    case = CASES["ragged_attention"]
    call = Call(case.of([3, 0]), CPU, torch.float64)
    assert call.offsets["queries"].tolist() == [0, 36, 76]
    whole = Call(case, CPU, torch.float64)
    begin = whole.offsets["queries"][3]
    assert torch.equal(call.inputs["q"][:36], whole.inputs["q"][begin : begin + 36])


def test_what_fails_is_an_entry_and_the_others_go_on(section):
    def fails():
        raise ValueError("first line\nsecond line")

    section.each({"one": lambda: {"value": 1.0}, "two": fails, "three": lambda: {"value": 3.0}})
    kept = json.loads(section.file.read_text())
    assert [e.get("failed") for e in kept["entries"]] == [None, "ValueError: first line", None]
    assert summary.failures([kept]) == ["checks: two: ValueError: first line"]


def test_a_section_without_time_says_what_it_left_out(run):
    section = Section(run, "late", time.time() - 1)
    section.each({"one": lambda: {"value": 1.0}})
    assert section.entries == [{"what": "one", "skipped": "the section's time is over"}]


def test_a_crash_costs_the_item_that_crashed(run, section):
    class CrashError(BaseException):
        pass

    def crashes():
        raise CrashError

    items = {"one": lambda: {"value": 1.0}, "two": crashes, "three": lambda: {"value": 3.0}}
    with pytest.raises(CrashError):
        section.each(items)
    after = Section(run, "checks", run.deadline)
    after.each(items)
    assert [e["what"] for e in after.entries] == ["one", "two", "three"]
    assert after.entries[1]["failed"] == "the process ended here"


@pytest.mark.parametrize(
    ("statuses", "crashes", "started"),
    [
        pytest.param([0], 0, 1, id="nothing happens"),
        pytest.param([CRASHED, -11, 0], 2, 3, id="two crashes"),
        pytest.param([1], 1, 1, id="an error of Python"),
        pytest.param([CRASHED] * 9, script.MOST_CRASHES, script.MOST_CRASHES, id="only crashes"),
    ],
)
def test_another_process_goes_on_after_a_crash(monkeypatch, tmp_path, statuses, crashes, started):
    left = list(statuses)

    monkeypatch.setattr(script, "one_process", lambda command, folder: left.pop(0))
    assert script.work_in_processes([], tmp_path) == crashes
    assert len(statuses) - len(left) == started


def test_a_process_that_says_nothing_is_ended(tmp_path):
    sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert script.one_process(sleeps, tmp_path, stalled=2) < 0
    assert script.one_process([sys.executable, "-c", "raise SystemExit(3)"], tmp_path) == 3


def square(x):
    return x * x


def test_a_contest(run, section):
    """Ours is checked and timed; a peer that is wrong or cannot run is named with the reason."""
    task = Task.of(square, [torch.tensor([1.0, -2.0, 3.0])], backward=True)

    def cannot(x):
        raise NotImplementedError("not here")

    found = contests.play(
        *(run, section, "square", "three numbers"),
        [
            task.contender("ours", square),
            task.contender("power", lambda x: x**2),
            task.contender("wrong", lambda x: x**3),
            task.contender("missing", cannot),
        ],
        dtype=torch.float32,
        modes={mode: Work(24) for mode in (contests.FORWARD, contests.BACKWARD, contests.GRAPH)},
    )
    assert list(found) == [contests.FORWARD, contests.BACKWARD, contests.GRAPH]
    entries = found[contests.BACKWARD].entries
    assert entries["power"].ratio.value > 0
    assert entries["wrong"].note.startswith("refused: WrongResultError")
    assert entries["missing"].note == "skipped: NotImplementedError: not here"
    assert not found[contests.GRAPH].entries["power"].seconds
    kept = json.loads(section.file.read_text())["entries"][1]["outcome"]
    assert summary._outcome(kept) == found[contests.BACKWARD]


def test_wrong_results_are_not_timed(run, section):
    task = Task.of(square, [torch.ones(3)], backward=False)
    with pytest.raises(WrongResultError):
        contests.play(
            *(run, section, "square", "ones", [task.contender("ours", lambda x: x + 1)]),
            dtype=torch.float32,
            modes={contests.FORWARD: Work(24)},
        )
    assert not section.entries


def test_goals_are_judged_on_a_gpu_only(run, section):
    entries = {
        "ours": Entry("ours", [2e-6]),
        "theirs": Entry("theirs", [6e-6], ratio=Ratio(3.0, 2.9, 3.1)),
        "missing": Entry("missing", [], note="skipped: not here"),
    }
    outcome = Outcome("op", "case", "fp32", "forward", entries, Work(1), 1e-6, "bytes", None)
    for device in ("cpu", "cuda"):
        run.device = torch.device(device)
        contests.goal_of_time(section, outcome, 1.0)
        contests.goal_of_ratio(section, outcome, "theirs", 2.0)
        contests.goal_of_ratio(section, outcome, "missing", 2.0)
        contests.goal_of_ceiling(section, outcome, 0.8)
        contests.goal_of_time(section, None, 1.0)
    assert [g["ratio"] for g in section.goals[:4]] == [None] * 4
    assert [g["ratio"] for g in section.goals[4:]] == [0.5, 3.0, None, 0.5]
    assert [g["met"] for g in section.goals[4:]] == [False, True, True, False]


@pytest.mark.parametrize(("asserted", "status"), [(False, 0), (True, 1)])
def test_a_missed_goal_fails_where_that_is_asked(run, section, asserted, status):
    run.device = torch.device("cuda")
    run.head.update(machine.head(CPU))
    section.goal("as fast as light", 0.5, 1.0)
    assert script.conclude(run.folder, 0, assert_goals=asserted) == status


def test_few_molecules_are_compared_with_the_cpu(run, section):
    steps = {"ours": lambda: torch.ones(3), few.ON_CPU: lambda: torch.full((3,), 1.1)}
    with pytest.raises(WrongResultError, match="off by"):
        few._op(run, section, "ones", steps)
    assert not section.entries


def test_chains_are_molecules():
    graph = chains(TRAIN_4)
    assert graph.bond_offsets[-1] == graph.bond_index.shape[1]
    molecule = torch.bucketize(graph.bond_index, graph.offsets[1:], right=True)
    assert torch.equal(molecule[0], molecule[1])
    assert graph.bond_index.shape[1] == 2 * (graph.num_atoms - graph.num_molecules)
    assert torch.equal(graph.bond_index[1], graph.bond_index[1].sort().values)
