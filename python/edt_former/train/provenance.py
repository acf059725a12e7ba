"""Where a trained model comes from: what it was told, what it read, what it ran on."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edt_former.data import PreparedData
from edt_former.language.frozen import write_json
from edt_former.train.config import effective

FILE = "provenance.json"
PACKAGES = ("edt-kernels", "torch", "transformers", "rdkit", "numpy")


def describe_run(stage: str, config: Any, data: PreparedData) -> dict[str, Any]:
    """What is written beside the weights of a run.

    Args:
        stage: its name.
        config: all that it was told.
        data: the rows that it trains on.
    """
    return {
        "stage": stage,
        "config": effective(config),
        "data": data.provenance(),
        "rows": len(data),
        "versions": {**{p: version(p) for p in PACKAGES}, "python": platform.python_version()},
    }


def write_provenance(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes `provenance.json`."""
    write_json(folder / FILE, content)


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """What `write_provenance` wrote, None where nothing is."""
    file = folder / FILE
    return json.loads(file.read_text()) if file.is_file() else None
