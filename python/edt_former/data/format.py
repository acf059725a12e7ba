"""The format of prepared data: molecules as arrays beside their texts, in Arrow files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from edt_former.chem import Molecule
from edt_former.extras import need
from edt_former.tokens.patches import SOURCES

if TYPE_CHECKING:
    import pyarrow as pa

PART = "part-{:05d}.arrow"
PARTS = "part-*.arrow"
MANIFEST = "data.json"
WIDTHS = {"atoms": 9, "bonds": 2, "bond_features": 3, "coordinates": 3}
"""Numbers per atom, per directed bond (twice) and per atom of the arrays of a molecule."""
MOST_ATOMS = 2**16
"""Of a molecule, whose atoms are numbered by 16 bits."""

Turn = tuple[str, str]


@dataclass(frozen=True)
class PreparedMolecule:
    """A molecule that needs no chemistry any more.

    Attributes:
        molecule: its arrays.
        block: the first block of its InChIKey: connectivity, whatever the stereochemistry, isotopes
            and protonation. "" where InChI gives none.
        coordinates: float32 [n, 3] in angstrom, None where none were made.
        flat: they are of a drawing, for want of a conformer.
        patches: by source, the patch id of every atom.
    """

    molecule: Molecule
    block: str = ""
    coordinates: np.ndarray | None = None
    flat: bool = False
    patches: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One row of prepared data.

    Attributes:
        number: of the row in its file, from 0.
        file: which file it is from, in the order of the manifest.
        id: its name there, "" for none.
        molecules: none, one or several.
        text: about the molecule, None for none.
        turns: (role, content) of a conversation, None for none.
        targets: numbers to predict, NaN where one is missing.
        reason: why the row cannot be used, "" where it can.
    """

    number: int
    file: int = 0
    id: str = ""
    molecules: tuple[PreparedMolecule, ...] = ()
    text: str | None = None
    turns: tuple[Turn, ...] | None = None
    targets: tuple[float, ...] = ()
    reason: str = ""


def arrow() -> ModuleType:
    """`pyarrow`, imported when data are read or written."""
    return need("pyarrow", extra="train", purpose="prepared data")


