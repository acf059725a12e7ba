from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from edt_former import shipped
from edt_former.report import contenders, profile
from edt_former.report.peak import Peak, peak_memory
from edt_former.report.pipeline import ENCODING, STAGES
from edt_former.report.profile import Measured, Profile
from edt_former.report.workload import Workload

SMILES = ["CCO", "c1ccccc1CC(=O)NC", "[Na+].[Cl-]"]
TINY = Workload(size="tiny", batch=2, text_tokens=5, new_tokens=4)


@pytest.fixture
def found(as_shipped):
    return profile.profile(TINY, SMILES, rounds=2, memory=False)


def test_tokens_are_counted_over_all_batches(found, as_shipped):
    counts = shipped.load().processor.token_counts(SMILES)
    mean = sum(counts) / 3
    ours, static, equal, longest, slots = found.measured
    assert ours.tokens == longest.tokens == slots.tokens == pytest.approx(mean)
    assert static.tokens == 32 and equal.tokens == round(mean)
    # Batches of two and of one: rows are as long as the longest of theirs.
    padded = (2 * max(counts[:2]) + counts[2]) / 3
    assert ours.prompt_tokens == pytest.approx(mean + 5)
    assert longest.prompt_tokens == pytest.approx(padded + 5)
    assert slots.prompt_tokens == 96 + 5
    assert ours.computed_tokens == longest.computed_tokens == pytest.approx(padded + 5)
    assert slots.computed_tokens == 96 + 5 and static.computed_tokens == 32 + 5


def test_what_is_alike_is_timed_once(found):
    ours, static, *_ = found.measured
    for measured in found.measured:
        assert list(measured.seconds) == list(STAGES)
        assert all(len(rounds) == 2 for rounds in measured.seconds.values())
        assert measured.seconds["featurise"] == ours.seconds["featurise"]
        assert measured.seconds["graph encoder"] == ours.seconds["graph encoder"]
    assert static.seconds["predictor + patches"] == [0.0, 0.0]
    assert min(ours.seconds["predictor + patches"]) > 0


def profile_of(*seconds: list[float]) -> Profile:
    """Each contender takes its seconds in the connector, and one second to decode."""
    measured = [
        Measured(
            name=f"contender {i}",
            tokens=10.0 * (i + 1),
            prompt_tokens=40.0,
            computed_tokens=50.0,
            seconds={stage: [0.0] * len(rounds) for stage in STAGES}
            | {"connector": rounds, "decode": [1.0] * len(rounds)},
        )
        for i, rounds in enumerate(seconds)
    ]
    machine = {"threads": {"torch": 2}}
    return Profile(TINY, 6, 20.0, 3, measured, [], machine, {"cpu_isa": "avx2"})


def test_figures_are_made_of_the_rounds():
    found = profile_of([1.0, 2.0, 4.0], [2.0, 6.0, 4.0])
    ours, theirs = found.measured
    assert found.ratio(theirs, ENCODING) == (2.0, 1.0, 3.0)
    assert found.ratio(theirs) == (1.5, 1.0, 7 / 3)
    assert found.molecules_per_second(ours, ENCODING) == 6 / 2
    assert found.molecules_per_second(ours) == 6 / 3
    assert found.query_tokens_per_second(theirs) == 20 * 6 / 4
    assert found.decoded_per_second(ours) == 4 * 6 / 1


def test_json_holds_every_round_and_the_machine(found):
    told = json.loads(json.dumps(found.to_json()))
    assert told["workload"]["batch"] == 2 and told["molecules"] == 3 and told["rounds"] == 2
    assert told["machine"]["cpu"]["model"] and told["machine"]["load"] is not None
    assert told["machine"]["load after"] is not None
    assert told["machine"]["versions"]["torch"] and told["machine"]["threads"]["torch"] >= 1
    assert set(told["kernels"]) >= {"native", "cpu_isa", "ops"}
    first, *others = told["contenders"]
    assert first["encoding"]["time_over_edt_former"] == {"median": 1, "low": 1, "high": 1}
    assert len(others) == 4 and all(len(c["seconds"]["decode"]["rounds"]) == 2 for c in others)
    assert first["peak_memory"] is None


