"""`edt prepare conversations`, `edt review conversations` and `edt inspect oversmoothing`."""

from __future__ import annotations

import csv

import pytest

from edt_former.graph import make_encoder
from edt_former.language import save_part
from edt_former.tasks.conversations import RUBRIC

PREPARE, REVIEW = ("prepare", "conversations"), ("review", "conversations")


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.txt"
    rows = [f"{n}\t{'C' * n}O\tAn alcohol of {n} carbon atoms." for n in range(1, 9)]
    path.write_text("\n".join(["CID\tSMILES\tdescription", *rows, "9\tC1CC\tbroken"]) + "\n")
    return path


def test_from_captions_to_prepared_conversations(edt, captions, tmp_path):
    out = tmp_path / "conversations.jsonl"
    status, lines, _ = edt(*PREPARE, captions, "--out", out, "--turns", 3)
    assert status == 0
    assert lines == [f"8 conversations in {out}", "        1  dropped: unclosed ring"]
    assert edt(*PREPARE, captions, "--out", out, "--turns", 3)[1] == lines
    pytest.importorskip("pyarrow", reason="prepared data need pyarrow")
    from edt_former.data import PreparedData

    assert edt("prepare", out, "--out", tmp_path / "data")[0] == 0
    data = PreparedData(tmp_path / "data", wants=("turns", "molecule"))
    assert len(data) == 8
    assert data[0].turns[1] == ("assistant", "An alcohol of 1 carbon atoms.")


def test_another_file_does_not_go_on(edt, captions, tmp_path):
    out = tmp_path / "conversations.jsonl"
    assert edt(*PREPARE, captions, "--out", out, "--limit", 2)[1] == [f"2 conversations in {out}"]
    captions.write_text(captions.read_text() + "10\tCCN\tAn amine.\n")
    status, _, err = edt(*PREPARE, captions, "--out", out)
    assert status == 2 and "conversations of another run, which differs in origin" in err[0]
    status, _, err = edt(*PREPARE, captions, "--out", out, "--model", "m")
    assert status == 2 and err[0].endswith("--endpoint and --model go together")
    assert "--turns must be at least 1" in edt(*PREPARE, captions, "--out", out, "--turns", 0)[2][0]


def test_a_model_nobody_serves_fails_every_row(edt, captions, tmp_path):
    pytest.importorskip("openai", reason="endpoints need the conversations extra")
    out = tmp_path / "conversations.jsonl"
    endpoint = ("--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--limit", 1)
    status, lines, _ = edt(*PREPARE, captions, "--out", out, *endpoint)
    assert status == 1
    assert lines[0] == f"0 conversations in {out}" and "1  without a reply" in lines[1]


def test_a_sample_goes_to_people_and_comes_back(edt, captions, tmp_path):
    out, sample = tmp_path / "conversations.jsonl", tmp_path / "sample.csv"
    edt(*PREPARE, captions, "--out", out)
    status, lines, _ = edt(*REVIEW, out, "--out", sample, "--count", 5)
    assert status == 0 and lines[0] == f"5 conversations in {sample}; score each:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(RUBRIC)
    rows = list(csv.DictReader(sample.open(newline="")))
    with sample.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows({**row, **dict.fromkeys(RUBRIC, "2")} for row in rows[:4])
        table.writerow(rows[4])
    status, lines, _ = edt(*REVIEW, sample, "--score")
    assert status == 0 and lines[-1] == "4 conversations scored, 1 not"
    assert lines[-2].split() == ["faultless", "1.000", "[1.000,", "1.000]"]
    assert "one of --out and --score" in edt(*REVIEW, sample)[2][0]


def test_oversmoothing_of_folders_and_of_what_ships(edt, fails, as_shipped, tmp_path, monkeypatch):
    molecules = tmp_path / "some.smi"
    molecules.write_text("CCO\nc1ccccc1\nC1CC\n")
    picture = tmp_path / "levels.png"
    command = ("inspect oversmoothing", "--molecules", molecules)
    status, lines, _ = edt("inspect", *command[0].split()[1:], *command[1:], "--plot", picture)
    assert status == 0 and picture.stat().st_size > 1000
    assert lines[0].split() == [
        *("encoder", "level", "view"),
        *["mean", "cosine", "effective", "rank", "of"],
    ]
    names = [line.split()[0] for line in lines[1:-2]]
    assert names == ["graph_encoder"] * 2 + ["graph_encoder_3d"] * 2 + ["graph_encoder_both"] * 4
    assert lines[-2].startswith("2 molecules")
    for part in ("a", "b"):
        save_part(make_encoder({"name": "gin", "layers": 1, "width": 4}), tmp_path / part / "gin")
    status, lines, _ = edt(*command, tmp_path / "a" / "gin", tmp_path / "b" / "gin")
    assert status == 0
    assert {line.split()[0] for line in lines[1:-1]} == {f"{tmp_path}/{n}/gin" for n in "ab"}
    (tmp_path / "none.smi").write_text("C1CC\n")
    assert "has no valid molecule" in fails(command[0], "--molecules", tmp_path / "none.smi")


def test_two_words_are_one_command(edt):
    for words in (PREPARE, REVIEW, ("inspect", "oversmoothing")):
        status, lines, _ = edt(*words, "--help")
        assert status == 0 and lines[0].startswith(f"usage: edt {' '.join(words)} ")
