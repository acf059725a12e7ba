"""Data sets: from tables and JSON lines to molecules that a loader reads without chemistry."""

from edt_former.data.dataset import PreparedData
from edt_former.data.format import PreparedMolecule, Row
from edt_former.data.overlap import Overlap, find_overlaps
from edt_former.data.preparation import PrepareOptions, prepare
from edt_former.data.raw import Columns, RawRow, read_rows

__all__ = [
    "Columns",
    "Overlap",
    "PrepareOptions",
    "PreparedData",
    "PreparedMolecule",
    "RawRow",
    "Row",
    "find_overlaps",
    "prepare",
    "read_rows",
]