@pytest.mark.parametrize(
    ("smiles", "rounds", "message"),
    [
        ([], 1, "smiles must hold at least one molecule, got none"),
        (["CCO"], 0, "rounds must be at least 1, got 0"),
        (["COCNCSC" * 400], 1, "prompt and answer must have at most 640 tokens"),
    ],
    ids=["no molecules", "no rounds", "no room"],
)
def test_arguments_are_checked(as_shipped, smiles, rounds, message):
    with pytest.raises(ValueError, match=message):
        profile.profile(TINY, smiles, rounds=rounds, memory=False)


def test_a_molecule_with_more_tokens_than_slots_is_noted(as_shipped):
    found = profile.profile(TINY, ["CCO", "NCC(=O)" * 100], rounds=1, memory=False)
    assert len(found.measured) == 4
    (note,) = found.notes
    assert note.startswith("padding to 96 is left out: a molecule has 1")


class TestNothingIsTimedWhereResultsDiffer:
    @pytest.fixture(autouse=True)
    def _untimed(self, as_shipped, monkeypatch):
        def timed(*_, **__):
            raise AssertionError("timed")

        monkeypatch.setattr(profile, "interleaved", timed)

    def test_in_the_tokens(self, monkeypatch):
        read = contenders.padded_read
        monkeypatch.setattr(
            contenders, "padded_read", lambda *args, **slots: 1 + read(*args, **slots)
        )
        with pytest.raises(RuntimeError, match="'static Q-Former, 32 queries' differs by"):
            profile.profile(TINY, SMILES, memory=False)

    def test_in_what_the_language_model_says(self, monkeypatch):
        prompt = contenders.Padded.prompt

        def unmasked(*args):
            return prompt(*args)._replace(mask=None)

        monkeypatch.setattr(contenders.Padded, "prompt", unmasked)
        with pytest.raises(RuntimeError, match="'EDT-Former, padded to longest' differs by"):
            profile.profile(TINY, SMILES, memory=False)

    def test_else_all_is_timed(self):
        with pytest.raises(AssertionError, match="timed"):
            profile.profile(TINY, SMILES, memory=False)


def test_memory_that_cannot_be_measured_is_a_note(as_shipped, monkeypatch):
    def measure(workload, smiles, name, **_):
        if name.startswith("static"):
            raise RuntimeError(f"peak memory of {name!r} was not measured: killed")
        return Peak(3, 2, "VmHWM")

    monkeypatch.setattr(profile, "peak_memory", measure)
    found = profile.profile(TINY, SMILES, rounds=1)
    assert [m.peak is None for m in found.measured] == [False, True, True, False, False]
    assert found.notes == [
        f"peak memory of 'static Q-Former, {n} queries' was not measured: killed"
        for n in (32, round(found.measured[0].tokens))
    ]
    assert found.to_json()["contenders"][0]["peak_memory"] == {
        "total": 3,
        "working": 2,
        "source": "VmHWM",
    }


trained = pytest.mark.skipif(
    not shipped.connectors(), reason="the trained models are not in this checkout"
)


@trained
def test_more_molecules_at_once_need_more_memory():
    """In processes of their own, which know the shipped models only."""
    smiles = ["CC(=O)Oc1ccccc1C(=O)O"] * 16
    sizes = {"mean": 36.0, "longest": 36, "threads": 1}
    with ThreadPoolExecutor(2) as pool:
        few, many = pool.map(
            lambda batch: peak_memory(
                Workload(size="tiny", batch=batch), smiles, "EDT-Former, ragged", **sizes
            ),
            (1, 16),
        )
    assert few.source == many.source == "VmHWM"
    assert 0 <= few.working < many.working < many.total


def test_a_process_that_fails_says_so(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match=r"memory of 'x' was not measured: exit status 1$"):
        peak_memory(Workload(size="tiny"), ["CCO"], "x", mean=33.0, longest=33, threads=1)
