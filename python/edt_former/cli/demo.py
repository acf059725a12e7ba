"""`edt demo`: what the shipped model can do, measured on the spot."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from edt_former.cli.files import molecule_rows, writable, write_rows
from edt_former.cli.models import add_model, connector_of
from edt_former.machine import cores
from edt_former.shipped import encoder_of

if TYPE_CHECKING:
    from edt_former.chem import Molecule
    from edt_former.model import MoleculeLM
    from edt_former.report.answers import AnsweredRow
    from edt_former.report.page import Section
    from edt_former.report.speed import Speed
    from edt_former.tasks.accuracy import Accuracy

DRUGS = (
    "Aspirin",
    "Caffeine",
    "Ibuprofen",
    "Paracetamol",
    "Nicotine",
    "Morphine",
    "Penicillin G",
    "Sildenafil",
)
ASKED = ("aromatic rings", "hydrogen-bond donors", "carboxylic acid", "logP", "polar surface area")
SPEED_BATCH = 12
TIMEOUT = 5.0
"""Seconds for the conformer of a known drug."""
READS = {
    "2d": "bonds",
    "3d": "elements and places of atoms, in a conformer by RDKit",
    "both": "bonds; elements and places of atoms, in a conformer by RDKit",
}
ABOUT_DRUGS = (
    "Eight drugs that no training step has seen; the prompt holds no SMILES, name or size."
)


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "demo",
        help="known drugs, accuracy and speed; or the molecules of a file",
        description="Ask the shipped model about eight known drugs, measure how often it is right "
        "on drugs that no training step has seen, and how fast the connector is. With a file "
        "(.smi, .txt, .csv, .tsv, .sdf, .gz), ask about its molecules. Write an HTML page of it "
        "all. Beside it stands how every shipped connector did on the whole list of held-out "
        "drugs.",
        epilog="example: edt demo molecules.csv --out answers.csv",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="SMILES to ask about")
    add_model(parser)
    parser.add_argument(
        "--sample", type=int, default=100, metavar="N", help="held-out drugs to ask about"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="ask every shipped connector about the sample, in the place of what was recorded",
    )
    parser.add_argument("--rows", type=int, default=20, help="rows of FILE to print and to draw")
    parser.add_argument("--out", type=Path, metavar="CSV", help="write all rows of FILE")
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("edt_report.html"),
        metavar="HTML",
        help="the page with answers, pictures and figures (default: %(default)s)",
    )
    parser.add_argument("--no-report", action="store_true", help="write no page")


def run(args: argparse.Namespace) -> int:
    """Print the tables and write the page."""
    if args.sample < 2:
        raise ValueError(f"--sample must be at least 2, got {args.sample}")
    if args.out is not None and args.file is None:
        raise ValueError("--out needs a FILE of molecules")
    if not args.no_report:
        writable("--report", args.report)
        if args.report in (args.file, args.out):
            raise ValueError(f"--report must be a file of its own, got {args.report}")
    return _measure(args) if args.file is None else _ask_about_file(args)


def _measure(args: argparse.Namespace) -> int:
    from edt_former.chem import read_molecules
    from edt_former.report.answers import answer_rows
    from edt_former.report.sections import (
        accuracy_section,
        answers_section,
        speed_card,
        speed_section,
    )
    from edt_former.shipped import load
    from edt_former.tasks.heldout import heldout_molecules

    laps = {"": time.perf_counter()}

    def lap(step: str) -> None:
        laps[step] = time.perf_counter()

    def show(section: Section) -> Section:
        print(section.as_text(), end="\n\n")
        return section

    connector = connector_of(args)
    model = load(connector)
    lap("loading")
    listed = heldout_molecules()
    smiles = dict(listed)
    drawn = random.Random(args.seed).sample(listed, min(args.sample, len(listed)))
    molecules = read_molecules([smiles for _, smiles in drawn])
    facts = [("held-out drugs", f"sample of {len(drawn)}, seed {args.seed}")]
    if model.processor.conformers is not None:
        asked = {**dict(drawn), **{name: smiles[name] for name in DRUGS}}
        facts.append(("conformers", _place(model, read_molecules(asked.values()))))
        lap("conformers")
    rows = list(answer_rows(model, [(name, smiles[name]) for name in DRUGS], ASKED))
    answers = show(answers_section(rows, ASKED, ABOUT_DRUGS))
    lap("eight drugs")
    results = _accuracies(model, connector, molecules)
    accuracy = show(accuracy_section(results, count=len(drawn), listed=len(listed)))
    lap("accuracy")
    compared = _connectors(args, molecules, dict(drawn), len(listed))
    if compared is not None:
        show(compared)
        lap("connectors")
    speeds = _speeds(model, [smiles for _, smiles in listed[:SPEED_BATCH]])
    speed = show(speed_section(speeds, molecules=SPEED_BATCH))
    lap("speed")
    times = list(laps.values())
    spent = zip(list(laps)[1:], pairwise(times), strict=True)
    told = ", ".join(f"{after - before:.1f} {step}" for step, (before, after) in spent)
    print(f"{times[-1] - times[0]:.0f} s: {told}")
    if not args.no_report:
        speed = replace(speed, cards=[speed_card(speeds)])
        sections = [s for s in (answers, accuracy, compared, speed) if s is not None]
        _write_page(args, model, "What the shipped model can do", sections, rows, facts)
    return 0


def _place(model: MoleculeLM, molecules: Sequence[Molecule]) -> str:
    """Give the model's processor a conformer of each, made by all cores; what came of it."""
    from edt_former.chem import make_conformers

    options = replace(model.processor.conformers, timeout=TIMEOUT, flat=True)
    conformers = make_conformers(molecules, options, workers=cores(), progress=True)
    model.processor.keep_conformers(molecules, conformers)
    flat = sum(conformer.flat for conformer in conformers)
    return f"of {len(conformers)} molecules, {flat} of them drawn flat for want of one"


