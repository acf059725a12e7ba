"""Rows of tables and JSON lines as their authors publish them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edt_former.chem.sd_file import read_structures
from edt_former.chem.text_files import (
    SMILES_COLUMNS,
    comma_or_semicolon,
    open_text,
    single_backslashes,
    smiles_lines,
    suffix_of,
    table_rows,
)

IDS = ("cid", "id", "drug_id", "mol_id", "compound_name", "name")
TEXTS = ("text", "description", "caption", "iupac_name", "iupacname", "iupac")
LINES, TABLES, JSONS = (".smi",), (".csv", ".tsv", ".txt"), (".jsonl", ".json")
STRUCTURES = (".sdf",)
MARK = "<mol>"
SELFIES = re.compile(r"(?:\[[^\[\]\s]+\]|\.|>>)+")
ROLES = {"human": "user", "gpt": "assistant"}
MISSING = ("", "nan", "-nan", "na", "n/a", "#n/a", "<na>", "null", "none")
"""What a number that is not there is written as, in any case."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table, or keys of JSON, are read.

    Attributes:
        smiles: of the molecules; None takes the first of the usual names (`SMILES_COLUMNS`).
        id: None likewise (`IDS`).
        text: None likewise (`TEXTS`).
        targets: of numbers to predict; an empty cell is a missing one.
    """

    smiles: str | None = None
    id: str | None = None
    text: str | None = None
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class RawRow:
    """A row as it was written.

    Attributes:
        number: from 0, within its file.
        id: its name there, "" for none.
        molecules: SMILES, or SELFIES behind "selfies:".
        text: about the molecule.
        turns: (role, content) of a conversation, `<mol>` where a molecule stands.
        targets: numbers, None where one is missing.
        reason: why it cannot be used, "" where it can.
    """

    number: int
    id: str = ""
    molecules: tuple[str, ...] = ()
    text: str | None = None
    turns: tuple[tuple[str, str], ...] | None = None
    targets: tuple[float | None, ...] = ()
    reason: str = ""


def read_rows(path: Path | str, columns: Columns | None = None) -> Iterator[RawRow]:
    """Yields every row of a file; a row that cannot be read says why in its `reason`.

    * `.smi`: a SMILES per line, behind it a name; a title line that begins with "SMILES" is none;
    * `.csv`: a table with a header, of commas, or of semicolons with decimal commas; `.tsv`,
      `.txt`: separated by tabs, quotes stand for themselves;
    * `.jsonl`, `.json`: an object per line, or a list of them: a molecule with a text, a
      conversation (`messages`, or `conversations` of `user` and `assistant`, or of `from` and
      `value`), or an instruction (`instruction`, `input`, `output`, the molecules in SELFIES);
    * `.sdf`: structures, their properties like the columns of a table; the title is the id unless
      there is none or a property is named, and places of atoms are not kept.

    All may be compressed (`.gz`). Doubled backslashes of a SMILES become single ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, a table without a column that is needed, a damaged file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "captions.txt")
    ...     _ = path.write_text('CID\\tSMILES\\ttext\\n7\\tC/C=C\\\\\\\\C\\tThe "E" form.\\n')
    ...     row = next(read_rows(path))
    >>> row.id, row.molecules, row.text
    ('7', ('C/C=C\\\\C',), 'The "E" form.')
    """
    path, columns = Path(path), columns or Columns()
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    suffix = suffix_of(path)
    if suffix in LINES:
        return _lines(path)
    if suffix in TABLES:
        return _table(path, columns, comma_or_semicolon(path) if suffix == ".csv" else "\t")
    if suffix in JSONS:
        return _json(path, columns, whole=suffix == ".json")
    if suffix in STRUCTURES:
        return _structures(path, columns)
    known = ", ".join((*LINES, *TABLES, *JSONS, *STRUCTURES))
    raise ValueError(f"{path} must end in one of {known} (or .gz after it)")


def _lines(path: Path) -> Iterator[RawRow]:
    with open_text(path) as file:
        for number, (smiles, name) in enumerate(smiles_lines(file)):
            yield RawRow(number, name, (smiles,))


def _table(path: Path, columns: Columns, delimiter: str) -> Iterator[RawRow]:
    header = _header(path, delimiter)
    place = {name.strip().lower(): i for i, name in reversed(list(enumerate(header)))}

    def find(wanted: str | None, usual: Sequence[str], needed: bool = False) -> int | None:
        if wanted is not None and wanted.lower() not in place:
            raise ValueError(f"{path} has no column {wanted!r}; it has {', '.join(header)}")
        names = usual if wanted is None else (wanted.lower(),)
        found = next((place[name] for name in names if name in place), None)
        if needed and found is None:
            raise ValueError(f"{path} has no SMILES column; its columns are {', '.join(header)}")
        return found

    where = _Places(
        smiles=find(columns.smiles, SMILES_COLUMNS, needed=True),
        id=find(columns.id, IDS),
        text=find(columns.text, TEXTS),
        targets=[find(name, ()) for name in columns.targets],
    )
    return _table_rows(path, delimiter, len(header), where, columns.targets)


@dataclass(frozen=True)
class _Places:
    smiles: int
    id: int | None
    text: int | None
    targets: list[int] = field(default_factory=list)


def _header(path: Path, delimiter: str) -> list[str]:
    with open_text(path) as file:
        return next(table_rows(file, delimiter), [])


def _table_rows(
    path: Path, delimiter: str, width: int, where: _Places, targets: Sequence[str]
) -> Iterator[RawRow]:
    mark = "," if delimiter == ";" else "."  # of decimals
    with open_text(path) as file:
        rows = table_rows(file, delimiter)
        next(rows, None)
        for number, cells in enumerate(row for row in rows if any(map(str.strip, row))):
            if len(cells) != width:
                yield RawRow(number, reason=f"{len(cells)} cells, the header has {width}")
                continue
            smiles = single_backslashes(cells[where.smiles].strip())
            name = "" if where.id is None else cells[where.id].strip()
            text = None if where.text is None else cells[where.text].strip() or None
            try:
                values = _numbers([cells[i].replace(mark, ".") for i in where.targets], targets)
            except ValueError as error:
                yield RawRow(number, name, reason=str(error))
                continue
            yield RawRow(number, name, (smiles,), text, targets=values)


def _numbers(cells: Sequence[Any], names: Sequence[str]) -> tuple[float | None, ...]:
    numbers = []
    for name, cell in zip(names, cells, strict=True):
        if cell is None or str(cell).strip().lower() in MISSING:
            numbers.append(None)
            continue
        try:
            number = float(cell)
        except (TypeError, ValueError):
            number = math.nan
        # Python reads 1_000 for a number.
        if "_" in str(cell) or not math.isfinite(number):
            raise ValueError(f"{name} is no number: {str(cell)[:40]!r}")
        numbers.append(number)
    return tuple(numbers)


def _structures(path: Path, columns: Columns) -> Iterator[RawRow]:
    if columns.smiles is not None:
        raise ValueError(f"{path} holds structures: no column of SMILES, got {columns.smiles!r}")
    return _structure_rows(path, columns)


def _structure_rows(path: Path, columns: Columns) -> Iterator[RawRow]:
    ids = IDS if columns.id is None else (columns.id.lower(),)
    texts = TEXTS if columns.text is None else (columns.text.lower(),)
    for number, record in enumerate(read_structures(path)):
        title = record.name if columns.id is None else ""
        name, text = title or record.first_of(ids), record.first_of(texts) or None
        cells = [record.first_of((target.lower(),)) for target in columns.targets]
        try:
            if not record.smiles:
                raise ValueError("the structure cannot be read")
            values = _numbers(cells, columns.targets)
        except ValueError as error:
            yield RawRow(number, name, reason=str(error))
            continue
        yield RawRow(number, name, (record.smiles,), text, targets=values)


def _json(path: Path, columns: Columns, *, whole: bool) -> Iterator[RawRow]:
    with open_text(path) as file:
        if whole:
            content = json.load(file)
            if not isinstance(content, list):
                raise ValueError(f"{path} must hold a list, got {type(content).__name__}")
            items: Iterator[Any] = iter(content)
        else:
            items = (line for line in file if line.strip())
        for number, item in enumerate(items):
            try:
                content = json.loads(item) if isinstance(item, str) else item
                if not isinstance(content, Mapping):
                    raise ValueError(f"must be an object, got {type(content).__name__}")
                yield _record(number, content, columns)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                yield RawRow(number, reason=f"cannot be read: {_said(error)}")


def _said(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _record(number: int, content: Mapping[str, Any], columns: Columns) -> RawRow:
    keys = {key.lower(): value for key, value in content.items()}

    def find(wanted: str | None, usual: Sequence[str]) -> Any:
        names = usual if wanted is None else (wanted.lower(),)
        return next((keys[name] for name in names if keys.get(name) is not None), None)

    name = find(columns.id, IDS)
    name = "" if name is None else str(name)
    targets = _numbers([keys.get(t.lower()) for t in columns.targets], columns.targets)
    if "instruction" in keys and "output" in keys:
        return _instruction(number, name, keys)
    smiles = find(columns.smiles, SMILES_COLUMNS)
    given = [smiles] if isinstance(smiles, str) else list(smiles or ())
    molecules = tuple(single_backslashes(s.strip()) for s in given)
    if not molecules and isinstance(keys.get("selfies"), str):
        molecules = (f"selfies:{keys['selfies']}",)
    return RawRow(number, name, molecules, find(columns.text, TEXTS), _conversation(keys), targets)


def _conversation(keys: Mapping[str, Any]) -> tuple[tuple[str, str], ...] | None:
    """The turns of any published layout; lists may be JSON inside a string."""
    found = keys.get("messages", keys.get("conversations"))
    if found is None:
        return None
    turns = []
    for turn in json.loads(found) if isinstance(found, str) else found:
        if "role" in turn:
            turns.append((turn["role"], turn["content"]))
        elif "from" in turn:
            turns.append((ROLES.get(turn["from"], turn["from"]), turn["value"]))
        else:
            turns += [("user", turn["user"]), ("assistant", turn["assistant"])]
    if keys.get("system") and turns[:1] and turns[0][0] != "system":
        turns.insert(0, ("system", keys["system"]))
    return tuple((str(role), str(content)) for role, content in turns)


def _instruction(number: int, name: str, keys: Mapping[str, Any]) -> RawRow:
    """Mol-Instructions: molecules of the input stand for themselves, their text for the rest."""
    asked, given = keys["instruction"].strip(), (keys.get("input") or "").strip()
    molecules: tuple[str, ...] = ()
    if given and SELFIES.fullmatch(given):
        parts = re.split(r"(>>|\.)", given)
        molecules = tuple(f"selfies:{part}" for part in parts[::2] if part)
        given = "".join(MARK if i % 2 == 0 and part else part for i, part in enumerate(parts))
    question = f"{asked}\n{given}" if given else asked
    turns = (("user", question), ("assistant", str(keys["output"]).strip()))
    return RawRow(number, name, molecules, turns=turns)
