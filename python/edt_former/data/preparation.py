"""Raw files become prepared data: in parallel, part by part, and again where it was stopped."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from edt_former.chem import ConformerOptions, Invalid, Molecule, make_conformers
from edt_former.chem.rdkit_log import quiet
from edt_former.data.format import (
    MANIFEST,
    PART,
    Part,
    PreparedMolecule,
    Row,
    arrow,
    part_paths,
    write_part,
)
from edt_former.data.overlap import connectivity, excluded_blocks, read_source
from edt_former.data.raw import MARK, Columns, RawRow, read_rows
from edt_former.graph.batch import GraphBatch
from edt_former.language.frozen import content_hash, load_part, read_weights, write_json
from edt_former.tokens import NextAtomPredictor, PatchOptions, cut_molecules, unpack_patches

SETTINGS = "settings.json"
HASHED_AT_A_TIME = 2**20
COMMONEST = 20
"""Reasons that the manifest lists."""


@dataclass(frozen=True)
class PrepareOptions:
    """What becomes of raw rows.

    Attributes:
        columns: which columns are read.
        patches: the patches of every molecule, None for none.
        predictor: a folder with the next-atom predictor, where `patches` need one.
        conformers: how they are made, None for none.
        exclude: files whose molecules are left out, by the first block of their InChIKeys.
        rows_per_part: of a file.
    """

    columns: Columns = field(default_factory=Columns)
    patches: PatchOptions | None = None
    predictor: Path | None = None
    conformers: ConformerOptions | None = None
    exclude: tuple[Path, ...] = ()
    rows_per_part: int = 1024

    def __post_init__(self) -> None:
        if self.rows_per_part < 1:
            raise ValueError(f"rows_per_part must be at least 1, got {self.rows_per_part}")
        if self.patches is not None and self.patches.needs_predictor and self.predictor is None:
            raise ValueError("predictor is needed for patches from entropies, got None")


def prepare(
    sources: Sequence[Path | str],
    out: Path | str,
    options: PrepareOptions | None = None,
    *,
    processes: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Reads molecules once and for all: their arrays, patches and conformers, beside their texts.

    Rows are in memory only while a process works on their part, so a source may be larger than
    memory. A row that cannot be used is kept, with the reason. Parts that exist are not made again:
    a run that was stopped, in whatever way, is continued by the same call.

    Args:
        sources: see `edt_former.data.raw.read_rows`.
        out: a folder, gets the parts and, at the end, `data.json`.
        options: what is made.
        processes: that make parts.
        progress: shows a bar.

    Returns:
        What `data.json` says: files with their hashes, rows, reasons, versions.

    Raises:
        FileNotFoundError: a source is missing.
        ValueError: `out` has data of other sources or options; there are no rows.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "some.csv")
    ...     _ = path.write_text("smiles,text\\nCCO,an alcohol\\nC1CC,broken\\n")
    ...     found = prepare([path], Path(folder, "out"), progress=False)
    >>> found["rows"], found["usable"], found["reasons"]
    (2, 1, {'unclosed ring': 1})
    """
    arrow()
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    out, options = Path(out), options or PrepareOptions()
    files = [Path(source) for source in sources]
    settings = _settings(files, options)
    out.mkdir(parents=True, exist_ok=True)
    _same_settings(out / SETTINGS, settings)
    count = _make_parts(files, out, options, processes, progress)
    reasons: Counter[str] = Counter()
    for path in part_paths(out, count):
        reasons.update(Part(path).plain["reason"].to_pylist())
    if not reasons:
        raise ValueError(f"{', '.join(map(str, files))} must have rows, there are none")
    rows, usable = reasons.total(), reasons.pop("", 0)
    found = {
        **settings,
        "parts": count,
        "rows": rows,
        "usable": usable,
        "reasons": dict(reasons.most_common(COMMONEST)),
        "versions": {name: version(name) for name in ("edt-kernels", "rdkit")},
    }
    write_json(out / MANIFEST, found)
    return found


def _settings(files: Sequence[Path], options: PrepareOptions) -> dict[str, Any]:
    """All that the parts depend on."""
    patches, conformers = options.patches, options.conformers
    hashed = None
    if patches is not None and patches.needs_predictor:
        hashed = content_hash(read_weights(options.predictor))
    # Through JSON, as it will be read again.
    return json.loads(
        json.dumps(
            {
                "files": [_identity(file) for file in files],
                "columns": asdict(options.columns),
                "patches": None if patches is None else asdict(patches),
                "predictor": hashed,
                "conformers": None if conformers is None else asdict(conformers),
                "exclude": [_identity(file) for file in options.exclude],
                "rows_per_part": options.rows_per_part,
            }
        )
    )


def _identity(path: Path) -> dict[str, Any]:
    """A file by its hash; prepared data by the hash of their manifest."""
    digest = hashlib.sha256()
    with (path / MANIFEST if path.is_dir() else path).open("rb") as content:
        while chunk := content.read(HASHED_AT_A_TIME):
            digest.update(chunk)
    return {"name": path.name, "sha256": digest.hexdigest()}


