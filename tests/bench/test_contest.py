"""The benches' own machinery: what they refuse, how they count, when they fail."""

from __future__ import annotations

import itertools

import pytest
import torch
from matplotlib.axes import Axes

import edt_kernels
from bench import contest, layouts, pictures, published, report, workloads
from bench.book import Book, Call, Goal
from bench.contest import Contender, Entry, Outcome, Task, Work, WrongResultError
from bench.machine import Machine

pytest_plugins = ["pytester"]
MACHINE = Machine("a CPU", 2, 1, "scalar", "2.13", 1e9, {"fp32": 1e9}, 0.0, True)


def square(x):
    return x * x


@pytest.fixture
def task():
    return Task.of(square, [torch.tensor([1.0, -2.0, 3.0])], backward=True)


def play(task, *contenders):
    return contest.play(
        "square",
        "three numbers",
        contenders,
        dtype="fp32",
        mode="forward+backward",
        work=task.work(),
        machine=MACHINE,
        tolerance=1e-5,
        budget=0.01,
    )


def test_the_truth_is_the_formula_in_float64(task):
    assert task.truth[0].tolist() == [1, 4, 9]
    expected = 2 * task.inputs[0].double() * task.upstream[0].double()
    assert torch.equal(task.truth[1], expected)


def test_a_right_contender_is_timed(task):
    found = play(task, task.contender("ours", square), task.contender("theirs", lambda x: x**2))
    assert found.entries["ours"].ratio is None
    assert found.entries["theirs"].ratio.value > 0
    assert found.entries["theirs"].error < 1e-6
    assert len(found.entries["ours"].seconds) >= contest.LEAST_ROUNDS
    assert found.ceiling > 0
    assert found.bound == "bytes"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        pytest.param(lambda x: x * x + 0.01, "theirs is off by .* in output 0", id="output"),
        pytest.param(
            lambda x: x * x + x - x.detach(), "theirs is off by .* in gradient 0", id="gradient"
        ),
        pytest.param(lambda x: x * x * torch.nan, "off by nan in output 0", id="nan"),
        pytest.param(lambda x: (x * x)[:2], r"shape \(2,\) in output 0, the truth", id="shape"),
    ],
)
def test_a_wrong_contender_is_refused(task, wrong, message):
    calls = []

    def counted(x):
        calls.append(x)
        return square(x)

    theirs = task.contender("theirs", wrong)
    if "shape" in message:
        theirs = Contender("theirs", lambda: wrong(task.inputs[0]), task.truth[:1])
    with pytest.raises(WrongResultError, match=f"square, three numbers, fp32, .*{message}"):
        play(task, task.contender("ours", counted), theirs)
    assert len(calls) == 1  # checked, never timed


def test_an_integer_that_differs_is_wrong():
    ids = torch.tensor([0, 1, 1])
    with pytest.raises(WrongResultError, match="allowed is 0"):
        contest.check(Contender("ids", lambda: ids + 1, (ids,)), 1e-5)
    assert contest.check(Contender("ids", lambda: ids.int(), (ids,)), 1e-5) == 0


def test_an_optional_contender_that_is_wrong_or_cannot_run_is_left_out(task):
    def broken(x):
        raise NotImplementedError("no kernel\nand many lines")

    found = play(
        task,
        task.contender("ours", square),
        task.contender("wrong", lambda x: x * x + 1, optional=True),
        task.contender("broken", broken, optional=True),
    )
    assert found.entries["wrong"].note.startswith("refused: wrong is off by")
    assert found.entries["broken"].note == "skipped: NotImplementedError: no kernel"
    assert found.entries["wrong"].seconds == found.entries["broken"].seconds == []
    with pytest.raises(NotImplementedError):
        play(task, task.contender("ours", square), task.contender("broken", broken))


def test_errors_are_relative_to_the_largest_entry():
    truth = torch.tensor([100.0, 1.0]).double()
    assert contest.relative_error(torch.tensor([100.0, 2.0]), truth) == pytest.approx(0.01)
    assert contest.relative_error(torch.zeros(2), 0 * truth) == 0
    assert contest.relative_error(torch.zeros(0), truth[:0]) == 0


def test_ratios_are_paired_by_round():
    ours = [1.0, 1.0, 8.0, 1.0, 1.0]  # a neighbour came in the third round
    theirs = [3.0, 3.0, 24.0, 3.0, 3.0]
    assert contest.paired_ratio(theirs, ours) == contest.Ratio(3, 3, 3)
    assert contest.paired_ratio(theirs[:3], ours).value == 3