def _accuracies(
    model: MoleculeLM, connector: str, molecules: Sequence[Molecule]
) -> dict[str, dict[str, Accuracy]]:
    import numpy as np

    from edt_former.shipped import manifest
    from edt_former.tasks.accuracy import Guesses
    from edt_former.tasks.evaluation import compare
    from edt_former.tasks.questions import answer_ids

    truth = np.stack([answer_ids(molecule) for molecule in molecules])
    results = compare(model, molecules, truth, Guesses.from_json(manifest()["guesses"]))
    return {f"{connector}, frozen language model": results.pop("model"), **results}


def _connectors(
    args: argparse.Namespace, molecules: Sequence[Molecule], drawn: dict[str, str], listed: int
) -> Section | None:
    """Every shipped connector: as recorded on the whole list, or asked now about the sample."""
    from edt_former.report.sections import connectors_section
    from edt_former.shipped import connectors, load, manifest
    from edt_former.tasks.accuracy import Accuracy

    if args.compare:
        found = {}
        for name in connectors():
            model = load(name)
            if model.processor.conformers is not None:
                _place(model, molecules)
            found[name] = next(iter(_accuracies(model, name, molecules).values()))
        asked = f"the {len(drawn)} drugs of the sample"
    else:
        recorded = manifest().get("accuracy", {})
        shipped = set(connectors())
        found = {
            name: {kind: Accuracy(**a) for kind, a in result["known drugs"]["model"].items()}
            for name, result in recorded.items()
            if name in shipped
        }
        asked = f"all {listed} held-out drugs, as recorded when they were made"
    if not found:
        return None
    reads = {name: encoder_of(name) for name in found}
    return connectors_section(found, reads, asked=asked)


def _speeds(model: MoleculeLM, smiles: Sequence[str]) -> list[Speed]:
    from edt_former.chem import read_molecules
    from edt_former.graph import GraphBatch
    from edt_former.report.speed import connector_speed

    graph = GraphBatch.pack(read_molecules(smiles))
    _, patches = model.predictor.patches(graph.elements, graph.offsets)
    return connector_speed(graph.offsets, {"entropy": patches.trim()})


def _ask_about_file(args: argparse.Namespace) -> int:
    from edt_former.report.answers import answer_rows
    from edt_former.report.sections import answers_section
    from edt_former.report.table import table
    from edt_former.shipped import load

    molecules = molecule_rows(args.file, args.out)
    model = load(connector_of(args))
    rows = answer_rows(model, molecules, ASKED, workers=cores())
    header = ["name", "smiles", "reason", "atoms", "patches", "tokens", *ASKED]
    tally = write_rows(args.file, rows, args.out, header, _cells, keep=args.rows)
    section = answers_section(tally.shown, ASKED, tally.summary("answered"))
    print(table(*section.tables[0]))
    print(f"\n{section.text}")
    if not args.no_report:
        _write_page(args, model, f"Answers about {args.file.name}", [section], tally.shown, [])
    return 0


def _cells(row: AnsweredRow) -> list[object]:
    """A line of the CSV."""
    if row.answers is None:
        return [row.name, row.smiles, row.reason, *[""] * (3 + len(ASKED))]
    size = [row.atoms, row.patches, row.tokens]
    return [row.name, row.smiles, row.reason, *size, *(row.answers[key] for key in ASKED)]


def _write_page(
    args: argparse.Namespace,
    model: MoleculeLM,
    title: str,
    sections: Sequence[Section],
    rows: Sequence[AnsweredRow],
    facts: Sequence[tuple[str, object]],
) -> None:
    """The sections, pictures of the rows, and how it came about."""
    from edt_former.report.page import page
    from edt_former.report.patches import patch_rows
    from edt_former.report.sections import circumstances_section, patches_section

    sections, options = list(sections), model.processor.patch_options
    if "entropy" in options.sources:
        options = replace(options, sources=("entropy",))
        drawn = [(row.name, row.smiles) for row in rows if not row.reason]
        sections.append(patches_section(patch_rows(drawn, model.processor.predictor, options)))
    connector = connector_of(args)
    reads = READS[encoder_of(connector)]
    sections.append(
        circumstances_section([("connector", connector), ("graph encoder reads", reads), *facts])
    )
    args.report.write_text(page(title, sections), encoding="utf-8")
    print(f"\nreport: {args.report}")
