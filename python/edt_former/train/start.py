"""The folder of a run: what it was told is written there, and must not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edt_former.language.frozen import write_json
from edt_former.train.config import EFFECTIVE, effective
from edt_former.train.ranks import rank, start_processes

MAY_CHANGE = ("out", "data.workers", "training.keep", "training.checkpointing")
"""Keys of a configuration that do not change what is trained."""


def begin(config: Any) -> Path:
    """Makes the folder of a run and saves the effective configuration in it; connects processes.

    Raises:
        ValueError: the folder has a run that was told something else; it names the keys.
    """
    start_processes()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    told, file = effective(config), out / EFFECTIVE
    if file.exists():
        before = json.loads(file.read_text())
        keys = sorted({*_flat(told).items()} ^ {*_flat(before).items()})
        differing = dict.fromkeys(name for name, _ in keys if name not in MAY_CHANGE)
        if differing:
            raise ValueError(
                f"{out} has a run that was told otherwise: {', '.join(differing)} differ; take "
                "another folder, or the old values"
            )
    elif rank() == 0:
        write_json(file, told)
    return out


def _flat(content: Any, prefix: str = "") -> dict[str, str]:
    """Every value by its key with dots, as JSON."""
    if not isinstance(content, dict):
        return {prefix: json.dumps(content)}
    flat = {}
    for name, value in content.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else name)
    return flat
