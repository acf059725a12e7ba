from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edt_kernels import _library, _native
from tests.fuzz import batches
from tests.fuzz.agreement import Disagreement, check, check_spoiled
from tests.fuzz.batches import Call

native = pytest.mark.skipif(not _native.loaded, reason="the native kernels are not built")
RANDOMS = st.randoms(use_true_random=False)


@native
@pytest.mark.parametrize("op", batches.OPS)
@settings(max_examples=60, deadline=None)
@given(rng=RANDOMS)
def test_agrees_with_the_reference(op, rng):
    check(batches.draw(rng, op), rng)


@native
@pytest.mark.parametrize("op", batches.OPS)
@settings(max_examples=60, deadline=None)
@given(rng=RANDOMS)
def test_nonsense_is_refused(op, rng):
    check_spoiled(batches.spoil(rng, batches.draw(rng, op)), rng)


@native
def test_every_kernel_is_fuzzed(monkeypatch):
    called = set()

    class Names(dict):
        def __getitem__(self, name):
            called.add(name)
            return super().__getitem__(name)

    monkeypatch.setattr(_library, "REFERENCES", Names(_library.REFERENCES))
    for number in range(20 * len(batches.OPS)):
        rng = Random(number)
        check(batches.draw(rng), rng)
    assert called == set(_library.NAMES)


def test_a_wrong_result_is_found():
    runs = iter([1.0, 1.1])
    call = Call("op", lambda t: {"y": t["x"] * next(runs)}, {"x": torch.ones(3)})
    with pytest.raises(Disagreement, match=r"y differs by 0\.1"):
        check(call, Random(0))


def test_a_wrong_gradient_is_found():
    runs = iter([1.0, 1.1])

    def run(t):
        factor = next(runs)
        return {"y": t["x"] * factor + t["x"].detach() * (1 - factor)}

    with pytest.raises(Disagreement, match="dx differs"):
        check(Call("op", run, {"x": torch.ones(3)}, ("x",)), Random(0))


def test_a_result_for_nonsense_is_found():
    runs = iter([None, ValueError("offsets must not decrease")])

    def run(t):
        refusal = next(runs)
        if refusal:
            raise refusal
        return dict(t)

    with pytest.raises(Disagreement, match="reference refuses"):
        check_spoiled(Call("op", run, {"x": torch.ones(3)}), Random(0))


def test_an_error_that_tells_nothing_is_found():
    def run(t):
        raise RuntimeError("no")

    with pytest.raises(Disagreement, match="RuntimeError"):
        check_spoiled(Call("op", run, {"x": torch.ones(3)}), Random(0))
