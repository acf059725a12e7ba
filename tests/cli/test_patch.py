"""`edt patch`: what it prints and draws, in whose atom order, and how it fails."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
from rdkit import Chem

from edt_former import shipped
from edt_former.chem import read_molecule
from edt_former.report import patch_molecules

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
OTHERWISE = "OC(=O)c1ccccc1OC(C)=O"
pytestmark = pytest.mark.usefixtures("as_shipped")


def as_json(edt, *arguments):
    status, out, err = edt("patch", *arguments, "--json")
    assert (status, err) == (0, [])
    return json.loads("\n".join(out))


def test_the_table(edt):
    status, out, err = edt("patch", "OCC", "--rule", "threshold", "--threshold", -1)
    assert (status, err) == (0, [])
    assert out[:2] == [
        "CCO",
        "3 heavy atoms, 3 patches (entropy, threshold, threshold -1.000)",
    ]
    assert out[3].split() == [
        *("patch", "size", "symbols", "atoms", "opened", "by", "entropy", "(nats)")
    ]
    (patched,) = patch_molecules([read_molecule("CCO")], shipped.predictor())
    _, second, third = (f"{entropy:.3f}" for entropy in patched.entropies)
    # The oxygen, last in the canonical SMILES, is atom 0 of the one that was given.
    assert [line.split() for line in out[4:]] == [
        ["0", "1", "C", "2", "-", "-"],
        ["1", "1", "C", "1", "C", "1", second],
        ["2", "1", "O", "0", "O", "0", third],
    ]


def test_fragments(edt):
    status, out, _ = edt("patch", ASPIRIN, "--source", "brics")
    assert status == 0 and out[1] == "13 heavy atoms, 4 patches (brics)"
    assert [line.split() for line in out[4:]] == [
        ["0", "3", "CCO", "0", "1", "2", "-", "-"],
        ["1", "1", "O", "3", "-", "-"],
        ["2", "6", "CCCCCC", "4", "5", "6", "7", "8", "9", "-", "-"],
        ["3", "3", "COO", "10", "11", "12", "-", "-"],
    ]


@pytest.mark.parametrize("smiles", [ASPIRIN, OTHERWISE])
def test_json_counts_atoms_as_the_smiles_does(edt, smiles):
    told = as_json(edt, smiles)
    mol = Chem.MolFromSmiles(smiles)
    assert told["smiles"] == ASPIRIN and told["unit"] == "nats"
    assert [atom["index"] for atom in told["atoms"]] == list(range(13))
    assert [atom["symbol"] for atom in told["atoms"]] == [a.GetSymbol() for a in mol.GetAtoms()]
    for patch in told["patches"]:
        own = [atom["index"] for atom in told["atoms"] if atom["patch"] == patch["id"]]
        assert sorted(patch["atoms"]) == own
        assert patch["opened_by"] is None or patch["opened_by"] == patch["atoms"][0]


def test_options_reach_the_cut(edt):
    assert len(as_json(edt, ASPIRIN, "--max-patches", 1)["patches"]) == 1
    sizes = [len(patch["atoms"]) for patch in as_json(edt, ASPIRIN, "--max-size", 2)["patches"]]
    assert max(sizes) == 2
    sizes = [len(patch["atoms"]) for patch in as_json(edt, ASPIRIN, "--min-size", 5)["patches"]]
    assert min(sizes[:-1]) >= 5
    told = as_json(edt, ASPIRIN, "--rule", "rising_edge", "-q", 1.0)
    highest = max(atom["entropy"] for atom in told["atoms"])
    assert told["threshold"] == pytest.approx(highest) and len(told["patches"]) == 1
    assert as_json(edt, ASPIRIN, "--rule", "published")["entropy_after_atom"]


def test_bits(edt):
    nats, bits = as_json(edt, "CCO"), as_json(edt, "CCO", "--unit", "bits")
    assert bits["unit"] == "bits"
    ratios = [
        b["entropy"] / n["entropy"] for n, b in zip(nats["atoms"], bits["atoms"], strict=True)
    ]
    assert ratios == pytest.approx([1.442695] * 3, rel=1e-5)


def test_pictures_are_written(edt, tmp_path):
    files = [tmp_path / name for name in ("a.svg", "a.png", "b.svg")]
    names = ("--svg", "--png", "--curve")
    options = [part for pair in zip(names, files, strict=True) for part in pair]
    status, out, err = edt("patch", ASPIRIN, *options)
    assert (status, err) == (0, []) and out[0] == ASPIRIN
    svg, png, curve = (path.read_bytes() for path in files)
    assert b"</svg>" in svg and b"class='atom-12'" in svg
    assert png.startswith(b"\x89PNG")
    assert b"</svg>" in curve and b"atom-12" not in curve
    edt("patch", ASPIRIN, "--curve", tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("smiles", ["[Na+]", "*", "[2H]O[2H]", "[Na+].[Cl-]", "C" * 300])
def test_unusual_molecules(edt, tmp_path, smiles):
    options = ("--svg", tmp_path / "a.svg", "--curve", tmp_path / "b.svg")
    status, out, err = edt("patch", smiles, *options)
    assert (status, err) == (0, []) and len(out) > 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["C1CC"], "SMILES 'C1CC' cannot be read: unclosed ring"),
        (["CCO", "--source", "x"], "--source must be entropy or brics, got x"),
        (["CCO", "--unit", "x"], "--unit must be nats or bits, got x"),
        (
            ["CCO", "--source", "brics", "-q", "0.5"],
            "-q needs --source entropy, got --source brics",
        ),
        (
            ["CCO", "--source", "brics", "--max-size", "2"],
            "--max-size needs --source entropy, got --source brics",
        ),
        (["CCO", "--min-size", "0"], "min_size must be at least 1, got 0"),
        (["CCO", "--rule", "threshold"], "rule 'threshold' requires a threshold, got None"),
        (["CCO", "--out", "x.csv"], "--out needs a FILE, got 'CCO'"),
        (["CCO", "--rows", "3"], "--rows needs a FILE, got 'CCO'"),
        (["x.csv", "--svg", "x.svg"], "--svg needs a SMILES, got 'x.csv'"),
        (["x.smi.gz", "--json"], "--json needs a SMILES, got 'x.smi.gz'"),
        (["x.csv"], "no such file: x.csv"),
        (["CCO", "--svg", "x.png"], "--svg must end in .svg, got x.png"),
        (["CCO", "--png", "x"], "--png must end in .png, got x"),
        (["CCO", "--curve", "x.pdf"], "--curve must end in .png or .svg, got x.pdf"),
        (["CCO", "--svg", "no/x.svg"], "--svg must be in a folder that exists, got no/x.svg"),
        (
            ["CCO", "--png", "x.png", "--curve", "x.png"],
            "--curve must be another file than the molecule's, got x.png",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_told_in_one_line_and_nothing_is_written(
    fails, tmp_path, arguments, message
):
    assert fails("patch", *arguments) == message
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_rule_and_a_folder_as_a_picture(fails, tmp_path):
    assert fails("patch", "CCO", "--rule", "x").startswith("rule must be one of 'local_max'")
    folder = tmp_path / "a.svg"
    folder.mkdir()
    assert (
        fails("patch", "CCO", "--svg", folder) == f"--svg must be a file, got the folder {folder}"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_closed_folder(fails, tmp_path):
    tmp_path.chmod(0o500)
    assert fails("patch", "CCO", "--svg", "a.svg") == "--svg cannot be written: a.svg"


def test_a_package_without_models_says_so(fails, monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "folder", lambda: tmp_path)
    assert fails("patch", "CCO") == f"the shipped models are not in {tmp_path}"


def test_transformers_stay_out():
    code = (
        "import sys; from edt_former.cli.main import main\n"
        "main(['patch', 'CCO', '--svg', 'a.svg', '--source', 'brics'])\n"
        "print(sorted({'transformers', 'matplotlib.pyplot', 'torch'} & set(sys.modules)))"
    )
    if not shipped.connectors():
        pytest.skip("the trained models are not in this checkout")
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.splitlines()[-1] == "['torch']"


FILE = """name,smiles
ethanol,OCC
broken,C1CC
,O=CN
nothing,
"""


class TestFile:
    @pytest.fixture
    def molecules(self, tmp_path):
        path = tmp_path / "molecules.csv"
        path.write_text(FILE)
        return path

    def test_rows_that_cannot_be_read_are_told_and_counted(self, edt, molecules):
        status, out, err = edt("patch", molecules, "--rule", "threshold", "--threshold", -1)
        assert (status, err) == (0, [])
        assert out[0].split() == ["molecule", "atoms", "patches", "symbols"]
        assert [line.split() for line in out[1:5]] == [
            ["ethanol", "3", "3", "C", "C", "O"],
            ["broken", "-", "-", "unclosed", "ring"],
            ["O=CN", "3", "3", "N", "C", "O"],
            ["nothing", "-", "-", "empty", "SMILES"],
        ]
        assert out[5:] == ["", "4 rows, 2 cut, 2 not cut"]

    def test_all_rows_are_written_in_the_order_of_their_smiles(self, edt, molecules, tmp_path):
        path = tmp_path / "patches.csv"
        cut = ("--rule", "threshold", "--threshold", -1)
        status, out, _ = edt("patch", molecules, "--out", path, "--rows", 1, *cut)
        assert status == 0 and out[-1] == "4 rows, 2 cut, 2 not cut; 3 of them not shown"
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["smiles"] for row in rows] == ["OCC", "C1CC", "O=CN", ""]
        assert [row["reason"] for row in rows] == ["", "unclosed ring", "", "empty SMILES"]
        assert [row["ids"] for row in rows] == ["2 1 0", "", "2 1 0", ""]
        assert [row["atoms"] for row in rows] == ["3", "", "3", ""]
        assert [row["patches"] for row in rows] == ["3", "", "3", ""]
        (patched,) = patch_molecules([read_molecule("OCC")], shipped.predictor())
        assert [float(h) for h in rows[0]["entropies"].split()] == pytest.approx(
            patched.in_callers_order(patched.entropies), abs=1e-4
        )

    def test_long_rows_are_cut_short_on_the_terminal(self, edt, tmp_path):
        (tmp_path / "a.smi").write_text("C" * 200 + " " + "x" * 50)
        status, out, _ = edt("patch", tmp_path / "a.smi")
        assert status == 0 and len(out[1]) < 120 and out[1].endswith("…")

    def test_what_was_written_outlives_a_file_that_cannot_be_read(self, fails, tmp_path):
        (tmp_path / "old.csv").write_text("kept")
        (tmp_path / "x.csv").write_text("x,y\n1,2\n")
        assert "has no SMILES column" in fails("patch", "x.csv", "--out", "old.csv")
        (tmp_path / "x.csv").write_text("smiles\n")
        assert "x.csv has no rows" in fails("patch", "x.csv", "--out", "old.csv")
        assert "--out must be another file" in fails("patch", "x.csv", "--out", "x.csv")
        assert (tmp_path / "old.csv").read_text() == "kept"

    def test_files_without_a_molecule_and_folders_that_are_missing(self, fails, tmp_path):
        (tmp_path / "a.smi").write_text("C1CC\nbad\n")
        assert fails("patch", "a.smi") == "a.smi has no valid molecule in 2 rows: unclosed ring"
        message = "--out must be in a folder that exists, got no/out.csv"
        assert fails("patch", "a.smi", "--out", "no/out.csv") == message


def test_patches_are_altered_on_request(edt):
    salt = "[Na+].CC(=O)[O-]"
    whole = as_json(edt, salt, "--rule", "threshold", "--threshold", 99)
    pieces = as_json(edt, salt, "--rule", "threshold", "--threshold", 99, "--connected")
    assert (len(whole["patches"]), len(pieces["patches"])) == (1, 2)
    assert len(as_json(edt, ASPIRIN, "--tokens", 9)["patches"]) == 9
    drawn = [as_json(edt, ASPIRIN, "--control", "shuffled")["patches"] for _ in range(2)]
    plain = as_json(edt, ASPIRIN)["patches"]
    assert drawn[0] == drawn[1] != plain
    assert sorted(len(p["atoms"]) for p in drawn[0]) == sorted(len(p["atoms"]) for p in plain)


def test_entropies_of_other_sources(edt):
    found = [
        [atom["entropy"] for atom in as_json(edt, "OCCO", "--entropy-source", source)["atoms"]]
        for source in ("next_atom", "surprisal", "node")
    ]
    assert found[2] == pytest.approx([0.6365, 0.6931, 0.6931, 0.6365], abs=1e-4)
    assert found[0] != found[1]
    status, _, err = edt("patch", "OCCO", "--entropy-source", "graph")
    assert status == 2 and "entropy_source must be one of" in err[-1]


def test_stats_of_a_file(edt, tmp_path):
    file = tmp_path / "molecules.smi"
    file.write_text("CCO ethanol\nC1CC broken\n[Na+].CC(=O)[O-] acetate\n")
    status, out, _ = edt("patch", file, "--stats", "--source", "brics", "--control", "shuffled")
    assert status == 0
    assert [line.split("  ")[0] for line in out[1:5]] == [
        *("brics", "entropy, local_max", "entropy, rising_edge", "as asked")
    ]
    assert out[-2:] == ["2 molecules, 8 atoms; 1 rows not read", "  1: unclosed ring"]
    status, out, _ = edt("patch", file, "--stats", "--json")
    stats = json.loads("\n".join(out))
    assert stats["molecules"] == 2 and stats["cuts"]["brics"]["patches"] == 1.5
    assert stats["cuts"]["brics"]["connected"] == 1
    for given, message in (
        (("--out", tmp_path / "a.csv"), "--out does not go with --stats"),
        (("--svg", tmp_path / "a.svg"), "--svg does not go with --stats"),
    ):
        status, _, err = edt("patch", file, "--stats", *given)
        assert status == 2 and message in err[-1]
    status, _, err = edt("patch", "CCO", "--stats")
    assert status == 2 and "--stats needs a FILE" in err[-1]
