"""What is known of a molecule before a conversation about it is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edt_former.chem import Invalid, read_molecule, read_selfies
from edt_former.data.raw import Columns, RawRow, read_rows
from edt_former.tasks.questions import facts

SELFIES = "selfies:"


@dataclass(frozen=True)
class Context:
    """A molecule, and what may be said of it.

    Attributes:
        key: tells it from all others of a run: the number of its file and of its row.
        id: its name there, "" for none.
        smiles: canonical.
        caption: a text about it, None for none.
        iupac: its name, None for none.
        facts: what RDKit computes, by `edt_former.tasks.questions.FACTS`.
        reason: why there is nothing to say, "" where there is.
    """

    key: str
    id: str = ""
    smiles: str = ""
    caption: str | None = None
    iupac: str | None = None
    facts: dict[str, str] = field(default_factory=dict)
    reason: str = ""


def read_contexts(
    files: Sequence[Path | str],
    *,
    names: Path | str | None = None,
    columns: Columns | None = None,
) -> Iterator[Context]:
    """The molecules of `files` with their captions, in order; each row is read when asked for.

    Args:
        files: see `edt_former.data.read_rows`; their text is the caption.
        names: a file whose text is the IUPAC name; rows belong together by their id, or by their
            SMILES as it is written.
        columns: of `files`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file of another kind.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "some.csv")
    ...     _ = path.write_text("id,smiles,text\\n7,OCC,An alcohol.\\n8,C1CC,broken\\n")
    ...     found = list(read_contexts([path]))
    >>> found[0].smiles, found[0].caption, found[0].facts["oxygen atoms"], found[1].reason
    ('CCO', 'An alcohol.', '1', 'unclosed ring')
    """
    named = {} if names is None else _names(names)
    for number, file in enumerate(files):
        for row in read_rows(file, columns):
            yield _context(f"{number}:{row.number}", row, named)


def _names(file: Path | str) -> dict[str, str]:
    found = {}
    for row in read_rows(file):
        if row.text and not row.reason:
            found |= dict.fromkeys((row.id, *row.molecules), row.text)
    return found


def _context(key: str, row: RawRow, named: dict[str, str]) -> Context:
    if row.reason or len(row.molecules) != 1:
        count = len(row.molecules)
        return Context(key, row.id, reason=row.reason or f"{count} molecules, one is needed")
    (source,) = row.molecules
    selfies = source.startswith(SELFIES)
    molecule = read_selfies(source[len(SELFIES) :]) if selfies else read_molecule(source)
    if isinstance(molecule, Invalid):
        return Context(key, row.id, reason=molecule.reason)
    name = named.get(row.id) if row.id else None
    text = row.text and " ".join(row.text.split())
    return Context(key, row.id, molecule.smiles, text, name or named.get(source), facts(molecule))
