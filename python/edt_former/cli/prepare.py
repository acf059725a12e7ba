"""`edt prepare`: tables and JSON lines become data that training reads."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edt_former.data import PrepareOptions

SHIPPED = "shipped"


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "prepare",
        help="read molecules and texts once, for training",
        description="Read molecules with their texts, conversations or numbers, and write what "
        "training needs of them: arrays, patches, conformers. Rows that cannot be read are kept, "
        "with the reason. Resumes where it was stopped.",
        epilog="example: edt prepare captions.txt --out data/captions --exclude test.txt",
    )
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="a table (.csv, .tsv, .txt with tabs), JSON lines (.jsonl) or a list (.json) in a "
        "published layout, SMILES (.smi) or structures (.sdf); each perhaps with .gz behind",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    columns = parser.add_argument_group("columns, where they have unusual names")
    columns.add_argument("--smiles-column", metavar="NAME")
    columns.add_argument("--id-column", metavar="NAME")
    columns.add_argument("--text-column", metavar="NAME")
    columns.add_argument(
        "--targets", metavar="NAME,...", help="columns of numbers to predict", default=""
    )
    made = parser.add_argument_group("what is made")
    made.add_argument(
        "--patches",
        metavar="SOURCE,...",
        default="",
        help="brics, entropy or both: the patches of every molecule; without it they are found "
        "when the molecules are read",
    )
    made.add_argument(
        "--patch-options",
        type=_options_of,
        default={},
        metavar="JSON",
        help='further options, as the connector has them, as {"rule": "local_max"}',
    )
    made.add_argument(
        "--predictor",
        default=SHIPPED,
        metavar="DIR",
        help="next-atom predictor (default: %(default)s)",
    )
    made.add_argument("--conformers", action="store_true", help="for encoders that read 3D")
    made.add_argument(
        "--timeout", type=float, default=30.0, metavar="S", help="seconds for one conformer"
    )
    kept = parser.add_argument_group("molecules of other sets, by their connectivity (InChIKey)")
    kept.add_argument(
        "--exclude",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="leave out molecules that it has; may be repeated",
    )
    kept.add_argument(
        "--overlap",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="say how many of its molecules are here; may be repeated",
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--rows-per-part", type=int, default=1024, metavar="N")


def run(args: argparse.Namespace) -> int:
    """Prepare, and say what came of it."""
    from edt_former.data import PreparedData, find_overlaps, prepare

    found = prepare(
        args.files,
        args.out,
        _options(args),
        processes=args.processes,
        progress=sys.stderr.isatty(),
    )
    print(f"{found['usable']} of {found['rows']} rows are usable, in {args.out}")
    for reason, count in found["reasons"].items():
        print(f"  {count:>7}  {reason}")
    if args.overlap:
        for overlap in find_overlaps(PreparedData(args.out).blocks(), args.overlap):
            print(f"here are {overlap}")
    return 0


def _options_of(text: str) -> dict[str, object]:
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}") from None


def _options(args: argparse.Namespace) -> PrepareOptions:
    from edt_former.chem import ConformerOptions
    from edt_former.data import Columns, PrepareOptions
    from edt_former.shipped import folder
    from edt_former.tokens import PatchOptions

    patches = None
    if args.patches:
        patches = PatchOptions(sources=_names(args.patches), **args.patch_options)
    predictor = folder() / "predictor" if args.predictor == SHIPPED else Path(args.predictor)
    return PrepareOptions(
        columns=Columns(args.smiles_column, args.id_column, args.text_column, _names(args.targets)),
        patches=patches,
        predictor=predictor if patches is not None and patches.needs_predictor else None,
        conformers=ConformerOptions(timeout=args.timeout) if args.conformers else None,
        exclude=tuple(args.exclude),
        rows_per_part=args.rows_per_part,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
