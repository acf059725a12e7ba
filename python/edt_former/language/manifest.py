"""Which frozen parts a checkpoint was trained with, and where they are."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edt_former import shipped
from edt_former.language.frozen import write_json

if TYPE_CHECKING:
    from typing import Self

MANIFEST = "manifest.json"
SHIPPED = "shipped:"
"""In front of the name of a part that is among the models of the package."""


@dataclass(frozen=True)
class FrozenPart:
    """One frozen part.

    Attributes:
        sha256: `content_hash` of its weights.
        path: its folder; None where the checkpoint does not know. On disk it is relative to the
            checkpoint's folder, or "shipped:" and its name among the models of the package.
        name: what it is called where it came from.
        without: weights that the hash leaves out, because the checkpoint holds them.
    """

    sha256: str
    path: str | None = None
    name: str = ""
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The frozen parts of the checkpoint in `root`, by name."""

    root: Path
    parts: dict[str, FrozenPart]

    @classmethod
    def read(cls, root: Path | str) -> Self:
        """Reads `manifest.json` of a checkpoint.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is of something else, or damaged.
        """
        root = Path(root)
        parts = {}
        text = (root / MANIFEST).read_bytes()
        try:
            for name, part in json.loads(text)["parts"].items():
                path = part["path"] and _found(root, part["path"])
                left_out = tuple(part["without"])
                parts[name] = FrozenPart(**{**part, "path": path, "without": left_out})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{root} must be the folder of a checkpoint, its {MANIFEST} is not: {error!r}"
            ) from error
        return cls(root, parts)

    def write(self) -> None:
        """Writes `manifest.json`."""
        parts = {}
        for name, part in self.parts.items():
            path = part.path and _told(self.root, Path(part.path))
            parts[name] = asdict(replace(part, path=path))
        write_json(self.root / MANIFEST, {"parts": parts})

    def folder(self, part: str) -> Path:
        """Where a part is.

        Raises:
            FileNotFoundError: the manifest does not say, or nothing is there.
        """
        path = self.parts[part].path if part in self.parts else None
        if path is None or not Path(path).is_dir():
            named = self.parts[part].name if part in self.parts else ""
            where = f"does not say where it is{f', it was {named!r}' if named else ''}"
            if path is not None:
                where = f"says {path}, which is no folder"
            raise FileNotFoundError(f"{part}= is needed: {self.root / MANIFEST} {where}")
        return Path(path)


def _told(root: Path, path: Path) -> str:
    """How the manifest of a checkpoint in `root` writes the folder of a part."""
    models = shipped.folder().resolve()
    if path.resolve().is_relative_to(models) and not root.resolve().is_relative_to(models):
        return f"{SHIPPED}{path.resolve().relative_to(models).as_posix()}"
    return Path(os.path.relpath(path, root)).as_posix()


def _found(root: Path, told: str) -> str:
    """The folder of a part that a manifest in `root` writes so."""
    if told.startswith(SHIPPED):
        return str(shipped.folder() / told.removeprefix(SHIPPED))
    return os.path.normpath(root / told)
