from __future__ import annotations

import pytest
import torch

from edt_former.report import contenders, speed
from edt_former.tokens import pack_patches

OFFSETS = torch.tensor([0, 5, 6, 14])
PATCHES = {"entropy": pack_patches([[0, 0, 1, 1, 2], [0], [0, 1, 1, 1, 2, 2, 2, 2]])}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    size = {"width": 16, "layers": 2, "heads": 2, "ffn": 32, "cross_attention_freq": 1}
    monkeypatch.setattr(speed, "PUBLISHED", size)
    monkeypatch.setattr(speed, "ENCODER_WIDTH", 12)


def test_every_contender_is_timed_over_the_same_molecules():
    ours, static, padded = speed.connector_speed(OFFSETS, PATCHES, rounds=3)
    assert [s.name for s in (ours, static, padded)] == [
        "EDT-Former, ragged",
        "static Q-Former, 32 queries",
        "EDT-Former, padded to 96",
    ]
    assert ours.ratio == 1.0
    for contender, queries in ((ours, 3 * 32 + 7), (static, 3 * 32), (padded, 3 * 32 + 7)):
        assert contender.seconds > 0 and contender.ratio > 0
        assert contender.molecules == pytest.approx(3 / contender.seconds)
        assert contender.queries == pytest.approx(queries / contender.seconds)


def test_nothing_is_timed_where_the_results_differ(monkeypatch):
    read = contenders.padded_read
    monkeypatch.setattr(contenders, "padded_read", lambda *args, **slots: 1 + read(*args, **slots))
    with pytest.raises(RuntimeError, match=r"'static Q-Former, 32 queries' differs by"):
        speed.connector_speed(OFFSETS, PATCHES, rounds=1)
