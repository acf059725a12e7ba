"""Tables and JSON lines in the layouts in which they are published."""

import gzip
import json
import os
from pathlib import Path

import pytest
from rdkit import Chem

from edt_former.data import Columns, read_rows
from edt_former.data.raw import RawRow

DAMAGED = gzip.compress(b"smiles\nCCO\nCC\n" * 9, mtime=0)[:-12]


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def test_a_table_with_tabs_keeps_quotes_and_halves_backslashes(tmp_path):
    text = 'CID\tSMILES\tdescription\n1\tC/C=C\\\\C\t"E" and "Z\n\n2\tCC\tethane\n'
    first, second = read_rows(write(tmp_path / "a.txt", text))
    assert (first.id, first.molecules, first.text) == ("1", ("C/C=C\\C",), '"E" and "Z')
    assert (second.number, second.molecules) == (1, ("CC",))


def test_a_table_with_commas_is_quoted(tmp_path):
    text = 'smiles,caption\nCC,"a, b"\n'
    (row,) = read_rows(write(tmp_path / "a.csv.gz", text))
    assert row.molecules == ("CC",) and row.text == "a, b"


def test_columns_by_name_and_targets_with_gaps(tmp_path):
    path = write(tmp_path / "a.csv", "Drug_ID,Drug,Y,note\na,CC,1.5,x\nb,CO,,y\nc,CN,many,z\n")
    rows = list(read_rows(path, Columns(text="note", targets=("Y",))))
    assert [row.targets for row in rows] == [(1.5,), (None,), ()]
    assert [row.id for row in rows] == ["a", "b", "c"] and rows[0].text == "x"
    assert rows[2].reason == "Y is no number: 'many'"


def test_numbers_are_finite_and_missing_ones_as_tables_write_them(tmp_path):
    cells = ("inf", "-1e999", "1_000", "N/A", "#N/A", "<NA>", "NaN", "2e3")
    path = write(tmp_path / "a.csv", "smiles,y\n" + "".join(f"C,{cell}\n" for cell in cells))
    rows = list(read_rows(path, Columns(targets=("y",))))
    reasons = [f"y is no number: {cell!r}" for cell in cells[:3]]
    assert [row.reason for row in rows] == [*reasons, *[""] * 5]
    assert [row.targets for row in rows[3:]] == [(None,)] * 4 + [(2000.0,)]


def test_a_row_with_other_cells_is_kept_with_the_reason(tmp_path):
    rows = list(read_rows(write(tmp_path / "a.tsv", "smiles\ttext\nCC\nCO\tfine\n")))
    assert rows[0].reason == "1 cells, the header has 2"
    assert rows[1].reason == "" and rows[1].number == 1


def test_lines_of_smiles(tmp_path):
    rows = list(read_rows(write(tmp_path / "a.smi", "CC ethane\n\nCO\tmethanol\n")))
    assert [(row.molecules, row.id) for row in rows] == [(("CC",), "ethane"), (("CO",), "methanol")]


def test_the_title_of_lines_is_no_molecule(tmp_path):
    rows = list(read_rows(write(tmp_path / "a.smi", "\nSMILES Name\nCC ethane\nsmiles x\n")))
    assert [(row.number, row.molecules) for row in rows] == [(0, ("CC",)), (1, ("smiles",))]


def test_semicolons_and_decimal_commas(tmp_path):
    table = write(tmp_path / "a.csv", 'id;Smiles;y\na;"C;C";1,5\nb;CO;2\nc;N;1,2,3\n')
    first, second, third = read_rows(table, Columns(targets=("y",)))
    assert (first.id, first.molecules, first.targets) == ("a", ("C;C",), (1.5,))
    assert second.targets == (2.0,)
    assert third.reason == "y is no number: '1.2.3'"


def test_structures(tmp_path):
    ethanol = Chem.MolToMolBlock(Chem.MolFromSmiles("CCO")).replace("\n", "first\n", 1)
    good = f"{ethanol}> <Y>\n1.5\n\n> <Caption>\nan alcohol\n\n$$$$\n"
    bad = f"{ethanol}> <Y>\nmany\n\n> <Code>\n7\n\n$$$$\n"
    path = write(tmp_path / "a.sdf", good + "nothing\n$$$$\n" + bad)
    rows = list(read_rows(path, Columns(targets=("y", "z"))))
    assert rows[0] == RawRow(0, "first", ("CCO",), "an alcohol", targets=(1.5, None))
    assert rows[1] == RawRow(1, "nothing", reason="the structure cannot be read")
    assert rows[2] == RawRow(2, "first", reason="y is no number: 'many'")
    assert [row.id for row in read_rows(path, Columns(id="code"))] == ["", "", "7"]
    with pytest.raises(ValueError, match="holds structures: no column of SMILES, got 'smiles'"):
        read_rows(path, Columns(smiles="smiles"))


