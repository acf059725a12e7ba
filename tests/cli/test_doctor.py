from __future__ import annotations

import json

import pytest

from edt_former import doctor
from edt_former.doctor import NOTE, OK, PROBLEM, Finding

FINE = [Finding("python", OK, "3.11.7"), Finding("GPU", NOTE, "none found", "buy one")]
BROKEN = [*FINE, Finding("native kernels", PROBLEM, "missing", "build", {"native": False})]


@pytest.mark.parametrize(
    ("findings", "status", "last"),
    [
        pytest.param(FINE, 0, "no problem found", id="notes only"),
        pytest.param(BROKEN, 1, "1 problem: native kernels", id="a problem"),
        pytest.param(
            [*BROKEN, *BROKEN[2:]], 1, "2 problems: native kernels, native kernels", id="two"
        ),
    ],
)
def test_only_problems_make_it_fail(edt, monkeypatch, findings, status, last):
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    found, out, err = edt("doctor")
    assert (found, out[-1], err) == (status, last, [])


def test_remedies_stand_below_what_they_mend(edt, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: BROKEN)
    assert edt("doctor")[1][:-2] == [
        "ok       python          3.11.7",
        "note     GPU             none found",
        "                         -> buy one",
        "problem  native kernels  missing",
        "                         -> build",
    ]


def test_long_lines_are_wrapped_in_a_terminal(edt, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("ops", OK, "word " * 30)])
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = edt("doctor")
    assert len(out) > 4 and max(map(len, out)) <= 60
    assert all(line.startswith(" " * 14 + "word") for line in out[1:-2])


@pytest.mark.parametrize(("findings", "status"), [(FINE, 0), (BROKEN, 1)])
def test_json(edt, monkeypatch, findings, status):
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    found, out, err = edt("doctor", "--json")
    told = json.loads("\n".join(out))
    assert (found, err) == (status, [])
    assert told["healthy"] == (status == 0)
    assert told["findings"][1] == {
        "subject": "GPU",
        "state": "note",
        "told": "none found",
        "remedy": "buy one",
        "data": {},
    }


def test_this_machine(edt):
    status, out, err = edt("doctor")
    assert status == (1 if any(line.startswith("problem") for line in out) else 0) and err == []
    assert any("native kernels" in line for line in out)
