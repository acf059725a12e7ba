"""`edt inspect`: what a checkpoint holds, what it trains, and where it comes from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "inspect",
        help="parts, sizes and provenance of a checkpoint",
        description="Look into a folder that edt train, edt convert or save_pretrained wrote: its "
        "parts with their sizes, the frozen parts that it needs and whether they are there, what a "
        "run trained, and what it was told. No number of a weight is read unless asked.",
        epilog="example: edt inspect runs/stage2/model",
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--verify", action="store_true", help="compare the frozen parts with their hashes"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print what is there; 1 where a frozen part is missing or another one."""
    from edt_former.report.inspection import inspect_checkpoint, lines

    found = inspect_checkpoint(args.folder, verify=args.verify)
    print(json.dumps(found, indent=1) if args.json else "\n".join(lines(found)))
    return 0 if all(part["state"] in ("there", "verified") for part in found["frozen"]) else 1