def _same_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Remembers the settings; parts made with others must not stand beside new ones."""
    if not file.exists():
        write_json(file, settings)
        return
    found = json.loads(file.read_text())
    differing = [name for name in settings if found.get(name) != settings[name]]
    if differing:
        raise ValueError(
            f"{file.parent} has data of another run, which differs in {', '.join(differing)}; "
            "take another folder or remove that one"
        )


def _make_parts(
    files: Sequence[Path], out: Path, options: PrepareOptions, processes: int, progress: bool
) -> int:
    """Makes the parts that are missing; how many there are."""
    maker = _Maker(options, excluded_blocks(options.exclude))
    count = 0
    with tqdm(desc="preparing", unit="row", disable=not progress) as bar, _Pool(processes) as pool:
        for rows in _batches(files, options):
            path = out / PART.format(count)
            count += 1
            if path.exists():
                bar.update(len(rows))
            else:
                bar.update(pool.do(maker, path, rows))
        bar.update(pool.finish())
    return count


def _batches(files: Sequence[Path], options: PrepareOptions) -> Iterator[list[tuple[int, RawRow]]]:
    """The rows of every part, each with the number of its file."""
    rows = (
        (number, row)
        for number, file in enumerate(files)
        for row in read_rows(file, options.columns)
    )
    while batch := list(islice(rows, options.rows_per_part)):
        yield batch


class _Pool:
    """Processes with at most one part each waiting; of one, this one."""

    def __init__(self, processes: int) -> None:
        self.executor = None
        self.most, self.waiting = 2 * processes, set()
        if processes > 1:
            self.executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))

    def do(self, maker: _Maker, path: Path, rows: list[tuple[int, RawRow]]) -> int:
        """Have a part made; the rows that have been done since the last call."""
        if self.executor is None:
            return maker(path, rows)
        self.waiting.add(self.executor.submit(maker, path, rows))
        return self._collect(FIRST_COMPLETED) if len(self.waiting) >= self.most else 0

    def finish(self) -> int:
        """Wait for all parts; the rows that have been done since the last call."""
        return self._collect("ALL_COMPLETED") if self.waiting else 0

    def _collect(self, until: str) -> int:
        done: set[Future[int]]
        done, self.waiting = wait(self.waiting, return_when=until)
        return sum(future.result() for future in done)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)


class _Maker:
    """Makes a part of raw rows."""

    def __init__(self, options: PrepareOptions, excluded: Mapping[str, str]) -> None:
        self.options, self.excluded = options, excluded
        self.predictor: NextAtomPredictor | None = None

    def __call__(self, path: Path, rows: Sequence[tuple[int, RawRow]]) -> int:
        with quiet():
            made = [self._read(file, row) for file, row in rows]
            made = self._with_patches(self._with_conformers(made))
        write_part(path, made)
        return len(rows)

    def _read(self, file: int, raw: RawRow) -> Row:
        row = Row(
            number=raw.number,
            file=file,
            id=raw.id,
            text=raw.text,
            turns=raw.turns,
            targets=tuple(np.nan if t is None else t for t in raw.targets),
            reason=raw.reason or _objection(raw),
        )
        if row.reason:
            return row
        molecules = []
        for source in raw.molecules:
            molecule = read_source(source)
            if isinstance(molecule, Invalid):
                return replace(row, reason=molecule.reason)
            block = connectivity(molecule)
            if block in self.excluded:
                return replace(row, reason=f"is in {self.excluded[block]}")
            molecules.append(PreparedMolecule(molecule, block))
        return replace(row, molecules=tuple(molecules))

    def _with_conformers(self, rows: list[Row]) -> list[Row]:
        if self.options.conformers is None:
            return rows
        molecules = [prepared.molecule for row in rows for prepared in row.molecules]
        found = iter(make_conformers(molecules, self.options.conformers))
        return [_placed(row, list(islice(found, len(row.molecules)))) for row in rows]

    def _with_patches(self, rows: list[Row]) -> list[Row]:
        patches = self.options.patches
        if patches is None:
            return rows
        molecules = [prepared.molecule for row in rows for prepared in row.molecules]
        found = find_patch_ids(molecules, patches, self._load_predictor(patches))
        ids = iter(
            [dict(zip(found, cut, strict=True)) for cut in zip(*found.values(), strict=True)]
        )
        return [
            replace(row, molecules=tuple(replace(m, patches=next(ids)) for m in row.molecules))
            for row in rows
        ]

    def _load_predictor(self, patches: PatchOptions) -> NextAtomPredictor | None:
        if self.predictor is None and patches.needs_predictor:
            self.predictor = load_part(NextAtomPredictor, self.options.predictor)
            self.predictor.eval().requires_grad_(False)
        return self.predictor


def _objection(raw: RawRow) -> str:
    """Why a row is of no use, before its molecules are read."""
    if not raw.molecules and not raw.turns:
        return "no molecule and no conversation"
    if raw.turns is not None:
        marks = sum(content.count(MARK) for _, content in raw.turns)
        if marks not in (0, len(raw.molecules)):
            return f"{marks} {MARK} in the conversation, and {len(raw.molecules)} molecules"
        if all(role != "assistant" for role, _ in raw.turns):
            return "nobody answers in the conversation"
    return ""


def _placed(row: Row, conformers: Sequence[Any]) -> Row:
    bad = next((c for c in conformers if isinstance(c, Invalid)), None)
    if bad is not None:
        return replace(row, reason=f"no conformer: {bad.reason}", molecules=())
    placed = (
        replace(m, coordinates=c.coordinates, flat=c.flat)
        for m, c in zip(row.molecules, conformers, strict=True)
    )
    return replace(row, molecules=tuple(placed))


def find_patch_ids(
    molecules: Iterable[Molecule], options: PatchOptions, predictor: NextAtomPredictor | None
) -> dict[str, list[list[int]]]:
    """By source and molecule, the patch id of every atom.

    >>> from edt_former.chem import read_molecules
    >>> find_patch_ids(read_molecules(["CCO"]), PatchOptions(sources=("brics",)), None)
    {'brics': [[0, 0, 0]]}
    """
    molecules = list(molecules)
    graph = GraphBatch.pack(molecules)
    return {
        source: unpack_patches(
            cut_molecules(source, molecules, graph, options, predictor), graph.offsets
        )
        for source in options.sources
    }