TURNS = (("user", "What is <mol>?"), ("assistant", "An alcohol."))


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": role, "content": said} for role, said in TURNS]},
        {"conversations": [{"user": "What is <mol>?", "assistant": "An alcohol."}]},
        {"conversations": json.dumps([{"user": "What is <mol>?", "assistant": "An alcohol."}])},
        {
            "conversations": [
                {"from": "human", "value": "What is <mol>?"},
                {"from": "gpt", "value": "An alcohol."},
            ]
        },
    ],
    ids=["messages", "pairs", "JSON in a string", "from and value"],
)
def test_conversations_in_every_layout(tmp_path, record):
    record = {"cid": 7, "smiles": "CCO", "graph_data": {"unimol": []}, **record}
    (row,) = read_rows(write(tmp_path / "a.jsonl", json.dumps(record)))
    assert (row.id, row.molecules, row.turns) == ("7", ("CCO",), TURNS)


def test_a_system_stands_first_and_molecules_may_be_many(tmp_path):
    record = {
        "smiles": ["CCO", "C"],
        "system": "Be brief.",
        "conversations": [{"user": "Compare <mol> and <mol>.", "assistant": "No."}],
    }
    (row,) = read_rows(write(tmp_path / "a.jsonl", json.dumps(record)))
    assert row.molecules == ("CCO", "C") and row.turns[0] == ("system", "Be brief.")


def test_the_pretraining_layout(tmp_path):
    record = {"cid": "3", "iupac_name": "ethanol", "smiles": "CCO", "brics_gids": [0, 0, 0]}
    (row,) = read_rows(write(tmp_path / "a.json", json.dumps([record])))
    assert row.text == "ethanol" and row.turns is None


def test_lines_that_are_no_json_are_kept_with_the_reason(tmp_path):
    text = '{"smiles": "CC"}\n{broken\n[1]\n{"conversations": [{"user": "a"}]}\n'
    rows = list(read_rows(write(tmp_path / "a.jsonl", text)))
    assert [bool(row.reason) for row in rows] == [False, True, True, True]
    assert rows[2].reason == "cannot be read: must be an object, got list"
    assert rows[3].reason == "cannot be read: 'assistant' is missing"


def test_instructions_know_molecules_from_text():
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of public data) is not set")
    path = Path(os.environ["EDT_SHARED"], "data/mol_instructions/readme_examples.json")
    rows = list(read_rows(path))
    assert [len(row.molecules) for row in rows] == [1, 0, 2, 1, 3, 1]
    assert all(m.startswith("selfies:[") for row in rows for m in row.molecules)
    asked = [row.turns[0][1] for row in rows]
    assert asked[0].endswith("\n<mol>") and "primary arylamine" in asked[1]
    assert asked[4].endswith("\n<mol>.<mol>>><mol>")
    assert rows[5].turns[1] == ("assistant", "-0.2482")


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_rows(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"must end in one of \.smi, "):
        read_rows(write(tmp_path / "a.xlsx", ""))
    with pytest.raises(ValueError, match="has no SMILES column; its columns are a, b"):
        read_rows(write(tmp_path / "a.csv", "a,b\n"))
    with pytest.raises(ValueError, match="has no column 'y'"):
        read_rows(write(tmp_path / "b.csv", "smiles,b\n"), Columns(targets=("y",)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv.gz", DAMAGED, "rows.csv.gz is damaged"),
        ("rows.csv.gz", b"no gzip", "rows.csv.gz is damaged"),
        ("rows.json", b'[{"smiles": "C"', "rows.json is damaged"),
        ("rows.json", b'{"smiles": "C"}', "rows.json must hold a list, got dict"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(tmp_path / name))


def test_deep_nonsense_is_one_bad_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text("[" * 100000 + '\n{"smiles": "CCO"}\n')
    bad, good = read_rows(tmp_path / "rows.jsonl")
    assert bad.reason.startswith("cannot be read") and good.molecules == ("CCO",)
