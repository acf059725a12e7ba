"""Prepared data as a data set of torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from edt_former.data.format import Part, Row, part_paths, read_manifest
from edt_former.tokens.patches import PatchOptions

if TYPE_CHECKING:
    import pyarrow as pa

OPEN_PARTS = 128
"""Files that a process keeps mapped; each costs a file descriptor."""

open_part = lru_cache(OPEN_PARTS)(Part)


class PreparedData(Dataset):
    """The usable rows of one folder of prepared data or several, in the order of their files.

    Rows stay on disk: files are mapped and read where a row is asked for, so a set may be larger
    than memory, and every process of a loader has the same pages.

    Args:
        folders: of `edt prepare`.
        wants: what every row must have, of "text", "turns", "targets", "said" (a text or turns),
            "molecule" (one) and "molecules" (one or more); rows that lack it are left out.

    Raises:
        FileNotFoundError: a folder has no complete data.
        ValueError: an unknown wish; no row is left.
    """

    def __init__(
        self, folders: Path | str | Iterable[Path | str], *, wants: Sequence[str] = ()
    ) -> None:
        unknown = [name for name in wants if name not in _HAVE]
        if unknown:
            raise ValueError(f"wants must be of {', '.join(_HAVE)}, got {unknown[0]!r}")
        single = isinstance(folders, Path | str)
        self.folders = [Path(folder) for folder in ([folders] if single else folders)]
        self.manifests = [read_manifest(folder) for folder in self.folders]
        pairs = zip(self.folders, self.manifests, strict=True)
        self.parts = [str(p) for folder, found in pairs for p in part_paths(folder, found["parts"])]
        chosen = [np.flatnonzero(_wanted(open_part(path), wants)) for path in self.parts]
        self.part = np.repeat(np.arange(len(chosen)), [len(rows) for rows in chosen])
        self.place = np.concatenate([np.zeros(0, np.int64), *chosen])
        if not len(self):
            raise ValueError(
                f"{', '.join(map(str, self.folders))} must have rows with "
                f"{', '.join(wants) or 'anything usable'}, there are none"
            )

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, index: int) -> Row:
        return open_part(self.parts[self.part[index]]).row(int(self.place[index]))

    def atoms(self) -> np.ndarray:
        """int64, one per row: the atoms of its molecules."""
        return self._measured("atoms")

    def characters(self) -> np.ndarray:
        """int64, one per row: the characters of its text or conversation."""
        return self._measured("characters")

    def blocks(self) -> set[str]:
        """The first InChIKey blocks of all molecules, also of rows that are left out."""
        return {block for path in self.parts for block in open_part(path).blocks() if block}

    def target_names(self) -> tuple[str, ...]:
        """What the targets are.

        Raises:
            ValueError: the folders have different ones.
        """
        names = {tuple(found["columns"]["targets"]) for found in self.manifests}
        if len(names) > 1:
            raise ValueError(f"the folders must have the same targets, they have {sorted(names)}")
        return names.pop()

    def has_patches(self, options: PatchOptions, predictor_hash: str | None) -> bool:
        """The rows hold the patches that `options` ask for.

        Args:
            options: of a connector.
            predictor_hash: `content_hash` of the predictor that the model has, None for none.
        """
        wanted = asdict(options) | {"sources": list(options.sources)}
        needed = predictor_hash if options.needs_predictor else None
        return all(
            found["patches"] == wanted and found["predictor"] == needed for found in self.manifests
        )

    def provenance(self) -> list[dict[str, Any]]:
        """Per folder: its name, its files with their hashes, and its counts."""
        names = ("files", "rows", "usable", "exclude", "versions")
        return [
            {"folder": folder.name, **{name: found[name] for name in names}}
            for folder, found in zip(self.folders, self.manifests, strict=True)
        ]

    def _measured(self, what: str) -> np.ndarray:
        by_part = [getattr(open_part(path), what)() for path in self.parts]
        starts = np.cumsum([0, *map(len, by_part)])[:-1]
        return np.concatenate(by_part)[starts[self.part] + self.place]


def _wanted(part: Part, wants: Sequence[str]) -> np.ndarray:
    """bool, one per row of a part."""
    wanted = part.usable()
    for name in wants:
        wanted &= _HAVE[name](part)
    return wanted


def _valid(column: pa.Array) -> np.ndarray:
    return column.is_valid().to_numpy(zero_copy_only=False)


_HAVE = {
    "text": lambda part: _valid(part.plain["text"]),
    "turns": lambda part: _valid(part.turns),
    "said": lambda part: _valid(part.plain["text"]) | _valid(part.turns),
    "targets": Part.has_targets,
    "molecule": lambda part: np.diff(part.bounds) == 1,
    "molecules": lambda part: np.diff(part.bounds) > 0,
}
