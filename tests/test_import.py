"""What an import costs and brings along, and how the native kernels are chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import edt_former
import edt_kernels

LEFT_OUT = ("EDT_NATIVE", "EDT_CPU_ISA", "EDT_CUDA_NATIVE")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(path for path in sys.path if path)
    kept = {k: v for k, v in os.environ.items() if k not in LEFT_OUT}
    return subprocess.run(
        [sys.executable, "-W", "always::RuntimeWarning", "-c", code],
        env={**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = python(code)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_kernels_import_torch_and_nothing_of_the_model_layer():
    loaded = loaded_after("import edt_kernels")
    assert "torch" in loaded
    assert not loaded & {"rdkit", "transformers", "safetensors", "triton", "edt_former"}


def test_connectors_need_neither_rdkit_nor_transformers():
    statement = "from edt_former.connectors import make_connector; import edt_former.tokens"
    loaded = loaded_after(statement)
    assert {"torch", "edt_kernels", "edt_former"} <= loaded
    assert not loaded & {"rdkit", "transformers", "tokenizers"}


def test_the_model_layer_is_imported_when_it_is_used():
    loaded = loaded_after("import edt_former; assert 'MoleculeLM' in dir(edt_former)")
    assert not loaded & {"torch", "rdkit", "transformers"}
    assert {"rdkit", "transformers"} <= loaded_after("from edt_former import MoleculeLM")


def test_matplotlib_is_imported_when_something_is_plotted():
    imports = "import edt_former.report.sections; import edt_former.cli.demo"
    assert "matplotlib" not in loaded_after(imports)
    draw = """
from edt_former.report import draw_patches, entropy_curve
draw_patches("CCO", [0, 0, 1])
import sys; assert "matplotlib" not in sys.modules
entropy_curve("CCO", [1.0, 0.5, 1.0], [0, 0, 1])
assert "matplotlib.pyplot" not in sys.modules  # no window system is asked for
"""
    assert "matplotlib" in loaded_after(draw)


def test_torch_geometric_is_optional():
    hide = "import sys; sys.modules['torch_geometric'] = None\n"
    used = "import edt_former.compat, edt_former.processor\n"
    result = python(hide + used + "import edt_former.compat.pyg")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "ImportError: edt_former.compat.pyg needs torch_geometric: pip install 'edt-kernels[pyg]'"
    )


def test_names_of_the_model_layer():
    from edt_former.model import MoleculeLM

    assert edt_former.MoleculeLM is MoleculeLM
    assert set(edt_former.__all__) <= set(dir(edt_former))
    with pytest.raises(AttributeError, match="module 'edt_former' has no attribute 'nonsense'"):
        _ = edt_former.nonsense
    with pytest.raises(ImportError, match="nonsense"):
        from edt_former import nonsense  # noqa: F401


REPORT = """
import torch, edt_kernels
info = edt_kernels.build_info()
print(info["native"], info["cpu_isa"], *sorted(set(info["ops"].values())), sep="|")
print(info["reason"])
print(edt_kernels.entropy(torch.zeros(1, 4), unit="bits").item())
"""


def test_the_reference_path_on_request():
    result = python(REPORT, EDT_NATIVE="0")
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.splitlines() == [
        "False|None|reference",
        "EDT_NATIVE=0 asks for the reference path",
        "2.0",
    ]


def test_a_missing_native_module_is_said_aloud():
    hide = "import sys; sys.modules['edt_kernels._C'] = None\n"
    result = python(hide + REPORT)
    assert result.returncode == 0
    assert "RuntimeWarning: edt_kernels runs on its slower torch reference path" in result.stderr
    native, reason, value = result.stdout.splitlines()
    assert native == "False|None|reference" and value == "2.0"
    assert reason.startswith("edt_kernels._C cannot be loaded: ")


native = pytest.mark.skipif(
    not edt_kernels.build_info()["native"], reason="the native kernels are not built"
)


@native
def test_native_kernels_are_the_default():
    result = python(REPORT)
    assert result.returncode == 0 and result.stderr == ""
    first, reason, value = result.stdout.splitlines()
    assert first.startswith("True|") and "native" in first.split("|")
    assert reason == "None" and value == "2.0"


@native
def test_the_instruction_set_can_be_chosen():
    result = python(REPORT, EDT_CPU_ISA="scalar")
    assert result.returncode == 0 and result.stdout.startswith("True|scalar|")


@native
def test_an_instruction_set_that_is_not_there_is_an_error():
    result = python("import edt_kernels", EDT_CPU_ISA="neon")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: EDT_CPU_ISA must name a level that this machine has")
    assert "got 'neon'" in last


def test_cuda_kernels_that_were_asked_for_must_be_there():
    hide = "import sys; sys.modules['edt_kernels._C_cuda'] = None\n"
    result = python(hide + "import edt_kernels", EDT_CUDA_NATIVE="1")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: EDT_CUDA_NATIVE=1 asks for the CUDA C++ kernels")
    assert "or unset EDT_CUDA_NATIVE" in last


def test_cuda_kernels_are_not_looked_for_otherwise():
    served = "import edt_kernels\nprint(*set(edt_kernels.build_info()['cuda_ops'].values()))"
    result = python("import sys; sys.modules['edt_kernels._C_cuda'] = None\n" + served)
    assert result.returncode == 0 and "_C_cuda" not in result.stderr
    assert set(result.stdout.split()) <= {"triton", "reference"}
