import doctest
import importlib

import pytest


@pytest.mark.parametrize("n", ["edt_former.report.answers", "edt_former.tasks.evaluation"])
def test_it(n, as_shipped):
    assert doctest.testmod(importlib.import_module(n)).failed == 0