def schema() -> pa.Schema:
    """The columns. Arrays of a molecule are flat lists, see `WIDTHS`; atoms stand in the order of
    the canonical SMILES, bonds in both directions, sorted by target, then by source.

    >>> schema().names
    ['number', 'file', 'id', 'molecules', 'text', 'turns', 'targets', 'reason']
    """
    pa = arrow()
    molecule = pa.struct(
        [
            ("smiles", pa.string()),
            ("block", pa.string()),
            ("atoms", pa.list_(pa.uint8())),
            ("bonds", pa.list_(pa.uint16())),
            ("bond_features", pa.list_(pa.uint8())),
            ("coordinates", pa.list_(pa.float32())),
            ("flat", pa.bool_()),
            *((source, pa.list_(pa.uint16())) for source in SOURCES),
        ]
    )
    return pa.schema(
        [
            ("number", pa.int64()),
            ("file", pa.int16()),
            ("id", pa.string()),
            ("molecules", pa.list_(molecule)),
            ("text", pa.string()),
            ("turns", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
            ("targets", pa.list_(pa.float64())),
            ("reason", pa.string()),
        ]
    )


def write_part(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows as one Arrow file of one record batch; whole or not at all."""
    pa = arrow()
    batch = pa.RecordBatch.from_pylist([_plain(row) for row in rows], schema=schema())
    partial = path.with_name(f"{path.name}.partial")
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    os.replace(partial, path)


def _plain(row: Row) -> dict[str, Any]:
    return {
        "number": row.number,
        "file": row.file,
        "id": row.id,
        "molecules": [_arrays(m) for m in row.molecules],
        "text": row.text,
        "turns": row.turns and [{"role": r, "content": c} for r, c in row.turns],
        "targets": [None if np.isnan(target) else target for target in row.targets],
        "reason": row.reason,
    }


def _arrays(prepared: PreparedMolecule) -> dict[str, Any]:
    molecule = prepared.molecule
    if len(molecule.atom_features) > MOST_ATOMS:
        raise ValueError(
            f"a prepared molecule must have at most {MOST_ATOMS} atoms, "
            f"got {len(molecule.atom_features)}"
        )
    flat = {
        "atoms": molecule.atom_features.astype(np.uint8),
        "bonds": molecule.bond_index.T.astype(np.uint16),
        "bond_features": molecule.bond_features.astype(np.uint8),
    }
    if prepared.coordinates is not None:
        flat["coordinates"] = prepared.coordinates.astype(np.float32)
    flat |= {s: np.asarray(ids, dtype=np.uint16) for s, ids in prepared.patches.items()}
    return {
        "smiles": molecule.smiles,
        "block": prepared.block,
        "flat": prepared.flat,
        **{name: array.reshape(-1) for name, array in flat.items()},
    }


class Part:
    """An Arrow file of prepared rows, mapped into memory: what is not read is not loaded.

    Args:
        path: of the file.

    Raises:
        ValueError: the file is of another format, or damaged. Texts and the places of arrays are
            looked through when it is opened; of the arrays, the bonds.
    """

    def __init__(self, path: Path | str) -> None:
        pa = arrow()
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            if reader.schema != schema() or reader.num_record_batches != 1:
                raise ValueError("its columns are others")
            batch = reader.get_batch(0)
            batch.validate(full=True)
            self._open(batch)
            self._check()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path} must be a part of prepared data: {error}") from error

    def _open(self, batch: pa.RecordBatch) -> None:
        plain = ("number", "file", "id", "text", "targets", "reason")
        self.plain = {name: batch[name] for name in plain}
        self.turns, self.molecules = batch["turns"], batch["molecules"]
        self.bounds = self.molecules.offsets.to_numpy()
        inside = self.molecules.values
        self.names = {name: inside.field(name) for name in ("smiles", "block", "flat")}
        self.lists = {name: inside.field(name) for name in (*WIDTHS, *SOURCES)}
        self.cuts = {name: lists.offsets.to_numpy() for name, lists in self.lists.items()}
        self.values = {name: lists.values.to_numpy() for name, lists in self.lists.items()}

    def _check(self) -> None:
        """Arrays of one molecule fit together, and its bonds are between its atoms."""
        sizes = {name: np.diff(cuts) for name, cuts in self.cuts.items()}
        atoms, bonds = sizes["atoms"] // WIDTHS["atoms"], sizes["bonds"] // WIDTHS["bonds"]
        known = {name: lists.is_valid().to_numpy(False) for name, lists in self.lists.items()}
        for name, size in sizes.items():
            wanted = (bonds if name in ("bonds", "bond_features") else atoms) * WIDTHS.get(name, 1)
            wrong = np.flatnonzero((size != wanted) & known[name])
            if len(wrong):
                raise ValueError(
                    f"{name} of its molecule {wrong[0]} must be {wanted[wrong[0]]} numbers, "
                    f"they are {size[wrong[0]]}"
                )
        ends = self.values["bonds"][slice(*self.cuts["bonds"][[0, -1]])]
        beyond = np.flatnonzero(ends >= np.repeat(atoms, sizes["bonds"]))
        if len(beyond):
            raise ValueError(f"a bond leads to atom {ends[beyond[0]]}, beyond its molecule")

    def __len__(self) -> int:
        return len(self.molecules)

    def usable(self) -> np.ndarray:
        """bool, one per row: the row has no reason against it."""
        return np.array([reason == "" for reason in self.plain["reason"].to_pylist()], dtype=bool)

    def has_targets(self) -> np.ndarray:
        """bool, one per row: some target is known."""
        rows = self.plain["targets"].to_pylist()
        return np.array([any(t is not None for t in row or ()) for row in rows], dtype=bool)

    def atoms(self) -> np.ndarray:
        """int64, one per row: the atoms of all its molecules."""
        ends = self.cuts["atoms"][self.bounds] // WIDTHS["atoms"]
        return np.diff(ends).astype(np.int64)

    def characters(self) -> np.ndarray:
        """int64, one per row: the length of its text, or of all its turns."""
        pc = need("pyarrow.compute", extra="train", purpose="prepared data")
        texts = pc.fill_null(pc.utf8_length(self.plain["text"]), 0).to_numpy(zero_copy_only=False)
        said = pc.utf8_length(self.turns.values.field("content")).to_numpy(zero_copy_only=False)
        total = np.concatenate([[0], np.cumsum(said)])[self.turns.offsets.to_numpy()]
        return np.where(np.diff(total) > 0, np.diff(total), texts).astype(np.int64)

    def blocks(self) -> list[str]:
        """The first InChIKey block of every molecule of every row."""
        return self.names["block"].to_pylist()

    def row(self, index: int) -> Row:
        """A row, with arrays that are its own."""
        plain = {name: column[index].as_py() for name, column in self.plain.items()}
        turns = self.turns[index].as_py()
        targets = plain.pop("targets") or ()
        return Row(
            **plain,
            targets=tuple(np.nan if t is None else t for t in targets),
            turns=turns and tuple((turn["role"], turn["content"]) for turn in turns),
            molecules=tuple(map(self._molecule, range(*self.bounds[index : index + 2]))),
        )

    def _molecule(self, index: int) -> PreparedMolecule:
        atoms = self._array("atoms", index).astype(np.int64)
        molecule = Molecule(
            smiles=self.names["smiles"][index].as_py(),
            atom_features=atoms,
            bond_index=np.ascontiguousarray(self._array("bonds", index).T, dtype=np.int64),
            bond_features=self._array("bond_features", index).astype(np.int64),
            order=np.arange(len(atoms)),
        )
        return PreparedMolecule(
            molecule,
            block=self.names["block"][index].as_py(),
            coordinates=self._known("coordinates", index),
            flat=bool(self.names["flat"][index].as_py()),
            patches={s: ids for s in SOURCES if (ids := self._known(s, index)) is not None},
        )

    def _array(self, name: str, index: int) -> np.ndarray:
        start, stop = self.cuts[name][index : index + 2]
        width = WIDTHS.get(name)
        values = self.values[name][start:stop]
        return values if width is None else values.reshape(-1, width)

    def _known(self, name: str, index: int) -> np.ndarray | None:
        if not self.lists[name][index].is_valid:
            return None
        return self._array(name, index).copy()


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """What `edt prepare` wrote about the data in `folder`.

    Raises:
        FileNotFoundError: `folder` has no prepared data, or they are not complete.
        ValueError: the file is damaged, or parts are missing.
    """
    file = Path(folder, MANIFEST)
    if not file.is_file():
        begun = any(Path(folder).glob(PARTS))
        state = "are not complete, run edt prepare again" if begun else "are not there"
        raise FileNotFoundError(f"prepared data in {folder} {state}: no {MANIFEST}")
    try:
        content = json.loads(file.read_text())
        parts, _ = content["parts"], content["columns"]["targets"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    there = len(list(Path(folder).glob(PARTS)))
    if parts != there:
        raise ValueError(f"{file} counts {parts!r} parts, {there} are there")
    return content


def part_paths(folder: Path | str, count: int) -> Sequence[Path]:
    """The files of a complete set of `count` parts."""
    return [Path(folder, PART.format(i)) for i in range(count)]
