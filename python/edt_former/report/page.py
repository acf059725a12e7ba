"""Results as text for a terminal, and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from edt_former.report.table import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """An SVG, and what it shows in words for those who cannot see it."""

    svg: str
    alt: str

    @classmethod
    def of(cls, figure: Figure, alt: str) -> Picture:
        """A matplotlib figure; equal figures give equal text."""
        import matplotlib

        buffer = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "edt"}):
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        return cls(buffer.getvalue().decode(), alt)


@dataclass(frozen=True)
class Card:
    """Pictures of one thing, with a heading and a line about it."""

    title: str
    text: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: on the page only.
        text: a paragraph; notes: lines that explain words of the tables.
        tables: pairs of header and rows.
        cards: on the page only.
    """

    title: str
    text: str
    notes: Sequence[str] = ()
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[object]]]] = ()
    cards: Sequence[Card] = ()

    def as_text(self) -> str:
        """For a terminal.

        >>> print(Section("Sizes", "Heavy atoms:", (), [(["name", "n"], [["water", 1]])]).as_text())
        Heavy atoms:
        <BLANKLINE>
        name   n
        water  1
        """
        head = "\n".join([self.text, *(f"  {note}" for note in self.notes)])
        return "\n\n".join([head, *(table(header, rows) for header, rows in self.tables)])


def page(title: str, sections: Iterable[Section]) -> str:
    """An HTML page without scripts, links or fonts from elsewhere; pictures are in it.

    Whatever the texts hold is shown as text. The page follows the reader's choice of light or
    dark; pictures keep a white ground.

    >>> text = page("Report", [Section("Names", "from <a file>")])
    >>> "<h2>Names</h2>" in text, "from &lt;a file&gt;" in text
    (True, True)
    """
    body = "\n".join(map(_section, sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.text)}</p>"]
    if section.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in section.notes)
        parts.append(f"<ul>{notes}</ul>")
    parts += [_table(header, rows) for header, rows in section.tables]
    if section.cards:
        parts.append(f'<div class="cards">{"".join(map(_card, section.cards))}</div>')
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = []
    for first, *cells in rows:
        own = f'<th scope="row">{escape(str(first))}</th>'
        lines.append(own + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    # `tabindex` lets the keyboard scroll what is wider than the window.
    return (
        '<div class="wide" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _card(card: Card) -> str:
    # As data, each picture keeps its own ids and styles.
    pictures = "".join(
        f'<img alt="{escape(picture.alt)}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(picture.svg.encode()).decode()}">'
        for picture in card.pictures
    )
    text = f"<p>{escape(card.text)}</p>" if card.text else ""
    caption = f"<figcaption><h3>{escape(card.title)}</h3>{text}</figcaption>"
    return f'<figure>{caption}<div class="paper" tabindex="0">{pictures}</div></figure>\n'


STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --quiet: #57606a; --page: #ffffff;
  --line: #d0d7de; --head: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ed; --quiet: #a3adb8; --page: #14181d; --line: #39424c; --head: #1f252c; }
}
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, "Segoe UI", "Liberation Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0; }
p, ul { margin: .5rem 0; max-width: 60rem; }
figcaption p { color: var(--quiet); margin: 0 0 .5rem; font-size: .85rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
td, tbody th { white-space: nowrap; }
thead th { background: var(--head); vertical-align: bottom; }
tbody th { font-weight: 500; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; padding: .8rem; border: 1px solid var(--line); border-radius: .5rem;
  max-width: 100%; box-sizing: border-box; }
.paper { background: #fff; border-radius: .3rem; padding: .5rem; overflow-x: auto; }
.paper img { display: block; }
"""
