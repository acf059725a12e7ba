"""`edt patch`: where a molecule is cut, and why."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edt_former.cli.files import MOLECULE_FILES, molecule_rows, writable, write_rows

if TYPE_CHECKING:
    from edt_former.report import PatchedMolecule
    from edt_former.report.patches import PatchedRow
    from edt_former.tokens import PatchOptions

CUTTING = ("rule", "q", "threshold", "min_size", "max_size", "max_patches")
CUTTING += ("entropy_source", "tokens")
ONE, MANY = ("svg", "png", "curve", "json"), ("out", "rows", "stats")
PICTURES = {"svg": (".svg",), "png": (".png",), "curve": (".png", ".svg")}
COLUMNS = ("name", "smiles", "reason", "atoms", "patches", "ids", "entropies")


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "patch",
        help="cut molecules into patches, and draw them",
        description="Cut a molecule into patches by the shipped next-atom predictor, print and "
        "draw them. Atoms count from 0 in the order of the SMILES as it is given. With a file "
        f"({', '.join(MOLECULE_FILES)}), cut its molecules.",
        epilog='example: edt patch "CC(=O)Oc1ccccc1C(=O)O" --svg aspirin.svg --curve aspirin.png',
    )
    parser.add_argument("molecules", metavar="SMILES|FILE", help="the molecule, or a file of them")
    parser.add_argument(
        "--source",
        default="entropy",
        help="entropy, or brics: fragments of chemistry (default: %(default)s)",
    )
    cut = parser.add_argument_group("how entropy cuts")
    cut.add_argument(
        "--rule", help="local_max (default), rising_edge, published, threshold or monotonic"
    )
    cut.add_argument("-q", type=float, help="quantile of rule rising_edge (default: 0.75)")
    cut.add_argument("--threshold", type=float, help="of the rules threshold and monotonic")
    cut.add_argument("--min-size", type=int, metavar="N", help="fewest atoms of a patch")
    cut.add_argument("--max-size", type=int, metavar="N", help="most atoms of a patch")
    cut.add_argument("--max-patches", type=int, metavar="N", help="most patches of a molecule")
    cut.add_argument(
        "--entropy-source", help="next_atom (default), surprisal, or node: of the surroundings"
    )
    cut.add_argument("--tokens", type=int, metavar="N", help="patches that a molecule shall have")
    parser.add_argument(
        "--connected", action="store_true", help="cut every patch into its connected pieces"
    )
    parser.add_argument("--control", help="random or shuffled: patches to compare with")
    parser.add_argument("--unit", default="nats", help="nats or bits (default: %(default)s)")
    one = parser.add_argument_group("with a SMILES")
    one.add_argument("--svg", type=Path, metavar="SVG", help="draw the molecule")
    one.add_argument("--png", type=Path, metavar="PNG", help="draw the molecule")
    one.add_argument("--curve", type=Path, metavar="PNG|SVG", help="draw the entropies")
    one.add_argument("--json", action="store_true", help="print JSON")
    many = parser.add_argument_group("with a FILE")
    many.add_argument("--out", type=Path, metavar="CSV", help="write all rows")
    many.add_argument("--rows", type=int, metavar="N", help="rows to print (default: 20)")
    many.add_argument(
        "--stats", action="store_true", help="print what the patches are like (JSON with --json)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the patches, and write what is asked for."""
    is_file = args.molecules.lower().endswith(MOLECULE_FILES)
    if is_file and args.stats:
        return _stats(args)
    needed, others = ("SMILES", ONE) if is_file else ("FILE", MANY)
    for name in others:
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name} needs a {needed}, got {args.molecules!r}")
    return _patch_file(args) if is_file else _patch_one(args)


def _options(args: argparse.Namespace) -> PatchOptions:
    from edt_former.tokens import PatchOptions

    if args.source not in ("entropy", "brics"):
        raise ValueError(f"--source must be entropy or brics, got {args.source}")
    if args.unit not in ("nats", "bits"):
        raise ValueError(f"--unit must be nats or bits, got {args.unit}")
    given = {name: getattr(args, name) for name in CUTTING if getattr(args, name) is not None}
    if given and args.source == "brics":
        name = next(iter(given))
        option = "-q" if name == "q" else f"--{name.replace('_', '-')}"
        raise ValueError(f"{option} needs --source entropy, got --source brics")
    shape = {"connected": args.connected, "control": args.control}
    return PatchOptions(sources=(args.source,), **given, **shape)


def _patch_one(args: argparse.Namespace) -> int:
    from edt_former import shipped
    from edt_former.chem import Invalid, read_molecule
    from edt_former.report import patch_molecules

    for name, suffixes in PICTURES.items():
        if getattr(args, name) is not None:
            writable(f"--{name}", getattr(args, name), suffixes)
    if args.curve is not None and args.curve in (args.svg, args.png):
        raise ValueError(f"--curve must be another file than the molecule's, got {args.curve}")
    options = _options(args)
    molecule = read_molecule(args.molecules)
    if isinstance(molecule, Invalid):
        raise ValueError(f"SMILES {molecule.source!r} cannot be read: {molecule.reason}")
    (patched,) = patch_molecules([molecule], shipped.predictor(), options, unit=args.unit)
    if args.svg is not None:
        args.svg.write_text(patched.svg(), encoding="utf-8")
    if args.png is not None:
        args.png.write_bytes(patched.png())
    if args.curve is not None:
        patched.curve().savefig(args.curve, dpi=200)
    print(json.dumps(_facts(patched), indent=1) if args.json else _text(patched, options))
    return 0


