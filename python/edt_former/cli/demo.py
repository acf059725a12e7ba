"""`edt demo`: what the shipped model can do, measured on the spot."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from contextlib import ExitStack
from itertools import chain, pairwise
from pathlib import Path

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


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "demo",
        help="known drugs, accuracy and speed; or the molecules of a file",
        description="Ask the shipped model about eight known drugs, measure how often it is right "
        "on drugs that no training step has seen, and how fast the connector is. With a file "
        "(.smi, .txt, .csv, .tsv, .gz), ask about its molecules.",
        epilog="example: edt demo molecules.csv --out answers.csv",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="SMILES to ask about")
    parser.add_argument(
        "--connector", default="edt_former", help="a shipped connector (default: %(default)s)"
    )
    parser.add_argument(
        "--sample", type=int, default=100, metavar="N", help="held-out drugs to ask about"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=20, help="rows of FILE to print")
    parser.add_argument("--out", type=Path, metavar="CSV", help="write all rows of FILE")


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    from edt_former.shipped import load

    if args.sample < 2:
        raise ValueError(f"--sample must be at least 2, got {args.sample}")
    if args.file is not None:
        return _ask_about_file(args)
    if args.out is not None:
        raise ValueError("--out needs a FILE of molecules")
    clock = [time.perf_counter()]
    model = load(args.connector)
    clock.append(time.perf_counter())
    for show in (_known_drugs, _accuracy, _speed):
        show(model, args)
        clock.append(time.perf_counter())
    loading, drugs, accuracy, speed = (b - a for a, b in pairwise(clock))
    print(
        f"\n{clock[-1] - clock[0]:.0f} s: {loading:.1f} loading, {drugs:.1f} eight drugs, "
        f"{accuracy:.1f} accuracy, {speed:.1f} speed"
    )
    return 0


def _known_drugs(model, _: argparse.Namespace) -> None:
    from edt_former.report.answers import answer_rows
    from edt_former.report.speed import PUBLISHED_SLOTS
    from edt_former.tasks.heldout import heldout_molecules
    from edt_former.tasks.questions import FACT_BY_KEY

    smiles = dict(heldout_molecules())
    print("Eight drugs that no training step has seen; the prompt holds no SMILES, name or size.")
    print(f"  tokens: what the molecule takes; in arXiv:2602.02742, {PUBLISHED_SLOTS} slots each")
    for key in ASKED:
        print(f"  {key}: {FACT_BY_KEY[key].phrasings[0]}")
    print()
    print(_answer_table(answer_rows(model, [(name, smiles[name]) for name in DRUGS], ASKED)))


def _answer_table(rows) -> str:
    from edt_former.report.speed import PUBLISHED_SLOTS
    from edt_former.report.table import table

    header = ["molecule", "atoms", "patches", f"tokens (not {PUBLISHED_SLOTS})", *ASKED]
    lines = []
    for row in rows:
        if row.reason:
            lines.append([row.name[:30], "-", "-", "-", row.reason[:60], *[""] * (len(ASKED) - 1)])
        else:
            marks = [_mark(row.answers[key], row.truth[key]) for key in ASKED]
            lines.append([row.name[:30], row.atoms, row.patches, row.tokens, *marks])
    return table(header, lines)


def _mark(answer: str, truth: str) -> str:
    return f"{answer} ✓" if answer == truth.lower() else f"{answer} ✗ {truth}"


def _accuracy(model, args: argparse.Namespace) -> None:
    import random

    import numpy as np

    from edt_former.chem import read_molecules
    from edt_former.report.table import table
    from edt_former.shipped import manifest
    from edt_former.tasks.accuracy import Guesses
    from edt_former.tasks.evaluation import compare
    from edt_former.tasks.heldout import heldout_molecules
    from edt_former.tasks.questions import FACTS, QUESTION_TYPES, answer_ids

    listed = heldout_molecules()
    count = min(args.sample, len(listed))
    drawn = random.Random(args.seed).sample(listed, count)
    molecules = read_molecules([smiles for _, smiles in drawn])
    truth = np.stack([answer_ids(molecule) for molecule in molecules])
    results = compare(model, molecules, truth, Guesses.from_json(manifest()["guesses"]))
    results = {f"{args.connector}, frozen language model": results.pop("model"), **results}
    print(
        f"\nRight answers on {count} of {len(listed)} held-out drugs, {len(FACTS)} questions each, "
        f"mean over {len(QUESTION_TYPES)} types of question [95 % interval]:\n"
    )
    print(table(["who answers", "right"], [(n, r["macro"]) for n, r in results.items()]))
    ours, *others = results.values()
    print()
    rows = [
        (kind, ours[kind], f"{max(other[kind].value for other in others):.3f}")
        for kind in QUESTION_TYPES
    ]
    print(table(["type of question", "right", "best baseline"], rows))


def _speed(model, _: argparse.Namespace) -> None:
    from edt_former.chem import read_molecules
    from edt_former.graph import GraphBatch
    from edt_former.report.speed import connector_speed
    from edt_former.report.table import table
    from edt_former.tasks.heldout import heldout_molecules

    drugs = read_molecules([smiles for _, smiles in heldout_molecules()[:SPEED_BATCH]])
    graph = GraphBatch.pack(drugs)
    _, patches = model.predictor.patches(graph.elements, graph.offsets)
    speeds = connector_speed(graph.offsets, {"entropy": patches.trim()})
    print(
        f"\nConnector of published size (12 layers, width 768, random weights, fp32) on "
        f"{len(drugs)} drugs, interleaved, medians:\n"
    )
    rows = [
        (
            s.name,
            f"{s.molecules:.1f}",
            f"{s.queries:.0f}",
            f"{1000 * s.seconds:.0f}",
            f"{s.ratio:.2f}",
        )
        for s in speeds
    ]
    header = ["connector", "molecules/s", "query tokens/s", "ms", "time over ours (paired)"]
    print(table(header, rows))


def _ask_about_file(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from edt_former.chem import read_file
    from edt_former.report.answers import answer_rows
    from edt_former.shipped import load

    molecules = read_file(args.file)
    if args.out is not None and args.out.resolve() == args.file.resolve():
        raise ValueError(f"--out must be another file than the one that is read, got {args.out}")
    # Before --out is opened: what it holds outlives a FILE that cannot be read.
    first = next(molecules, None)
    if first is None:
        raise ValueError(f"{args.file} has no rows")
    model = load(args.connector)
    shown, reasons, total = [], [], 0
    with ExitStack() as stack:
        writer = None
        if args.out is not None:
            file = stack.enter_context(args.out.open("w", newline="", encoding="utf-8"))
            writer = csv.writer(file)
            writer.writerow(["name", "smiles", "reason", "atoms", "patches", "tokens", *ASKED])
        rows = answer_rows(model, chain([first], molecules), ASKED)
        for row in tqdm(rows, desc="molecules", unit="mol", disable=not sys.stderr.isatty()):
            total += 1
            if row.reason:
                reasons.append(row.reason)
            if len(shown) < args.rows:
                shown.append(row)
            if writer is not None:
                answers = [row.answers[key] for key in ASKED] if row.answers else [""] * len(ASKED)
                size = [row.atoms, row.patches, row.tokens] if row.answers else [""] * 3
                writer.writerow([row.name, row.smiles, row.reason, *size, *answers])
    if total == len(reasons):
        raise ValueError(f"{args.file} has no valid molecule in {total} rows: {reasons[0]}")
    print(_answer_table(shown))
    if total > len(shown):
        print(f"... and {total - len(shown)} more rows")
    print(f"\n{total} rows, {total - len(reasons)} answered, {len(reasons)} not answered")
    return 0
