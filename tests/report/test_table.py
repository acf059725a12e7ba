from __future__ import annotations

import pytest

from edt_former.report.table import table


def test_numbers_stand_to_the_right_and_words_to_the_left():
    rows = [["Aspirin", 13, 0.5, "yes"], ["water", 1, 12.25, "no"]]
    assert table(["molecule", "atoms", "x", "ok"], rows).splitlines() == [
        "molecule  atoms      x  ok",
        "Aspirin      13    0.5  yes",
        "water         1  12.25  no",
    ]


def test_a_column_with_one_word_is_a_column_of_words():
    assert table(["n"], [[1], ["-"], [100]]).splitlines() == ["n", "1", "-", "100"]


def test_a_table_without_rows_is_its_header():
    assert table(["a", "long name"], []) == "a  long name"


def test_no_line_ends_in_blanks():
    assert all(line == line.rstrip() for line in table(["a", "b"], [["x", ""]]).splitlines())


def test_rows_must_have_the_columns_of_the_header():
    with pytest.raises(ValueError, match="zip"):
        table(["a", "b"], [["x"]])
