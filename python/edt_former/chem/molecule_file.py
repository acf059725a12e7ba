"""Files of molecules: lines, tables and structures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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

_NAME_COLUMNS = ("name", "mol_id", "molecule_name", "compound_name", "title", "cid", "id")


def read_file(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yields (name, SMILES) of a file, the name empty where there is none.

    `.smi` and `.txt` hold a SMILES and optionally a name per line, perhaps under a title line that
    begins with "SMILES"; `.csv` (of commas or semicolons), `.tsv`, and `.txt` with tabs in its
    first line, hold a header with a SMILES column (`smiles`, `canonical_smiles`, ..., in any case)
    and optionally a name column. Between tabs quotes stand for themselves. `.sdf`
    holds structures, named by their title or else by a property, of which RDKit writes the SMILES;
    where it cannot read one, the SMILES is empty. Each may be compressed (`.gz`). Blank lines are
    skipped; doubled backslashes, which some public tables have, become single ones. The SMILES are
    not checked here.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the suffix is none of these, no column holds SMILES, or the file is damaged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "alcohols.csv")
    ...     _ = path.write_text("name,SMILES\\nethanol,CCO\\nmethanol,CO\\n")
    ...     list(read_file(path))
    [('ethanol', 'CCO'), ('methanol', 'CO')]
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    suffix = suffix_of(path)
    if suffix == ".tsv" or (suffix == ".txt" and _has_header(path)):
        return _table(path, "\t")
    if suffix in (".smi", ".txt"):
        return _lines(path)
    if suffix == ".csv":
        return _table(path, comma_or_semicolon(path))
    if suffix == ".sdf":
        return ((x.name or x.first_of(_NAME_COLUMNS), x.smiles) for x in read_structures(path))
    raise ValueError(f"path must end in .smi, .txt, .csv, .tsv or .sdf (or .gz), got {path}")


def _has_header(path: Path) -> bool:
    """Whether the first line names the columns of a table with tabs, SMILES behind others."""
    with open_text(path) as file:
        names = [name.strip().lower() for name in file.readline().split("\t")]
    return any(name in SMILES_COLUMNS for name in names[1:])


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with open_text(path) as file:
        for smiles, name in smiles_lines(file):
            yield name, smiles


def _table(path: Path, delimiter: str) -> Iterator[tuple[str, str]]:
    with open_text(path) as file:
        rows = table_rows(file, delimiter)
        header = next(rows, [])
        columns = {name.strip().lower(): i for i, name in reversed(list(enumerate(header)))}
        smiles_column = next((columns[n] for n in SMILES_COLUMNS if n in columns), None)
        name_column = next((columns[n] for n in _NAME_COLUMNS if n in columns), None)
        if smiles_column is None:
            raise ValueError(f"{path} has no SMILES column; its columns are {', '.join(header)}")
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            smiles = row[smiles_column].strip() if smiles_column < len(row) else ""
            named = name_column is not None and name_column < len(row)
            name = row[name_column].strip() if named else ""
            yield name, single_backslashes(smiles)
