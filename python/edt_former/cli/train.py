"""`edt train`: make models."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "train",
        help="train models",
        description="Train models from data that you have.",
        epilog="example: edt train tiny --data smiles_corpora --out runs/tiny",
    )
    recipes = parser.add_subparsers(dest="recipe", required=True, metavar="RECIPE")
    tiny = recipes.add_parser(
        "tiny",
        help="the small models that ship with the package",
        description="Train the shipped models again: graph encoders, next-atom predictor, language "
        "model and connectors. Resumes where it was stopped.",
        epilog="example: edt train tiny --data smiles_corpora --out runs/tiny",
    )
    tiny.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="files of ZINC SMILES"
    )
    tiny.add_argument("--out", type=Path, default=Path("runs/tiny"), metavar="DIR")
    tiny.add_argument("--seed", type=int, default=0)
    tiny.add_argument(
        "--processes", type=int, default=2, help="for reading molecules and their conformers"
    )
    tiny.add_argument(
        "--scale", type=float, default=1.0, help="share of molecules and steps, for a quick trial"
    )


def run(args: argparse.Namespace) -> int:
    """Run the recipe."""
    from edt_former.tasks.questions import FACTS
    from edt_former.train.tiny.data import SELF_SUPERVISED
    from edt_former.train.tiny.encoder import SPATIALLY_SUPERVISED
    from edt_former.train.tiny.recipe import run_recipe

    if not 0 < args.scale <= 1:
        raise ValueError(f"--scale must be in (0, 1], got {args.scale}")
    print(
        f"the graph encoders learn from: {', '.join(SELF_SUPERVISED)}; "
        f"in 3D also from: {', '.join(SPATIALLY_SUPERVISED)}"
    )
    print(f"the questions ask for: {', '.join(fact.key for fact in FACTS)}")
    run_recipe(args.data, args.out, seed=args.seed, processes=args.processes, scale=args.scale)
    return 0
