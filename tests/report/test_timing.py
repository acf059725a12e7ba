from __future__ import annotations

import pytest
import torch

from edt_former.report.timing import Spread, Stopwatch, interleaved, paired


def test_a_spread_is_the_median_and_the_extremes():
    assert Spread.of([5.0]) == (5.0, 5.0, 5.0)
    assert Spread.of([4.0, 1.0, 2.0, 9.0]) == (3.0, 1.0, 9.0)


def test_ratios_are_of_one_round_each():
    # Twice as slow in every round, while the machine slows down fivefold.
    assert paired([2.0, 4.0, 10.0], [1.0, 2.0, 5.0]) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])


def test_every_round_starts_with_another_run():
    order = []
    runs = {name: lambda name=name: order.append(name) or name for name in "abc"}
    assert interleaved(runs, 4) == {name: [name] * 4 for name in "abc"}
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"


def test_laps_add_up(monkeypatch):
    clock = iter([1.0, 3.0, 10.0])
    monkeypatch.setattr("edt_former.report.timing.time.perf_counter", lambda: next(clock))
    watch = Stopwatch("cpu")
    assert [watch.lap(), watch.lap()] == [2.0, 7.0]


def test_on_a_gpu_every_lap_waits_for_its_work(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(str(device)))
    Stopwatch("cpu").lap()
    assert waited == []
    Stopwatch("cuda").lap()
    assert waited == ["cuda", "cuda"]
