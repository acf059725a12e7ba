"""Every example in the packages runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import edt_former
import edt_former.compat
import edt_kernels
from edt_former import shipped
from edt_former.connectors import connector
from edt_former.graph import encoder

NEED_THE_SHIPPED_MODELS = {
    "edt_former",
    "edt_former.model",
    "edt_former.processor",
    "edt_former.report",
    "edt_former.report.answers",
    "edt_former.report.patches",
    "edt_former.shipped",
    "edt_former.tasks.evaluation",
}
NEED_AN_EXTRA = {
    "edt_former.compat.pyg": "torch_geometric",
    "edt_former.data.format": "pyarrow",
    "edt_former.data.preparation": "pyarrow",
    "edt_former.tasks.properties": "sklearn",
    "edt_kernels.triton": "triton",
}


def modules() -> list[str]:
    names = []
    for package in (edt_kernels, edt_former):
        found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        names += [package.__name__, *(module.name for module in found)]
    return [name for name in names if not name.endswith(("._C", "._C_cuda"))]


@pytest.mark.parametrize("name", modules())
def test_examples(name, monkeypatch):
    monkeypatch.setattr("edt_former.graph.encoder._ENCODERS", dict(encoder._ENCODERS))
    monkeypatch.setattr("edt_former.connectors.connector._CONNECTORS", dict(connector._CONNECTORS))
    if name in NEED_THE_SHIPPED_MODELS and not shipped.connectors():
        pytest.skip("the trained models are not in this checkout")
    for needy, extra in NEED_AN_EXTRA.items():
        if name == needy or name.startswith(f"{needy}."):
            pytest.importorskip(extra, reason=f"{name} needs {extra}, which is not installed")
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("name", edt_kernels.__all__)
def test_every_public_function_has_an_example(name):
    documented = inspect.getdoc(getattr(edt_kernels, name))
    assert documented and documented.splitlines()[0].endswith((".", ":", "?"))
    if inspect.isfunction(getattr(edt_kernels, name)):
        assert ">>> " in documented


@pytest.mark.parametrize("name", edt_kernels.nn.__all__)
def test_every_module_has_an_example(name):
    assert ">>> " in inspect.getdoc(getattr(edt_kernels.nn, name))


def test_public_names_are_sorted_and_there():
    for package in (edt_kernels, edt_kernels.nn, edt_former, edt_former.compat):
        assert package.__all__ == sorted(package.__all__)
        assert all(hasattr(package, name) for name in package.__all__)
