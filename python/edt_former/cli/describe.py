"""`edt describe`: ask about one molecule."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from edt_former.cli.models import add_model, connector_of


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "describe",
        help="ask about one molecule",
        description="Ask the shipped model about one molecule, and compare with RDKit.",
        epilog='example: edt describe "CN1C=NC2=C1C(=O)N(C(=O)N2C)C" --ask "How many rings?"',
    )
    parser.add_argument("smiles", metavar="SMILES", help="the molecule")
    parser.add_argument(
        "--ask",
        action="append",
        metavar="QUESTION",
        help="a question, may be repeated; without one, all that the model knows are asked",
    )
    add_model(parser)
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="a saved MoleculeLM instead of the shipped one"
    )
    parser.add_argument(
        "--language-model", metavar="DIR", help="of --model, where it does not say where that is"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the molecule's size and the answers."""
    from edt_former.chem import Invalid, read_molecule
    from edt_former.model import MoleculeLM
    from edt_former.report.table import table
    from edt_former.shipped import load
    from edt_former.tasks.questions import FACTS, facts, match_question, value_of

    _check_model(args)
    molecule = read_molecule(args.smiles)
    if isinstance(molecule, Invalid):
        is_file = os.path.isfile(args.smiles)
        hint = f"; for the molecules of a file: edt demo {args.smiles}" if is_file else ""
        raise ValueError(f"SMILES {molecule.source!r} cannot be read: {molecule.reason}{hint}")
    if args.model is None:
        model = load(connector_of(args))
    else:
        model = MoleculeLM.from_pretrained(args.model, language_model=args.language_model)
    questions = args.ask or [fact.phrasings[0] for fact in FACTS]
    answers = model.answer(molecule, questions)
    truth = facts(molecule)
    tokens = model.processor.token_counts([molecule])[0]
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        key = match_question(question)
        value = (value_of(answer, key) if key else None) or answer
        rows.append((question, value, truth[key] if key else "-"))
        if key is None and args.model is None:
            print(
                f"note: {question!r} is none of the {len(FACTS)} things the shipped model was "
                "taught to tell; do not rely on its answer",
                file=sys.stderr,
            )
    if args.json:
        answered = [dict(zip(("question", "answer", "rdkit"), row, strict=True)) for row in rows]
        size = {"smiles": molecule.smiles, "heavy_atoms": molecule.num_atoms, "tokens": tokens}
        print(json.dumps({**size, "answers": answered}, indent=1))
        return 0
    print(f"{molecule.smiles}\n{molecule.num_atoms} heavy atoms, {tokens} tokens in the prompt\n")
    print(table(["question", "answer", "RDKit"], rows))
    return 0


def _check_model(args: argparse.Namespace) -> None:
    if args.model is None:
        if args.language_model:
            raise ValueError("--language-model belongs to --model")
        return
    if not args.model.is_dir():
        raise ValueError(f"--model must be a folder, got {args.model}")
    if args.connector or args.encoder:
        raise ValueError("--connector and --encoder choose a shipped model: not with --model")
    if (args.model / "head").is_dir():
        raise ValueError(
            f"{args.model} has a property head and no language model: its predictions are written "
            "by edt eval --texts, or PropertyModel.from_pretrained(...).predict_molecules"
        )
