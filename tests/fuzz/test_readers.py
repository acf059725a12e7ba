from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import readers

pytest.importorskip("pyarrow", reason="prepared data need pyarrow")


@pytest.mark.parametrize("target", readers.TARGETS)
@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes(target, data):
    readers.TARGETS[target](data)


@pytest.mark.parametrize("target", readers.TARGETS)
@settings(max_examples=200, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_damaged_files(target, rng):
    readers.TARGETS[target](damaged(rng, rng.choice(readers.seeds(target))))


def damaged(rng: Random, data: bytes) -> bytes:
    """Some bytes changed, or the end cut off, or a stretch doubled."""
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        start = rng.randrange(len(data))
        return data[:start] + data[start : start + rng.randint(1, 40)] * 2 + data[start:]
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
    return bytes(changed)
