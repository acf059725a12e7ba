"""Whatever is off is found and told, with what to do about it; nothing makes the doctor fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import edt_kernels
from edt_former import doctor, shipped
from edt_former.doctor import NOTE, OK, PROBLEM, Finding

ROOT = Path(edt_kernels.__file__).parents[1]
INFO = {
    "native": True,
    "reason": None,
    "file": "/somewhere/edt_kernels/_C.abi3.so",
    "cpu_isa": "avx2",
    "ops": {"entropy": "native", "entropy_bwd": "native", "splice": "reference"},
}


def one(look) -> Finding:
    (finding,) = look()
    return finding


def test_every_subject_is_looked_at_and_told_in_a_line():
    findings = doctor.examine()
    subjects = {finding.subject for finding in findings}
    assert {"python", "torch", "numpy", "rdkit", "transformers", "safetensors"} <= subjects
    assert {"processor", "threads", "native kernels", "compiler", "GPU", "triton"} <= subjects
    assert "extra selfies" in subjects
    for finding in findings:
        assert finding.state in (OK, NOTE, PROBLEM) and finding.told
        assert "\n" not in finding.told + finding.remedy
        if finding.state == OK:
            assert not finding.remedy
    json.dumps(doctor.to_json(findings))


def test_a_look_that_fails_is_a_problem_and_the_others_go_on(monkeypatch):
    def fails():
        raise KeyError("x\ny")

    def leaves():
        raise SystemExit(7)

    looks = {"first": fails, "second": leaves, "python": doctor._python}
    monkeypatch.setattr(doctor, "LOOKS", looks)
    first, second, python = doctor.examine()
    assert first == Finding("first", PROBLEM, r"cannot be examined: KeyError: 'x\ny'")
    assert second.told == "cannot be examined: SystemExit: 7"
    assert python.state == OK
    assert not doctor.to_json([first, python])["healthy"]
    assert doctor.to_json([python])["healthy"]


@pytest.mark.parametrize(
    ("requirement", "state", "told", "remedy"),
    [
        pytest.param("numpy", OK, "", "", id="there"),
        pytest.param(
            "no-such-package>=2",
            PROBLEM,
            "not installed",
            'pip install "no-such-package>=2"',
            id="missing",
        ),
        pytest.param(
            "numpy>=99", PROBLEM, ", >=99 is required", 'pip install "numpy>=99"', id="too old"
        ),
    ],
)
def test_requirements(requirement, state, told, remedy):
    finding = doctor._requirement(Requirement(requirement))
    assert (finding.state, finding.remedy) == (state, remedy) and told in finding.told


def test_a_package_that_is_installed_and_broken(monkeypatch):
    monkeypatch.setitem(doctor.IMPORTED, "numpy", ("numpy", "no_such_function"))
    finding = doctor._requirement(Requirement("numpy"))
    assert finding.state == PROBLEM and "is broken: AttributeError" in finding.told
    assert finding.remedy == 'pip install --force-reinstall "numpy"'


def test_requirements_of_an_extra_are_its_own(monkeypatch):
    told = ["torch>=2.11", 'selfies; extra == "selfies"', 'old; python_version < "3"']
    monkeypatch.setattr(doctor, "requires", lambda _: told)
    assert [r.name for r in doctor._required("")] == ["torch"]
    assert [r.name for r in doctor._required("selfies")] == ["selfies"]


def test_the_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGE", "no-such-package")
    finding = one(doctor._package)
    assert finding.state == PROBLEM and finding.told.startswith("not installed, run from ")


@pytest.mark.parametrize(
    ("count", "environment", "state", "remedy"),
    [
        (8, {}, OK, ""),
        (1, {"OMP_NUM_THREADS": "1"}, NOTE, "unset OMP_NUM_THREADS to use all"),
        (4, {}, NOTE, "torch.set_num_threads(...) to use all"),
        (8, {"OMP_WAIT_POLICY": "PASSIVE"}, OK, ""),
    ],
)
def test_threads(monkeypatch, count, environment, state, remedy):
    found = {"torch": count, "environment": environment}
    monkeypatch.setattr(doctor, "threads", lambda: found)
    monkeypatch.setattr(doctor, "cores", lambda: 8)
    finding = one(doctor._threads)
    assert (finding.state, finding.remedy) == (state, remedy)
    assert finding.told.startswith(f"torch uses {count} of 8 cores")


class TestKernels:
    @pytest.fixture(autouse=True)
    def _nothing_is_chosen(self, monkeypatch):
        monkeypatch.delenv("EDT_CPU_ISA", raising=False)

    def test_all_is_well(self):
        finding = doctor._native(INFO)
        assert (finding.state, finding.remedy) == (OK, "")
        assert finding.told == f"avx2, {INFO['file']}, no sources beside it"

    def test_a_level_that_is_chosen(self, monkeypatch):
        monkeypatch.setenv("EDT_CPU_ISA", "avx2")
        finding = doctor._native(INFO)
        assert finding.state == NOTE and finding.told.endswith(", chosen by EDT_CPU_ISA")
        assert finding.remedy == "unset EDT_CPU_ISA for the best of this processor"

    @pytest.mark.parametrize(
        ("value", "remedy"),
        [("0", "unset EDT_NATIVE"), ("", "EDT_NATIVE=1 pip install -e . shows what fails")],
    )
    def test_no_native_module(self, monkeypatch, value, remedy):
        monkeypatch.setenv("EDT_NATIVE", value)
        info = {**INFO, "native": False, "cpu_isa": None, "reason": "the reason"}
        finding = doctor._native(info)
        assert (finding.state, finding.told) == (PROBLEM, "the reason")
        assert finding.remedy.startswith(remedy)

    def test_who_serves_an_op_and_why(self):
        finding = doctor._ops(INFO)
        assert finding.state == OK
        assert finding.told == (
            "native (native module, avx2): entropy; reference (no native kernel for this op): "
            "splice"
        )
        assert finding.data["entropy_bwd"] == {"backend": "native", "why": "native module, avx2"}
        info = {**INFO, "native": False, "reason": "why", "ops": {"splice": "reference"}}
        assert doctor._ops(info).told == "reference (why): splice"

    def test_a_backward_that_is_served_otherwise_is_named(self):
        info = {**INFO, "ops": {"entropy": "native", "entropy_bwd": "reference"}}
        assert doctor._ops(info).told == (
            "native (native module, avx2): entropy; reference (no native kernel for this op): "
            "entropy_bwd"
        )


def test_who_serves_the_gpu(monkeypatch):
    ops = {"splice": "triton", "entropy": "reference"}
    finding = doctor._gpu_ops({"cuda_ops": ops, "triton": "3.9.0"})
    assert (finding.state, finding.remedy) == (OK, "")
    assert finding.told == (
        "triton (Triton 3.9.0): splice; reference (no Triton kernel for this op): entropy"
    )
    assert finding.data["splice"] == {"backend": "triton", "why": "Triton 3.9.0"}
    finding = doctor._gpu_ops({"cuda_ops": {"splice": "reference"}, "triton": None})
    assert (finding.state, finding.remedy) == (PROBLEM, "pip install triton")
    assert finding.told == "reference (Triton is not installed): splice"
    ops = {"entropy": "triton", "splice": "native, unmeasured"}
    finding = doctor._gpu_ops({"cuda_ops": ops, "triton": "3.9.0"})
    assert finding.state == NOTE and "unset EDT_CUDA_NATIVE" in finding.remedy
    assert finding.told.startswith("native, unmeasured (CUDA C++ that nobody has timed on a GPU")
    monkeypatch.delenv("EDT_CUDA_NATIVE", raising=False)
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert ("ops on the GPU" in {f.subject for f in doctor._kernels()}) == there


@pytest.mark.parametrize(
    ("driver", "cuda", "hidden", "state", "remedy"),
    [
        pytest.param(None, None, False, NOTE, "", id="no GPU"),
        pytest.param(None, "13.0", False, NOTE, "", id="no GPU for a CUDA torch"),
        pytest.param("580", None, False, PROBLEM, "install a CUDA build of torch", id="CPU torch"),
        pytest.param("470", "13.0", False, PROBLEM, "update the driver", id="old driver"),
        pytest.param("580", "13.0", True, NOTE, "unset CUDA_VISIBLE_DEVICES", id="hidden"),
    ],
)
def test_a_gpu_that_torch_does_not_use(monkeypatch, driver, cuda, hidden, state, remedy):
    monkeypatch.setattr(doctor, "gpu", lambda: None)
    monkeypatch.setattr(doctor, "driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finding = one(doctor._gpu)
    assert finding.state == state and finding.remedy.startswith(remedy)
    assert bool(finding.remedy) == bool(remedy)


def test_a_gpu_that_is_used(monkeypatch):
    found = {"name": "A GPU", "capability": "9.0", "memory": 1, "driver": "580"}
    monkeypatch.setattr(doctor, "gpu", lambda: found)
    finding = one(doctor._gpu)
    assert (finding.state, finding.told) == (OK, "A GPU, capability 9.0, driver 580")


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    finding = one(doctor._compiler)
    assert finding.state == NOTE and finding.told == "none of c++, g++, clang++ runs"
    monkeypatch.setenv("CXX", "icpx")
    assert one(doctor._compiler).told == "none of icpx runs"


def test_triton(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert one(doctor._triton).told == "not installed, needed on a GPU only"
    monkeypatch.setattr(doctor, "_version", lambda name: "9.9")
    monkeypatch.setitem(sys.modules, "triton", None)
    finding = one(doctor._triton)
    assert finding.state == NOTE and finding.told.startswith("9.9 cannot be imported: ")
    assert finding.remedy == "pip install --force-reinstall triton==9.9"


def test_extras_and_how_to_have_them(monkeypatch):
    told = ['selfies; extra == "selfies"', 'torch-geometric; extra == "pyg"']
    monkeypatch.setattr(doctor, "requires", lambda _: told)
    monkeypatch.setattr(doctor, "_version", {"torch-geometric": "2.8", "selfies": None}.get)
    findings = {f.subject: f for f in doctor._extras()}
    assert findings["extra pyg"].state == OK
    assert findings["extra pyg"].told == "torch-geometric 2.8"
    missing = findings["extra selfies"]
    assert (missing.state, missing.told) == (NOTE, "selfies missing")
    assert missing.remedy == "pip install selfies, or -e '.[selfies]' in a checkout"


class TestModels:
    def test_all_is_well(self, as_shipped):
        finding = one(doctor._models)
        assert finding.state == OK and finding.told.startswith(
            "edt_former, edt_former_3d, edt_former_both, qformer_32; "
        )

    def test_there_are_none(self, monkeypatch, tmp_path):
        monkeypatch.setattr(shipped, "folder", lambda: tmp_path)
        finding = one(doctor._models)
        assert (finding.state, finding.told) == (PROBLEM, f"not in {tmp_path}")

    @pytest.mark.parametrize(
        ("part", "damage"),
        [
            ("graph_encoder", "cut off"),
            ("graph_encoder", "gone"),
            ("graph_encoder", "changed"),
            ("qformer_32", "cut off"),
            ("qformer_32", "gone"),
        ],
    )
    def test_a_file_is_damaged(self, as_shipped, monkeypatch, tmp_path, part, damage):
        shutil.copytree(as_shipped, tmp_path / "copy")
        monkeypatch.setattr(shipped, "folder", lambda: tmp_path / "copy")
        weights = tmp_path / "copy" / part / "model.safetensors"
        content = weights.read_bytes()
        if damage == "gone":
            weights.unlink()
        elif damage == "cut off":
            weights.write_bytes(content[:-1])
        else:
            weights.write_bytes(content[:-1] + bytes([content[-1] ^ 64]))
        finding = one(doctor._models)
        assert finding.state == PROBLEM and " is damaged: " in finding.told
        assert finding.remedy == "install the package again"


def examined(path: list[Path], folder: Path, **environment: str) -> dict[str, dict]:
    """Findings by subject of a process of its own, run in `folder`."""
    kept = {k: v for k, v in os.environ.items() if k not in ("EDT_NATIVE", "EDT_CPU_ISA")}
    result = subprocess.run(
        [sys.executable, "-m", "edt_former.cli.main", "doctor", "--json"],
        env={
            **kept,
            "PYTHONPATH": os.pathsep.join(map(str, [*path, *filter(None, sys.path)])),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr == ""
    told = json.loads(result.stdout)
    assert told["healthy"] is False
    return {finding["subject"]: finding for finding in told["findings"]}


def test_the_reference_path_on_request(tmp_path):
    found = examined([], tmp_path, EDT_NATIVE="0")
    assert found["native kernels"]["told"] == "EDT_NATIVE=0 asks for the reference path"
    assert found["native kernels"]["remedy"] == "unset EDT_NATIVE"
    assert {op["backend"] for op in found["ops"]["data"].values()} == {"reference"}


@pytest.mark.skipif(not edt_kernels.build_info()["native"], reason="the kernels are not built")
def test_a_native_module_of_other_sources_is_explained(tmp_path):
    """Then nothing of `edt_kernels` can be imported."""
    shutil.copytree(ROOT / "edt_kernels", tmp_path / "edt_kernels")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "new.cpp").write_text("// another")
    found = examined([tmp_path], tmp_path)
    assert found["native kernels"]["state"] == PROBLEM
    assert "is not built from" in found["native kernels"]["told"]
    assert found["native kernels"]["remedy"].startswith("build it again: pip install -e .")
    assert found["edt-kernels"]["state"] == OK and found["torch"]["state"] == OK


@pytest.mark.parametrize(
    ("package", "also"),
    [
        ("transformers", "shipped models"),
        ("torch", "native kernels"),
        ("rdkit", "shipped models"),
    ],
)
def test_a_broken_package_is_named(tmp_path, package, also):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise OSError('libmissing.so.1')")
    found = examined([tmp_path], tmp_path)
    assert found[package]["state"] == PROBLEM
    assert found[package]["told"].endswith(" is broken: OSError: libmissing.so.1")
    assert found[also]["told"] == "cannot be examined: OSError: libmissing.so.1"
    assert found["numpy"]["state"] == found["processor"]["state"] == OK