def test_the_interval_is_that_of_the_median():
    ratio = contest.paired_ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert (ratio.value, ratio.low, ratio.high) == (2, 1, 3)
    assert ratio.half == 1
    noise = 1 + 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(0))
    ratio = contest.paired_ratio((2 * noise).tolist(), [1.0] * 400)
    # The median of 400 normal draws has a standard deviation of 1.2533 * 0.2 / 20.
    assert ratio.low < 2 < ratio.high
    assert ratio.half == pytest.approx(1.96 * 1.2533 * 0.2 / 20, rel=0.3)


class Clock:
    """Time passes only when a step says so."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def step(self, name, seconds):
        def run():
            self.now += seconds
            self.log.append(name)

        return run


def test_rounds_are_interleaved():
    clock = Clock()
    steps = {"a": clock.step("a", 0.03), "b": clock.step("b", 0.04)}
    seconds = contest.interleave(steps, budget=0.0, clock=lambda: clock.now)
    assert clock.log == ["a", "b"] * contest.LEAST_ROUNDS
    assert seconds["a"] == pytest.approx([0.03] * contest.LEAST_ROUNDS)
    assert seconds["b"] == pytest.approx([0.04] * contest.LEAST_ROUNDS)


def test_short_calls_are_repeated_and_dear_ones_sit_out():
    clock = Clock()
    steps = {"short": clock.step("short", contest.SAMPLE / 8), "dear": clock.step("dear", 1.0)}
    seconds = contest.interleave(steps, budget=2.0, clock=lambda: clock.now)
    assert seconds["short"] == pytest.approx([contest.SAMPLE / 8] * contest.MOST_ROUNDS)
    assert seconds["dear"] == pytest.approx([1.0] * contest.DEAR_ROUNDS)
    runs = [(name, len(list(group))) for name, group in itertools.groupby(clock.log)]
    # From the second round on a short one runs once before it is timed.
    assert runs[:4] == [("short", 8), ("dear", 1), ("short", 9), ("dear", 1)]


def test_work_counts_every_byte_once(task):
    assert task.work(flops=5.0) == Work(5 * 12, 5.0)  # in, out; upstream, in again, gradient
    assert task.work(reread=False) == Work(4 * 12)
    forward = Task.of(square, task.inputs, backward=False)
    assert forward.work() == Work(2 * 12)


@pytest.mark.parametrize("workload", workloads.WORKLOADS, ids=lambda w: w.name)
def test_workloads_are_of_the_stated_sizes(workload):
    small = workload.name != "C-L"
    assert workload.atoms.min() >= 8
    assert workload.atoms.max() <= (60 if small else 150)
    counts = workload.patches.patch_offsets.diff()
    assert torch.equal(workloads.ANCHORS + counts, workload.queries)
    assert workload.patches.atom_offsets.diff().min() >= 1
    assert torch.equal(workload.patch_ids.bincount(), workload.patches.atom_offsets.diff())
    assert workload.queries.max() <= workloads.SLOTS


def test_layouts_lead_there_and_back():
    offsets, keys = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 1, 4, 6])
    x = torch.randn(5, 2, 3)
    for layout in (
        layouts.padded(offsets),
        layouts.padded_heads(offsets, 7),
        layouts.nested(offsets),
    ):
        assert torch.equal(layout.back(layout.into(x)), x)
    pairs = torch.randn(2 * 1 + 0 * 3 + 3 * 2, 4)
    layout = layouts.padded_pairs(offsets, keys)
    dense = layout.into(pairs)
    assert dense.shape == (3, 4, 3, 3)
    assert torch.equal(dense[2, :, :3, :2], pairs[2:].unflatten(0, (3, 2)).permute(2, 0, 1))
    assert torch.equal(layout.back(dense), pairs)


def test_the_published_loops_compute_what_the_ops_compute():
    lengths = [1, 5, 9, 30]
    offsets = edt_kernels.offsets_from_lengths(torch.tensor(lengths))
    entropy = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0))
    groups = published.group_ids(entropy.split(lengths))
    patches = edt_kernels.find_patches(entropy, offsets, rule="published").trim()
    assert [i for ids in groups for i in ids] == patches.ids.tolist()

    atoms = torch.randn(sum(lengths), 4)
    nodes = torch.nn.functional.pad(edt_kernels.pad(atoms, offsets)[0], (0, 0, 1, 1))
    mask = torch.arange(nodes.shape[1]) < torch.tensor(lengths).unsqueeze(1) + 2
    pooled, real = published.pool_by_patch(nodes, mask, groups)
    expected = edt_kernels.segment_pool(atoms, patches.atom_offsets, reduce="mean")
    torch.testing.assert_close(pooled[real], expected)


def test_a_published_loop_counts_within_a_factor():
    assert published.judge(1.0, 1.29) == published.judge(1.29, 1.0) == ""
    assert "not comparable: 1310.00 ms where" in published.judge(1.31, 1.0)
    assert "not comparable" in published.judge(1.0, 1.31)


def test_without_the_record_no_loop_counts(monkeypatch):
    monkeypatch.delenv("EDT_SHARED", raising=False)
    published._record.cache_clear()
    assert "EDT_SHARED" in published.caveat(published.group_ids)
    published._record.cache_clear()


def test_the_summary_says_what_is_missed_busy_and_not_judged(task):
    entries = {
        "edt_kernels": Entry("edt_kernels", [1e-3] * 3, 1e-7),
        "theirs": Entry("theirs", [2e-3] * 3, 1e-7, contest.Ratio(2.0, 1.9, 2.2)),
        "absent": Entry("absent", [], note="skipped: not installed"),
    }
    outcome = contest.Outcome(
        "square", "C-S", "fp32", "forward", entries, task.work(), 5e-4, "bytes", 0.4
    )
    goals = [
        Goal("test", "twice", 2.0, 1.5),
        Goal("test", "thrice", 2.0, 3),
        Goal("test", "the loop", None, 50, "not comparable"),
    ]
    book = Book(MACHINE, [outcome], goals, [Call("sin", 1.0, None)])
    text = "\n".join(line for line, _ in report.lines(book))
    assert "WARNING: the machine was busy. Other processes took up to 40%" in text
    assert "C-S, fp32, forward  !     1.000     50% bytes   1e-07   2.00±0.15          -*" in text
    assert "* absent: skipped: not installed" in text
    assert "goals: 1 of 2 met, 1 not judged" in text
    assert "2.00 of 3     MISSED" in text
    assert "not judged, not comparable" in text


def recorded_curves(monkeypatch):
    """Label, x and y of every curve that is drawn from now on."""
    curves, plot = [], Axes.plot

    def record(ax, x, y, *style, **options):
        curves.append((options.get("label"), x, y))
        return plot(ax, x, y, *style, **options)

    monkeypatch.setattr(Axes, "plot", record)
    return curves


def test_contests_over_size_are_drawn_as_curves(task, tmp_path, monkeypatch):
    curves = recorded_curves(monkeypatch)
    book = Book()
    for size in (16, 8):
        work = Work(0.0, 1e9 * size)
        entries = {"ours": Entry("ours", [2.0, 1.0, 3.0]), "theirs": Entry("theirs", [4.0])}
        entries["broken"] = Entry("broken", [], note="skipped")
        extra = {pictures.SIZE: size}
        book.outcomes.append(
            Outcome("op", f"{size}", "fp32", "forward", entries, work, 0.5, "FLOP", None, extra)
        )
    report.save(book, tmp_path)
    assert (tmp_path / "op.png").stat().st_size > 0
    assert {label: (x, y) for label, x, y in curves} == {
        "roof: bytes or FLOP": ([8, 16], [16, 32]),
        "ours": ([8, 16], [4, 8]),
        "theirs": ([8, 16], [2, 4]),
        "broken": ([], []),
    }


def test_contests_over_size_with_memory_are_drawn_as_costs(tmp_path, monkeypatch):
    curves = recorded_curves(monkeypatch)
    book = Book()
    for size in (16, 8):
        entries = {"ours": Entry("ours", [2e-3]), "theirs": Entry("theirs", [4e-3 * size])}
        extra = {pictures.SIZE: size, f"{pictures.MEMORY}ours": 10 * size}
        book.outcomes.append(
            Outcome(
                *("op", f"{size}", "fp32", "forward", entries, Work(0.0, 1.0), 0.5, "FLOP", None),
                extra,
            )
        )
    report.save(book, tmp_path)
    assert (tmp_path / "op.png").stat().st_size > 0
    assert curves == [
        *[("ours", [8, 16], [2, 2]), (None, [8, 16], [80, 160])],
        *[("theirs", [8, 16], [32, 64]), (None, [], [])],
    ]


def test_a_missed_goal_fails_when_asked_to(pytester, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.makeconftest("from bench.conftest import *")
    pytester.makepyfile(
        """
        def test_speed(benchmark, goal):
            goal("twice as fast", 1.5, 2.0)
            goal("as fast", 1.5, 1.0)
            benchmark(lambda: None)
        """
    )
    arguments = ("--benchmark-only", "--bench-dir", pytester.path / "results")
    result = pytester.runpytest(*arguments)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["goals: 1 of 2 met, 0 not judged", "*MISSED*", "*met*"])
    assert (pytester.path / "results" / "goals.json").exists()
    result = pytester.runpytest(*arguments, "--assert-goals")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*twice as fast is 1.50, the goal is 2*"])
