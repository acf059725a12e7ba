"""Rows become a batch, and an error says which row it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from edt_former.data import Row


class CollateRows:
    """A collate function whose errors name the row, also out of a loader's process.

    Args:
        collate: rows to a batch.

    Example:
        >>> from edt_former.data import Row
        >>> collate = CollateRows(lambda rows: [len(row.text) for row in rows])
        >>> collate([Row(0, text="yes")])
        [3]
        >>> collate([Row(0, text="yes"), Row(7, id="CID 9")])
        Traceback (most recent call last):
        ...
        ValueError: row 7 (CID 9) makes no batch: object of type 'NoneType' has no len()
    """

    def __init__(self, collate: Callable[[Sequence[Row]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[Row]) -> Any:
        """The batch.

        Raises:
            ValueError: `collate` fails; with the number and the id of the row that it fails for.
        """
        try:
            return self.collate(rows)
        except Exception as error:
            guilty = [row for row in rows if not self._fine(row)] or rows
            numbers = ", ".join(f"{row.number} ({row.id or 'no id'})" for row in guilty)
            verb = "makes" if len(guilty) == 1 else "make"
            plural = "s" * (len(guilty) != 1)
            raise ValueError(f"row{plural} {numbers} {verb} no batch: {error}") from error

    def _fine(self, row: Row) -> bool:
        try:
            self.collate([row])
        except Exception:
            return False
        return True
