"""What RDKit logs: nothing, or the reason why it cannot parse a SMILES."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rdkit import Chem, rdBase


class _ErrorLines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


_log_lock = threading.Lock()


class _Quiet:
    """The logs that RDKit had before the first of those who are inside came in."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.levels: list[list[str]] = []

    def enter(self) -> None:
        with self.lock:
            if not self.inside:
                self.levels = _levels()
                for name, _ in self.levels:
                    rdBase.DisableLog(name)
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                _set_levels(self.levels)


def _levels() -> list[list[str]]:
    """What RDKit logs: (name, "enabled" or "disabled") of every log."""
    return [line.split(":") for line in rdBase.LogStatus().splitlines()]


def _set_levels(levels: list[list[str]]) -> None:
    for name, state in levels:
        (rdBase.EnableLog if state == "enabled" else rdBase.DisableLog)(name)


_logs = _Quiet()


@contextmanager
def quiet() -> Iterator[None]:
    """RDKit logs nothing inside, and what it logged before again afterwards.

    `rdBase.BlockLogs` forgets what it blocked when the log is led elsewhere inside, as
    `parse_error` does. To go in and out costs as much as to read a small molecule, so loops over
    many are inside as a whole: within another `quiet` it costs nothing.
    """
    _logs.enter()
    try:
        yield
    finally:
        _logs.leave()


def parse_error(smiles: str) -> str:
    """RDKit's own words on why it cannot parse `smiles`."""
    logger, handler = logging.getLogger("rdkit"), _ErrorLines()
    with _log_lock:
        handlers, logger.handlers = logger.handlers, [handler]
        levels = _levels()
        rdBase.LogToPythonLogger()
        rdBase.EnableLog("rdApp.error")
        try:
            Chem.MolFromSmiles(smiles)
        finally:
            rdBase.LogToCppStreams()  # switches logs on
            _set_levels(levels)
            logger.handlers = handlers
    lines = [line.strip() for text in handler.lines for line in text.splitlines()]
    if not lines:
        return "RDKit cannot parse the SMILES"
    reason = re.sub(r"^\[[\d:]+\]\s*", "", lines[0]).removeprefix("SMILES Parse Error: ")
    reason = re.sub(r"\s+(while parsing: |for input: ).*$", "", reason)
    position = re.search(r"around position (\d+)", " ".join(lines))
    where = f" at position {position[1]}" if position else ""
    return " ".join(reason.split()) + where
