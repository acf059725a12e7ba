"""A page that is one file: all that it shows is inside, and what it shows is text."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from edt_former.report.page import Card, Picture, Section, page

NASTY = """<script>alert("x")</script> & 'quoted' é ✓"""
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><circle r="3" id="a"/></svg>'
SECTIONS = [
    Section(NASTY, NASTY, [NASTY, "second note"], [([NASTY, "n"], [[NASTY, 1], ["water", 2.5]])]),
    Section("Pictures", "of two", cards=[Card(NASTY, NASTY, [Picture(SVG, NASTY)] * 2)]),
    Section("Card without a line", "", cards=[Card("c", "", [Picture(SVG, "a circle")])]),
]


class Read(HTMLParser):
    """What a browser would find."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def read():
    return Read(page(NASTY, SECTIONS))


def test_texts_are_shown_as_they_are(read):
    assert read.all("script") == []
    assert read.texts.count(NASTY) == 9
    assert [cell for cell in read.texts if cell in ("1", "2.5", "water")] == ["1", "water", "2.5"]


def test_nothing_is_loaded(read):
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "link", "iframe", "object", "a"})
    for _, attributes in read.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"url\(|@import", page("t", SECTIONS))


def test_pictures_are_inside_and_told_in_words(read):
    images = read.all("img")
    assert [image["alt"] for image in images] == [NASTY, NASTY, "a circle"]
    for image in images:
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/svg+xml;base64" and base64.b64decode(data).decode() == SVG


def test_tables_name_their_rows_and_columns(read):
    scopes = [attributes.get("scope") for attributes in read.all("th")]
    assert scopes == ["col", "col", "row", "row"]
    assert len(read.all("td")) == 2


def test_light_and_dark():
    text = page("t", [])
    assert "color-scheme: light dark" in text and "prefers-color-scheme: dark" in text
    light, dark = (
        set(re.findall(r"(--\w+): #", block))
        for block in re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)
    )
    assert light == dark == set(re.findall(r"var\((--\w+)\)", text))


def test_an_empty_page_is_a_page():
    read = Read(page("Nothing", []))
    assert [attributes["lang"] for attributes in read.all("html")] == ["en"]
    assert read.texts.count("Nothing") == 2


def test_a_section_as_text():
    section = Section(
        "unseen", "Sizes:", ["n: atoms"], [(["a", "n"], [["x", 1]]), (["b"], [["y"]])]
    )
    assert section.as_text().splitlines() == [
        *("Sizes:", "  n: atoms", "", "a  n", "x  1", "", "b", "y")
    ]
    assert Section("unseen", "Only this.").as_text() == "Only this."


def test_a_figure_is_the_same_text_every_time():
    def drawn():
        figure = Figure()
        figure.add_subplot().plot([0, 1], clip_on=True)
        return Picture.of(figure, "a line")

    first = drawn()
    assert first == drawn() and first.svg.startswith("<?xml") and first.alt == "a line"
