from __future__ import annotations

import json
import sys

import pytest

from edt_former import machine
from edt_former.report import profile
from edt_former.report.peak import Peak

QUICK = ("profile", "--size", "tiny", "--rounds", 1, "--no-memory", "--new-tokens", 2)
CONTENDERS = (
    "EDT-Former, ragged",
    "static Q-Former, 32 queries",
    "static Q-Former, ",
    "EDT-Former, padded to longest",
    "EDT-Former, padded to 96",
)


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch):
    monkeypatch.setattr(machine, "load", lambda: 0.0)


@pytest.mark.usefixtures("as_shipped")
class TestProfile:
    def test_tables(self, edt):
        status, out, err = edt(*QUICK, "--count", 3)
        assert (status, err) == (0, [])
        assert out[0].startswith("molecules  3 of ") and "random weights" not in "\n".join(out)
        headers = [i for i, line in enumerate(out) if line.startswith("contender ")]
        assert len(headers) == 3
        for header in headers:
            rows = out[header + 1 : header + 6]
            assert all(row.startswith(name) for row, name in zip(rows, CONTENDERS, strict=True))
        assert out[headers[0] + 1].endswith("1.00 [1.00, 1.00]")
        assert out[headers[2]].split()[-2:] == ["prefill", "decode"]

    def test_json_and_picture(self, edt, tmp_path):
        pytest.importorskip("matplotlib")
        files = ["--json", tmp_path / "p.json", "--plot", tmp_path / "p.svg"]
        status, _, err = edt(*QUICK, "--count", 3, "--batch", 2, "--dtype", "bf16", *files)
        assert (status, err) == (0, [])
        told = json.loads((tmp_path / "p.json").read_text())
        assert told["workload"]["batch"] == 2 and told["workload"]["dtype"] == "bf16"
        assert len(told["contenders"]) == 5
        assert (tmp_path / "p.svg").read_text().count("<svg") == 1

    def test_memory(self, edt, monkeypatch):
        def peak(*_, **__):
            return Peak(123_000_000, 45_000_000, "VmHWM")

        monkeypatch.setattr(profile, "peak_memory", peak)
        status, out, _ = edt(*(option for option in QUICK if option != "--no-memory"))
        assert status == 0
        assert sum(line.endswith("123          45") for line in out) == 5
        assert any(line.startswith("peak: VmHWM of a process of its own") for line in out)

    def test_molecules_of_a_file(self, edt, tmp_path):
        (tmp_path / "a.smi").write_text("CCO\nC1CC broken\nc1ccccc1\n")
        status, out, err = edt(*QUICK, "--molecules", tmp_path / "a.smi")
        assert (status, err) == (0, [])
        notes = [line for line in out if line.startswith("note")]
        assert notes == [
            "note       1 of 3 rows that were drawn cannot be read, the first 'C1CC': unclosed "
            "ring",
            f"note       {tmp_path / 'a.smi'} has 2 valid molecules, fewer than 8",
        ]

    def test_threads_are_set(self, edt, monkeypatch):
        threads = []
        monkeypatch.setattr("torch.set_num_threads", threads.append)
        assert edt(*QUICK, "--count", 1, "--threads", 1)[0] == 0
        assert threads == [1]

    def test_a_busy_machine(self, edt, monkeypatch):
        monkeypatch.setattr(machine, "load", lambda: 99.5)
        status, _, err = edt(*QUICK, "--count", 1)
        assert status == 0 and len(err) == 1
        assert err[0].startswith("warning: the machine is busy (load 99.5, ")

    @pytest.mark.parametrize(
        ("content", "message"),
        [("C1CC\n", "unclosed ring"), ("", "no rows"), ("\n \n", "no rows")],
    )
    def test_a_file_without_a_molecule(self, fails, tmp_path, content, message):
        path = tmp_path / "a.smi"
        path.write_text(content)
        told = fails(*QUICK, "--molecules", path)
        assert told.startswith(f"{path} has no valid molecule: ") and told.endswith(message)

    def test_a_molecule_without_room(self, fails, tmp_path):
        (tmp_path / "a.smi").write_text("COCNCSC" * 400)
        told = fails(*QUICK, "--molecules", tmp_path / "a.smi", "--count", 1)
        assert told.startswith("prompt and answer must have at most 640 tokens")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", 0], "--rounds must be at least 1, got 0"),
        (["--count", 0], "--count must be at least 1, got 0"),
        (["--batch", -1], "--batch must be at least 1, got -1"),
        (["--threads", 0], "--threads must be at least 1, got 0"),
        (["--text-tokens", 0], "--text-tokens must be at least 1, got 0"),
        (["--new-tokens", 0], "--new-tokens must be at least 1, got 0"),
        (["--llm", "40m", "--size", "tiny"], "--llm goes with --size published"),
        (["--llm", "nonsense"], "llm must be one of '40m', '135m', '1b', '8b' or the folder"),
        (["--plot", "p.gif"], "--plot must end in .png, .svg, .pdf, got p.gif"),
        (["--json", "no/such/p.json"], "--json cannot be written: [Errno 2] No such file"),
        (["--plot", "no/such/p.png"], "--plot cannot be written: [Errno 2] No such file"),
        (["--json", "."], "--json cannot be written: [Errno 21] Is a directory"),
        (["--molecules", "no.smi"], "no such file: no.smi"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)
def test_what_is_wrong_is_said_before_anything_is_timed(fails, monkeypatch, options, message):
    def timed(*_, **__):
        raise AssertionError("timed")

    monkeypatch.setattr(profile, "profile", timed)
    assert fails("profile", *options).startswith(message)


@pytest.mark.parametrize("option", [["--device", "tpu"], ["--dtype", "fp8"], ["--rounds", "x"]])
def test_values_that_do_not_exist(edt, option):
    status, out, err = edt("profile", *option)
    assert status == 2 and out == [] and f"argument {option[0]}: invalid" in err[-1]


def test_a_file_that_is_there_stays_when_nothing_is_measured(fails, tmp_path):
    (tmp_path / "p.json").write_text("kept")
    fails("profile", "--json", tmp_path / "p.json", "--molecules", "no.smi")
    fails("profile", "--json", tmp_path / "new.json", "--molecules", "no.smi")
    assert (tmp_path / "p.json").read_text() == "kept"
    assert not (tmp_path / "new.json").exists()


def test_a_picture_needs_matplotlib(fails, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib" in fails("profile", "--plot", tmp_path / "p.png")
