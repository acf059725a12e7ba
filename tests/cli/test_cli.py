"""The command line as its users meet it: what it prints, what it writes, how it fails."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

import edt_former
from edt_former import shipped
from edt_former.cli import demo
from edt_former.cli.main import COMMANDS, main
from edt_former.report import speed
from edt_former.tasks.heldout import heldout_molecules
from edt_former.tasks.questions import FACTS, QUESTION_TYPES
from edt_former.train.tiny import data, recipe

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
NO_CONFORMER = "F[C@]12C[C@@](F)(C1)C2"
"""Its two chiral centres contradict one another."""
BASELINES = (
    "language model without molecule",
    "constant answer",
    "majority of the size bin",
    "token count alone",
)


@pytest.mark.parametrize(
    "command", [[], *([name] for name in COMMANDS), ["train", "tiny"]], ids=" ".join
)
def test_help_has_an_example(edt, command):
    status, out, err = edt(*command, "--help")
    assert (status, err) == (0, [])
    assert f"example: edt {' '.join(command)}".strip() in " ".join(out)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from edt_former.cli.main import main\n"
        "try: main(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'rdkit', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["describe"], ["train"], ["train", "tiny"]]
)
def test_wrong_usage_is_explained(edt, arguments):
    status, out, err = edt(*arguments)
    assert status == 2 and out == []
    assert err[0].startswith("usage: edt") and ": error: " in err[-1]


@pytest.mark.usefixtures("as_shipped")
class TestDescribe:
    def test_all_questions_with_the_truth_beside(self, edt):
        status, out, err = edt("describe", "OCC")
        assert (status, err) == (0, [])
        assert out[0] == "CCO"
        assert out[1].startswith("3 heavy atoms, ") and out[1].endswith(" tokens in the prompt")
        assert out[3].split() == ["question", "answer", "RDKit"]
        assert len(out) == 4 + len(FACTS)
        for line, fact in zip(out[4:], FACTS, strict=True):
            assert line.startswith(fact.phrasings[0])
        (hydroxyl,) = (line for line in out if line.startswith("Does the molecule have a hydroxyl"))
        assert hydroxyl.endswith("yes")

    def test_questions_of_ones_own(self, edt):
        asked = ["How many rings?", "Is there an ester in it?"]
        status, out, err = edt("describe", ASPIRIN, "--ask", asked[0], "--ask", asked[1])
        assert (status, err) == (0, [])
        assert [line.split()[-1] for line in out[4:]] == ["1", "yes"]

    def test_json(self, edt):
        status, out, err = edt("describe", ASPIRIN, "--ask", "How many rings?", "--json")
        assert (status, err) == (0, [])
        told = json.loads("\n".join(out))
        assert told["smiles"] == ASPIRIN and told["heavy_atoms"] == 13 and told["tokens"] > 4
        (answered,) = told["answers"]
        assert answered["question"] == "How many rings?" and answered["rdkit"] == "1"

    def test_a_question_that_was_not_taught_has_a_note(self, edt):
        status, out, err = edt("describe", "CCO", "--ask", "Is it toxic?")
        assert status == 0 and out[-1].endswith("-")
        assert len(err) == 1
        assert err[0].startswith("note: 'Is it toxic?' is none of the 23 things")

    def test_another_connector(self, edt):
        status, out, _ = edt("describe", "CCO", "--connector", "qformer_32", "--ask", "logP?")
        assert status == 0 and out[1] == "3 heavy atoms, 4 tokens in the prompt"

    def test_a_model_of_ones_own(self, edt, as_shipped):
        status, out, err = edt(
            "describe", "CCO", "--model", as_shipped / "qformer_32", "--ask", "Is it toxic?"
        )
        assert (status, err) == (0, []) and out[0] == "CCO"

    @pytest.mark.parametrize(
        ("smiles", "reason"),
        [
            ("C1CC", "unclosed ring"),
            ("CC(C)(C)(C)C", "Explicit valence for atom # 1 C, 5, is greater than permitted"),
            ("", "empty SMILES"),
            ("CCO CCN", "white space inside the SMILES"),
            ("C€", "a SMILES holds ASCII characters only"),
        ],
    )
    def test_a_smiles_that_cannot_be_read(self, fails, smiles, reason):
        assert fails("describe", smiles) == f"SMILES {smiles!r} cannot be read: {reason}"

    def test_a_file_is_for_another_command(self, fails, tmp_path):
        path = tmp_path / "a.smi"
        path.write_text("CCO")
        assert fails("describe", str(path)).endswith(
            f"; for the molecules of a file: edt demo {path}"
        )

    def test_an_unknown_connector(self, fails):
        message = fails("describe", "CCO", "--connector", "nonsense")
        names = "'edt_former', 'edt_former_3d', 'edt_former_both', 'qformer_32'"
        assert message == f"connector must be one of {names}, got 'nonsense'"

    @pytest.mark.parametrize("encoder", ["2d", "3d", "both"])
    def test_an_encoder(self, edt, encoder, monkeypatch):
        loaded, load = [], shipped.load
        monkeypatch.setattr(shipped, "load", lambda name: loaded.append(name) or load(name))
        status, out, err = edt("describe", "OCC", "--encoder", encoder, "--ask", "logP?")
        assert (status, err, out[0]) == (0, [], "CCO")
        assert loaded == [shipped.ENCODERS[encoder]]

    def test_an_encoder_and_a_connector_must_agree(self, edt, fails):
        options = ("--encoder", "2d", "--connector", "qformer_32")
        assert edt("describe", "CCO", *options, "--ask", "logP?")[0] == 0
        message = fails("describe", "CCO", "--encoder", "3d", "--connector", "qformer_32")
        assert message == "--encoder must be 2d with --connector qformer_32, got 3d"
        message = fails("demo", "--encoder", "2d", "--connector", "edt_former_both")
        assert message == "--encoder must be both with --connector edt_former_both, got 2d"

    def test_a_molecule_without_a_conformer(self, fails):
        message = fails("describe", NO_CONFORMER, "--encoder", "3d")
        assert message.startswith("molecule 0 ('") and "embed" in message

    def test_a_model_that_is_not_there(self, fails, tmp_path):
        missing = tmp_path / "nowhere"
        assert fails("describe", "CCO", "--model", missing) == (
            f"--model must be a folder, got {missing}"
        )
        assert "manifest.json" in fails("describe", "CCO", "--model", tmp_path)

    def test_a_molecule_without_room_in_the_prompt(self, fails):
        message = fails("describe", "COCNCSC" * 300, "--ask", "How many rings?")
        assert "tokens" in message and "640" in message

    def test_a_thousand_atoms(self, edt):
        status, out, err = edt("describe", "C" * 1000, "--ask", "How many rings?")
        assert (status, err) == (0, [])
        assert out[1].startswith("1000 heavy atoms, ") and out[-1].split()[-1] == "0"

    def test_the_folder_of_all_models_is_no_model(self, fails, as_shipped):
        message = fails("describe", "CCO", "--model", as_shipped)
        assert message.startswith(f"{as_shipped} must be the folder of a checkpoint")

    def test_a_connector_that_was_saved_alone(self, edt, fails, as_shipped, tmp_path):
        shipped_model = edt_former.load()
        language_model = as_shipped / "language_model"
        model = edt_former.MoleculeLM.from_parts(
            AutoModelForCausalLM.from_pretrained(language_model),
            shipped_model.graph_encoder,
            shipped_model.connector,
            shipped_model.predictor,
            tokenizer=shipped_model.processor.tokenizer,
        )
        model.save_pretrained(tmp_path)
        asked = ("describe", "CCO", "--model", tmp_path, "--ask", "How many rings?")
        assert "language_model= is needed" in fails(*asked)
        status, out, _ = edt(*asked, "--language-model", language_model)
        assert status == 0 and out[-1].startswith("How many rings?")
        assert "belongs to --model" in fails("describe", "C", "--language-model", language_model)
        assert "not with --model" in fails(*asked, "--connector", "mora")

    def test_damaged_weights(self, fails, as_shipped, tmp_path):
        shutil.copytree(as_shipped, tmp_path / "copy")
        weights = tmp_path / "copy" / "graph_encoder" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        message = fails("describe", "CCO", "--model", tmp_path / "copy" / "edt_former")
        assert "model.safetensors is damaged: " in message

    def test_a_damaged_model(self, fails, as_shipped, tmp_path):
        shutil.copytree(as_shipped, tmp_path / "copy")
        (tmp_path / "copy" / "predictor" / "model.safetensors").unlink()
        assert "predictor" in fails("describe", "CCO", "--model", tmp_path / "copy" / "edt_former")

    def test_debug_shows_the_traceback(self, monkeypatch):
        monkeypatch.setenv("EDT_DEBUG", "1")
        with pytest.raises(ValueError, match="unclosed ring"):
            main(["describe", "C1CC"])


def test_a_process_of_its_own_prints_the_answers_and_nothing_else(as_shipped):
    arguments = [
        "describe",
        "OCC",
        "--model",
        as_shipped / "edt_former",
        "--ask",
        "How many rings?",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "edt_former.cli.main", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == "CCO"


def test_a_package_without_models_says_so(fails, monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "folder", lambda: tmp_path)
    assert fails("describe", "CCO") == f"the shipped models are not in {tmp_path}"
    assert fails("demo") == f"the shipped models are not in {tmp_path}"


def test_an_interrupted_command_says_so(edt, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shipped, "folder", interrupt)
    assert edt("describe", "CCO") == (130, [], ["edt describe: interrupted"])


FILE = '''name,smiles
ethanol,CCO
broken,C1CC
,c1ccccc1
nothing,
pentavalent,CC(C)(C)(C)C
"acetamide, the ""amide""",CC(N)=O
'''


@pytest.mark.usefixtures("as_shipped")
class TestFile:
    @pytest.fixture
    def molecules(self, tmp_path):
        path = tmp_path / "molecules.csv"
        path.write_text(FILE)
        return path

    def test_what_was_interrupted_does_not_look_complete(self, edt, molecules, monkeypatch):
        out = molecules.with_name("out.csv")
        out.write_text("what was there\n")
        seen = []

        def stop(row):
            seen.append(row)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return (1,)

        monkeypatch.setattr("edt_former.cli.demo._cells", stop)
        assert edt("demo", molecules, "--out", out)[0] == 130
        assert out.read_text() == "what was there\n"
        partial = molecules.with_name("out.csv.partial")
        assert len(partial.read_text().splitlines()) == 3
        monkeypatch.undo()
        assert edt("demo", molecules, "--out", out)[0] == 0
        assert len(out.read_text().splitlines()) == 7 and not partial.exists()
        link = molecules.with_name("link.csv")
        link.symlink_to(out)
        assert edt("demo", molecules, "--out", link, "--no-report")[0] == 0
        assert link.is_symlink() and len(out.read_text().splitlines()) == 7

    def test_rows_that_cannot_be_read_are_told_and_counted(self, edt, molecules):
        status, out, err = edt("demo", molecules)
        assert (status, err) == (0, [])
        assert out[-3] == "6 rows, 3 answered, 3 not answered"
        assert out[0].split()[:2] == ["molecule", "atoms"]
        assert [line.split()[0] for line in out[1:7]] == [
            "ethanol",
            "broken",
            "c1ccccc1",
            "nothing",
            "pentavalent",
            "acetamide,",
        ]
        assert "unclosed ring" in out[2] and "empty SMILES" in out[4]

    def test_all_rows_are_written_in_order(self, edt, molecules, tmp_path):
        out_file = tmp_path / "answers.csv"
        status, out, _ = edt("demo", molecules, "--out", out_file, "--rows", 2)
        assert status == 0 and out[4].endswith("; 4 of them not shown")
        with out_file.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["smiles"] for row in rows] == [
            "CCO",
            "C1CC",
            "c1ccccc1",
            "",
            "CC(C)(C)(C)C",
            "CC(N)=O",
        ]
        assert rows[0]["name"] == "ethanol" and rows[5]["name"] == 'acetamide, the "amide"'
        assert [bool(row["reason"]) for row in rows] == [False, True, False, True, True, False]
        assert [row["atoms"] for row in rows] == ["3", "", "6", "", "", "4"]
        for row in rows:
            assert all(bool(row[key]) != bool(row["reason"]) for key in demo.ASKED)
            if not row["reason"]:
                assert int(row["tokens"]) == 4 + int(row["patches"])

    def test_other_formats(self, edt, tmp_path):
        (tmp_path / "a.smi").write_text("CCO ethanol\n\nC1CC broken\n")
        with gzip.open(tmp_path / "b.smi.gz", "wt") as file:
            file.write("CCO\nCCN\n")
        for name, last in (
            ("a.smi", "2 rows, 1 answered, 1 not answered"),
            ("b.smi.gz", "2 rows, 2 answered, 0 not answered"),
        ):
            status, out, _ = edt("demo", tmp_path / name, "--no-report")
            assert status == 0 and out[-1] == last

    def test_a_missing_file(self, fails, tmp_path):
        assert fails("demo", tmp_path / "no.csv") == f"no such file: {tmp_path / 'no.csv'}"

    def test_a_file_that_cannot_be_read_leaves_the_output_alone(self, fails, tmp_path):
        (tmp_path / "old.csv").write_text("kept")
        (tmp_path / "x.csv").write_text("x,y\n1,2\n")
        for name in ("no.csv", "x.csv"):
            fails("demo", tmp_path / name, "--out", tmp_path / "old.csv")
            assert (tmp_path / "old.csv").read_text() == "kept"

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.smi", "", "has no rows"),
            ("a.smi", "\n\n  \n", "has no rows"),
            ("a.csv", "smiles,name\n", "has no rows"),
            ("a.csv", "", "has no SMILES column"),
            ("a.csv", "x,y\n1,2\n", "has no SMILES column; its columns are x, y"),
            ("a.smi", "C1CC\nbad\n", "has no valid molecule in 2 rows: unclosed ring"),
            ("a.mol2", "CCO\n", "path must end in .smi, .txt, .csv, .tsv or .sdf"),
            ("a.smi.gz", "CCO\n", "gzip"),
            ("a.csv", "smiles\n" + "C" * 200_000, "200000 atoms, more than max_atoms=4096"),
        ],
    )
    def test_files_without_a_molecule(self, fails, tmp_path, name, content, message):
        path = tmp_path / name
        path.write_text(content)
        assert message in fails("demo", path)

    def test_an_output_that_cannot_be_written(self, fails, molecules, tmp_path):
        missing = tmp_path / "no" / "out"
        for option in ("--out", "--report"):
            message = f"{option} must be in a folder that exists, got {missing}"
            assert fails("demo", molecules, option, missing) == message
            message = f"{option} must be a file, got the folder {tmp_path}"
            assert fails("demo", molecules, option, tmp_path) == message
        message = f"--report must be a file of its own, got {molecules}"
        assert fails("demo", molecules, "--report", molecules) == message
        assert molecules.read_text() == FILE

    def test_the_report_has_the_rows_that_are_shown(self, edt, molecules, tmp_path):
        status, out, _ = edt("demo", molecules, "--rows", 3, "--report", tmp_path / "a.html")
        assert status == 0 and out[-1] == f"report: {tmp_path / 'a.html'}"
        text = (tmp_path / "a.html").read_text(encoding="utf-8")
        answers, _, _ = text.partition("<h2>Patches</h2>")
        assert answers.count('<th scope="row">') == 3
        assert text.count("<img ") == 2 * 2 and "unclosed ring" in text
        assert 'alt="ethanol, ' in text and 'alt="c1ccccc1, ' in text
        assert list(tmp_path.glob("*.html")) == [tmp_path / "a.html"]

    def test_a_static_connector_has_a_report_without_patches(self, edt, molecules, tmp_path):
        status, _, _ = edt("demo", molecules, "--connector", "qformer_32")
        text = (tmp_path / "edt_report.html").read_text(encoding="utf-8")
        assert status == 0 and "<img " not in text and "<h2>Answers</h2>" in text

    def test_a_molecule_without_a_conformer_is_a_row_with_a_reason(self, edt, tmp_path):
        (tmp_path / "a.smi").write_text(
            f"CCO ethanol\nC1CC broken\n{NO_CONFORMER} impossible\nCC\n"
        )
        for encoder, answered in (("2d", 3), ("both", 2)):
            status, out, err = edt("demo", tmp_path / "a.smi", "--encoder", encoder, "--no-report")
            assert (status, err) == (0, [])
            assert out[-1] == f"4 rows, {answered} answered, {4 - answered} not answered"
            assert "unclosed ring" in out[2]
            assert ("RDKit cannot embed" in out[3]) == (encoder == "both")

    def test_the_input_is_not_overwritten(self, fails, molecules):
        assert "--out must be another file" in fails("demo", molecules, "--out", molecules)
        assert molecules.read_text() == FILE

    def test_an_unknown_connector(self, fails, molecules):
        message = fails("demo", molecules, "--connector", "nonsense")
        assert message.startswith("connector must be one of 'edt_former'")


@pytest.mark.usefixtures("as_shipped")
class TestDemo:
    def test_connectors_stand_side_by_side(self, edt, monkeypatch, miniature):
        size = {"width": 16, "layers": 1, "heads": 2, "ffn": 16, "cross_attention_freq": 1}
        monkeypatch.setattr(speed, "PUBLISHED", size)
        recorded = {
            kind: {"value": 0.5, "low": 0.4, "high": 0.6} for kind in (*QUESTION_TYPES, "macro")
        }
        known = {
            "guesses": shipped.manifest()["guesses"],
            "accuracy": {
                "qformer_32": {"known drugs": {"model": recorded}},
                "left_behind": {"known drugs": {"model": recorded}},
            },
        }
        monkeypatch.setattr(shipped, "manifest", lambda: known)
        status, out, _ = edt("demo", "--sample", 2, "--no-report")
        assert status == 0
        place = next(i for i, line in enumerate(out) if line.startswith("Every connector"))
        assert "held-out drugs, as recorded" in out[place]
        assert out[place + 3].split()[:3] == ["qformer_32", "2d", "0.500"]
        status, out, _ = edt("demo", "--sample", 2, "--no-report", "--compare")
        assert status == 0
        place = next(i for i, line in enumerate(out) if line.startswith("Every connector"))
        assert "the 2 drugs of the sample" in out[place]
        shown = {line.split()[0] for line in out[place + 3 : place + 3 + len(shipped.connectors())]}
        assert shown == set(shipped.connectors())

    def test_drugs_accuracy_and_speed(self, edt, monkeypatch, tmp_path):
        size = {"width": 16, "layers": 1, "heads": 2, "ffn": 16, "cross_attention_freq": 1}
        monkeypatch.setattr(speed, "PUBLISHED", size)
        status, out, _ = edt("demo", "--sample", 3)
        text = "\n".join(out)
        assert status == 0
        assert all(any(line.startswith(drug) for line in out) for drug in demo.DRUGS)
        assert "Right answers on 3 of " in text
        assert sum(line.startswith("edt_former, frozen language model") for line in out) == 1
        assert all(any(line.startswith(kind) for line in out) for kind in QUESTION_TYPES)
        speeds = [line for line in out if line.startswith(("EDT-Former", "static Q-Former"))]
        assert len(speeds) == 3 and speeds[0].endswith("1.00")
        assert all(any(line.startswith(f"{who} ") for line in out) for who in BASELINES)
        steps = r"\d+ s: [\d.]+ loading, [\d.]+ eight drugs, [\d.]+ accuracy, [\d.]+ speed"
        assert re.fullmatch(steps, out[-3])

        assert out[-1] == "report: edt_report.html"
        page = (tmp_path / "edt_report.html").read_text(encoding="utf-8")
        titles = re.findall("<h2>(.*?)</h2>", page)
        assert titles == ["Answers", "Accuracy", "Speed", "Patches", "How it was measured"]
        cards = re.findall("<h3>(.*?)</h3>", page)
        assert cards == ["Molecules per second", *demo.DRUGS]
        assert page.count("<img ") == 1 + 2 * len(demo.DRUGS)
        # What is printed stands on the page, from the same results.
        for line in speeds:
            assert all(f">{cell}<" in page for cell in re.split(r"  +", line))

    def test_in_3d_drugs_have_conformers_or_are_drawn(self, edt, monkeypatch, tmp_path):
        size = {"width": 16, "layers": 1, "heads": 2, "ffn": 16, "cross_attention_freq": 1}
        monkeypatch.setattr(speed, "PUBLISHED", size)
        listed = [*heldout_molecules()[:40], ("impossible", NO_CONFORMER)]
        listed += [row for row in heldout_molecules()[40:] if row[0] in demo.DRUGS]
        monkeypatch.setattr("edt_former.tasks.heldout.heldout_molecules", lambda: listed)
        status, out, err = edt("demo", "--sample", len(listed), "--encoder", "3d")
        assert status == 0 and any("making conformers" in line for line in err)
        assert sum(line.startswith("edt_former_3d, frozen language model") for line in out) == 1
        steps = r"\d+ s: [\d.]+ loading, [\d.]+ conformers, [\d.]+ eight drugs, .*"
        assert re.fullmatch(steps, out[-3])
        page = (tmp_path / "edt_report.html").read_text(encoding="utf-8")
        assert f"of {len(listed)} molecules, 1 of them drawn flat" in page
        assert "elements and places of atoms" in page

    def test_options_are_checked(self, fails, tmp_path):
        assert fails("demo", "--sample", 1) == "--sample must be at least 2, got 1"
        assert fails("demo", "--out", tmp_path / "x.csv") == "--out needs a FILE of molecules"
        message = "--report must be in a folder that exists, got no/x.html"
        assert fails("demo", "--report", "no/x.html") == message


class TestTrain:
    def test_missing_data(self, edt, tmp_path):
        status, out, err = edt("train", "tiny", "--data", tmp_path, "--out", tmp_path / "out")
        assert status == 2 and len(err) == 1
        assert err[0].startswith(f"edt train: error: {tmp_path} must hold zinc250k_valid.smi")
        assert len(out) == 2

    @pytest.mark.parametrize("scale", [0, -1, 1.5])
    def test_scale_is_checked(self, fails, tmp_path, scale):
        message = fails("train", "tiny", "--data", tmp_path, "--scale", scale)
        assert message == f"--scale must be in (0, 1], got {float(scale)}"

    def test_it_says_what_is_learned_and_what_is_asked(self, edt, monkeypatch, tmp_path):
        called = []
        monkeypatch.setattr(recipe, "run_recipe", lambda *args, **options: called.append(options))
        status, out, _ = edt("train", "tiny", "--data", tmp_path, "--seed", 3, "--scale", 0.5)
        assert status == 0
        assert called == [{"seed": 3, "processes": 2, "scale": 0.5}]
        assert all(name in out[0] for name in data.SELF_SUPERVISED)
        assert all(fact.key in out[1] for fact in FACTS)


trained = pytest.mark.skipif(
    not shipped.connectors(), reason="the trained models are not in this checkout"
)


@trained
def test_the_shipped_model_answers(edt):
    status, out, err = edt("describe", ASPIRIN, "--ask", "How many aromatic rings?", "--json")
    assert (status, err) == (0, [])
    (answered,) = json.loads("\n".join(out))["answers"]
    assert answered["answer"] == answered["rdkit"] == "1"


@trained
def test_the_shipped_set_is_complete_and_small():
    manifest = shipped.manifest()
    names = {*shipped.ENCODERS.values(), "mora", "qformer_32", "qformer_40"}
    assert names <= set(shipped.connectors())
    assert set(manifest["accuracy"]) == set(shipped.connectors())
    files = [path for path in shipped.folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    absolute = re.compile(r'path": "/')
    assert not [p for p in files if p.suffix == ".json" and absolute.search(p.read_text())]


@trained
def test_the_shipped_edt_former_beats_every_baseline_on_known_drugs():
    """By intervals that do not overlap."""
    answers = shipped.manifest()["accuracy"]["edt_former"]["known drugs"]
    assert set(answers) == {"model", *BASELINES}
    highest = max(answers[who]["macro"]["high"] for who in BASELINES)
    assert answers["model"]["macro"]["low"] > highest