def _facts(patched: PatchedMolecule) -> dict[str, object]:
    """For JSON; atoms by their index in the SMILES as it was given."""
    order, symbols = patched.molecule.order.tolist(), _symbols(patched)
    atoms = zip(order, symbols, patched.ids, patched.entropies, strict=True)
    patches = [
        {
            "id": patch,
            "atoms": [order[atom] for atom in patched.atoms(patch)],
            "opened_by": None if deciding is None else order[deciding],
        }
        for patch, deciding in enumerate(patched.opened_by)
    ]
    return {
        "smiles": patched.molecule.smiles,
        "unit": patched.unit,
        "entropy_after_atom": patched.after,
        "threshold": patched.threshold,
        "patches": patches,
        "atoms": [
            dict(zip(("index", "symbol", "patch", "entropy"), atom, strict=True))
            for atom in sorted(atoms)
        ],
    }


def _text(patched: PatchedMolecule, options: PatchOptions) -> str:
    from edt_former.report.table import table

    order, symbols = patched.molecule.order.tolist(), _symbols(patched)
    rows = []
    for patch, deciding in enumerate(patched.opened_by):
        atoms = patched.atoms(patch)
        opened = ["-", "-"]
        if deciding is not None:
            opened = [
                f"{symbols[deciding]} {order[deciding]}",
                f"{patched.entropies[deciding]:.3f}",
            ]
        indices = " ".join(str(order[atom]) for atom in atoms)
        rows.append([patch, len(atoms), "".join(symbols[atom] for atom in atoms), indices, *opened])
    how = f"entropy, {options.rule}" if options.sources == ("entropy",) else "brics"
    level = "" if patched.threshold is None else f", threshold {patched.threshold:.3f}"
    count = f"{patched.num_patches} patch{'es' if patched.num_patches != 1 else ''}"
    header = ["patch", "size", "symbols", "atoms", "opened by", f"entropy ({patched.unit})"]
    return (
        f"{patched.molecule.smiles}\n{patched.molecule.num_atoms} heavy atoms, {count} "
        f"({how}{level})\n\n{table(header, rows)}"
    )


def _symbols(patched: PatchedMolecule) -> list[str]:
    from edt_former.chem import rdkit_mol

    return [atom.GetSymbol() for atom in rdkit_mol(patched.molecule).GetAtoms()]


def _patch_file(args: argparse.Namespace) -> int:
    from edt_former import shipped
    from edt_former.report.patches import patch_rows
    from edt_former.report.table import table

    options = _options(args)
    keep = 20 if args.rows is None else args.rows
    molecules = molecule_rows(Path(args.molecules), args.out)
    rows = patch_rows(molecules, shipped.predictor(), options, unit=args.unit)
    tally = write_rows(Path(args.molecules), rows, args.out, COLUMNS, _cells, keep=keep)
    print(table(["molecule", "atoms", "patches", "symbols"], [_line(row) for row in tally.shown]))
    print(f"\n{tally.summary('cut')}")
    return 0


def _stats(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from edt_former import shipped
    from edt_former.report.patch_stats import CUTS, MEASURES, patch_stats
    from edt_former.report.table import table

    for name in ("svg", "png", "curve", "out", "rows"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} does not go with --stats")
    options, cuts = _options(args), dict(CUTS)
    if options not in cuts.values():
        cuts["as asked"] = options
    rows = molecule_rows(Path(args.molecules), None)
    bar = tqdm(rows, desc="molecules", unit="mol", disable=not sys.stderr.isatty())
    stats = patch_stats(bar, shipped.predictor(), cuts, unit=args.unit)
    if args.json:
        print(json.dumps(stats.to_json(), indent=1))
        return 0
    lines = [
        [name, *(f"{value:.3g}" for value in cut.measures().values())]
        for name, cut in stats.cuts.items()
    ]
    failed = sum(stats.reasons.values())
    print(table(["cut", *MEASURES], lines))
    print(f"\n{stats.molecules} molecules, {stats.atoms} atoms; {failed} rows not read")
    for reason, count in stats.reasons.most_common(5):
        print(f"  {count}: {reason}")
    return 0


def _cells(row: PatchedRow) -> list[object]:
    """A line of the CSV; ids and entropies in the order of the SMILES as it was given."""
    named = [row.name, row.smiles, row.reason]
    if row.patched is None:
        return [*named, "", "", "", ""]
    ids = " ".join(map(str, row.patched.in_callers_order(row.patched.ids)))
    entropies = row.patched.in_callers_order(row.patched.entropies)
    size = [row.patched.molecule.num_atoms, row.patched.num_patches]
    return [*named, *size, ids, " ".join(f"{entropy:.4f}" for entropy in entropies)]


def _line(row: PatchedRow) -> list[object]:
    if row.patched is None:
        return [row.name[:30], "-", "-", row.reason[:60]]
    symbols = _symbols(row.patched)
    patches = (row.patched.atoms(patch) for patch in range(row.patched.num_patches))
    text = " ".join("".join(symbols[atom] for atom in atoms) for atoms in patches)
    size = [row.patched.molecule.num_atoms, row.patched.num_patches]
    return [row.name[:30], *size, text if len(text) <= 60 else f"{text[:59]}…"]
