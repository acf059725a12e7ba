"""`edt inspect oversmoothing`: how alike a graph encoder makes the atoms, level by level."""

from __future__ import annotations

import argparse
from pathlib import Path

TIMEOUT = 5.0
"""Seconds for a conformer; a molecule without one is laid flat."""
SHIPPED = ("graph_encoder", "graph_encoder_3d", "graph_encoder_both")


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "inspect oversmoothing",
        help="how alike atoms become from level to level",
        description="For every level of graph encoders: the mean cosine between two atoms of a "
        "molecule, and the effective rank of the atoms' vectors, as a table and a plot. Cosines "
        "near 1 and a rank near 1 mean that the level has smoothed the atoms out.",
        epilog="example: edt inspect oversmoothing --plot oversmoothing.png",
    )
    parser.add_argument(
        "encoders",
        nargs="*",
        type=Path,
        metavar="DIR",
        help="folders of graph encoders (default: those that ship)",
    )
    parser.add_argument(
        "--molecules", type=Path, metavar="FILE", help="SMILES; default: known drugs"
    )
    parser.add_argument("--count", type=int, default=100, metavar="N", help="of the molecules")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="or SVG or PDF")


def run(args: argparse.Namespace) -> int:
    """Print the table, write the plot."""
    from edt_former.chem import (
        ConformerOptions,
        Molecule,
        make_conformers,
        read_file,
        read_molecule,
    )
    from edt_former.cli.files import writable
    from edt_former.graph import make_encoder
    from edt_former.language.frozen import load_part
    from edt_former.machine import cores
    from edt_former.report.oversmoothing import level_rows, oversmoothing_plot, smoothness
    from edt_former.report.table import table
    from edt_former.shipped import folder
    from edt_former.tasks.heldout import heldout_molecules

    if args.plot is not None:
        writable("--plot", args.plot, (".png", ".svg", ".pdf"))
    listed = heldout_molecules() if args.molecules is None else read_file(args.molecules)
    read = (read_molecule(smiles) for _, smiles in listed)
    molecules = [m for m in read if isinstance(m, Molecule)][: args.count]
    if not molecules:
        raise ValueError(f"{args.molecules} has no valid molecule")
    folders = args.encoders or [folder() / name for name in SHIPPED]
    alone = len({path.name for path in folders}) == len(folders)
    encoders = {
        path.name if alone else str(path): load_part(make_encoder, path).eval() for path in folders
    }
    places = None
    if any(encoder.needs_coordinates for encoder in encoders.values()):
        options = ConformerOptions(timeout=TIMEOUT, flat=True)
        made = make_conformers(molecules, options, workers=cores(), progress=True)
        places = [conformer.coordinates for conformer in made]
    found = {name: smoothness(e, molecules, places) for name, e in encoders.items()}
    header = ["encoder", "level", "view", "mean cosine", "effective rank", "of"]
    print(table(header, level_rows(found)))
    print(f"{len(molecules)} molecules; those of one atom have no cosines")
    if args.plot is not None:
        oversmoothing_plot(found).savefig(args.plot)
        print(f"plot: {args.plot}")
    return 0
