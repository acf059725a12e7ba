"""Which frozen parts a checkpoint was trained with, and where they are."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edt_former import shipped
from edt_former.language.frozen import content_hash, read_weights, write_json

if TYPE_CHECKING:
    from typing import Self

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FrozenPart:
    """One frozen part.

    Attributes:
        sha256: `content_hash` of its weights.
        path: its folder; None where the checkpoint does not know. On disk it is relative to the
            checkpoint's folder.
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
                path = part["path"] and os.path.normpath(root / part["path"])
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
            path = part.path and Path(os.path.relpath(part.path, self.root)).as_posix()
            parts[name] = asdict(replace(part, path=path))
        write_json(self.root / MANIFEST, {"parts": parts})

    def folder(self, part: str) -> Path:
        """Where a part is: where the manifest says, or else among the models of this package.

        Raises:
            FileNotFoundError: the manifest does not say, or nothing is there.
        """
        known = self.parts.get(part, FrozenPart(""))
        if known.path is not None and Path(known.path).is_dir():
            return Path(known.path)
        if (folder := _shipped_folder(known)) is not None:
            return folder
        where = f"says {known.path}, which is no folder"
        if known.path is None:
            where = f"does not say where it is{f', it was {known.name!r}' if known.name else ''}"
        raise FileNotFoundError(f"{part}= is needed: {self.root / MANIFEST} {where}")


def _shipped_folder(part: FrozenPart) -> Path | None:
    """Where the package has this very part, as it has for whoever moves a checkpoint."""
    folder = shipped.folder() / part.name
    if not part.name or Path(part.name).name != part.name or not folder.is_dir():
        return None
    try:
        same = content_hash(read_weights(folder), without=part.without) == part.sha256
    except (OSError, ValueError):
        return None
    return folder if same else None
