"""What a conversion will write: checked in full before anything is, and written whole or not."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from edt_former.language.frozen import write_json
from edt_former.released.tree import abbreviated
from edt_former.weights import StoredTensor, total_bytes, write_file, write_shards

SHARD_SIZE = 2_000_000_000


@dataclass
class Plan:
    """Files to be written, and what the report says of them.

    Attributes:
        found: one line on what the source is.
        layout: how its names are spelled; "" where that says nothing.
        files: tensors by the path of their file in the output; "" is the output itself, and with
            `sharded` a path is a folder that may hold several files.
        sharded: paths of `files` that are folders.
        json: content of JSON files, by path.
        finish: steps that need what was written; called in order with the output's folder.
        notes: what else a user should know.
    """

    found: str
    layout: str = ""
    files: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    sharded: set[str] = field(default_factory=set)
    json: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    finish: list[Callable[[Path], None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, int, int, str, str]]:
        """Of every file with tensors: path, number of tensors and of values, bytes, dtypes."""
        return [
            (path, len(tensors), *_amount(tensors.values()))
            for path, tensors in self.files.items()
            if tensors
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(total_bytes(tensors.values()) for tensors in self.files.values())

    def write(
        self,
        out: Path,
        *,
        shard_size: int = SHARD_SIZE,
        force: bool = False,
        progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Writes all of it under another name beside `out`, then moves it there.

        Args:
            out: a folder, or where the plan is one file of tensors a name in `.safetensors`.
            shard_size: most bytes of a file where there may be several.
            force: replace what is there, if it holds nothing but what a conversion writes.
            progress: called with the bytes of each file when it is written.

        Raises:
            FileExistsError: something is there already.
        """
        check_free(out, force=force)
        partial = out.with_name(f".{out.name}.partial")
        _remove(partial)
        try:
            if out.suffix == ".safetensors":
                (tensors,) = self.files.values()
                write_file(partial, tensors)
                progress(total_bytes(tensors.values()))
            else:
                self._fill(partial, shard_size, progress)
            _remove(out)
            os.replace(partial, out)
        finally:
            _remove(partial)

    def _fill(self, folder: Path, shard_size: int, progress: Callable[[int], object]) -> None:
        folder.mkdir(parents=True)
        for path, tensors in self.files.items():
            if path in self.sharded:
                (folder / path).mkdir(exist_ok=True)
                for written in write_shards(folder / path, tensors, shard_size):
                    progress(written)
            elif tensors:
                (folder / path).parent.mkdir(exist_ok=True)
                write_file(folder / path, tensors)
                progress(total_bytes(tensors.values()))
        for path, content in self.json.items():
            (folder / path).parent.mkdir(exist_ok=True)
            write_json(folder / path, content)
        for step in self.finish:
            step(folder)


WRITTEN = (
    *("model*.safetensors", "*.index.json", "config.json", "manifest.json", "processor.json"),
    *("vocab.txt", "graph_encoder", "connector", "heads", "released", "language_model"),
    "predictor",
)
"""What a conversion writes; a folder that holds anything else is never replaced."""


def check_free(out: Path, *, force: bool) -> None:
    """Refuses a place that is taken.

    Raises:
        FileExistsError: it is, and there is no `force`, or it holds other files too.
    """
    if not out.exists():
        return
    if not force:
        raise FileExistsError(f"{out} exists: name another place, or replace it with --force")
    if out.is_dir() != (out.suffix != ".safetensors"):
        raise FileExistsError(f"{out} is not what --force would replace")
    foreign = [
        entry.name
        for entry in (out.iterdir() if out.is_dir() else ())
        if not any(fnmatchcase(entry.name, pattern) for pattern in WRITTEN)
    ]
    if foreign:
        raise FileExistsError(
            f"{out} holds {sorted(foreign)[0]}, which no conversion writes: it is not replaced"
        )


class Comparison(NamedTuple):
    """How the tensors of a part differ from what its module has; by names in the source."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]


def compare(
    found: Mapping[str, Any], expected: Mapping[str, Size], spell: Callable[[str], str]
) -> Comparison:
    """Compares names and shapes; `spell` makes of a name here what the source calls it."""
    differing = [
        f"{spell(name)} {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    return Comparison(
        [spell(name) for name in expected if name not in found],
        [spell(name) for name in found if name not in expected],
        differing,
    )


def refuse(
    source: Path,
    comparisons: Iterable[Comparison],
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> None:
    """Raises for all differences at once.

    Args:
        source: named in the error.
        comparisons: of all parts.
        allow_missing: patterns (`*`, `?`) of names in the source that may be missing.
        allow_unexpected: patterns of names that may be there.

    Raises:
        ValueError: anything differs that is not allowed; it names every tensor.
    """
    every = list(comparisons)
    listed = {
        "missing": _without([n for c in every for n in c.missing], allow_missing),
        "unexpected": _without([n for c in every for n in c.unexpected], allow_unexpected),
        "of another shape": [name for c in every for name in c.shapes],
    }
    problems = [
        f"{what}: {abbreviated(names) if 'shape' not in what else ', '.join(names)}"
        for what, names in listed.items()
        if names
    ]
    if problems:
        raise ValueError(f"the weights in {source} do not fit: {'; '.join(problems)}")


def shapes_of(build: Callable[[Any], nn.Module], config: Any) -> dict[str, Size]:
    """Names and shapes of the module that `build` makes of `config`; nothing is allocated."""
    with torch.device("meta"):
        module = build(config)
    return {name: value.shape for name, value in module.state_dict().items()}


def initial(build: Callable[[Any], nn.Module], config: Any) -> dict[str, Tensor]:
    """The state of a new module; the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(config).state_dict()


def _without(names: list[str], patterns: Sequence[str]) -> list[str]:
    return [n for n in names if not any(fnmatchcase(n, pattern) for pattern in patterns)]


def _amount(tensors: Iterable[StoredTensor]) -> tuple[int, int, str]:
    tensors = list(tensors)
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in tensors)
    listed = ", ".join(f"{name} {number}" for name, number in dtypes.most_common())
    return sum(t.shape.numel() for t in tensors), total_bytes(tensors), listed


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
