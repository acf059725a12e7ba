from __future__ import annotations

import pytest
from transformers.utils import logging

from edt_former.cli.main import main


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    """As of a process in which `main` comes before transformers."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def edt(capsys):
    """Runs a command: (status, lines on stdout, lines on stderr)."""

    def run(*arguments: str) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        try:
            status = main(list(map(str, arguments)))
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


@pytest.fixture
def fails(edt):
    """Runs a command that must fail with one clear line, and returns it."""

    def run(*arguments: str) -> str:
        status, out, err = edt(*arguments)
        assert status == 2
        assert out == [] and len(err) == 1, (out, err)
        assert err[0].startswith(f"edt {arguments[0]}: error: ")
        return err[0].partition("error: ")[2]

    return run


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    """What a command writes by default goes nowhere else."""
    monkeypatch.chdir(tmp_path)
