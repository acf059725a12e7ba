"""`edt review conversations`: a sample for people to score, and what they scored."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "review conversations",
        help="have people score a sample of conversations",
        description="Draw a sample of conversations into a table with a column per criterion, to "
        "be filled with 0, 1 or 2; with --score, read such a table back and print the means with "
        "95 %% intervals.",
        epilog="example: edt review conversations conversations.jsonl --out sample.csv",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="conversations, or a scored table")
    parser.add_argument("--out", type=Path, metavar="CSV", help="the table to fill")
    parser.add_argument("--count", type=int, default=50, help="of the sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sample, or of the intervals")
    parser.add_argument("--score", action="store_true", help="FILE is a table that was filled")


def run(args: argparse.Namespace) -> int:
    """Draw, or score."""
    from edt_former.cli.files import writable
    from edt_former.report.table import table
    from edt_former.tasks.conversations import RUBRIC, draw_sample, score_sample

    if args.score == (args.out is not None):
        raise ValueError("one of --out and --score must be given")
    if args.score:
        found = score_sample(args.file, seed=args.seed)
        rows = [(name, accuracy) for name, accuracy in found.means.items()]
        print(table(["criterion", "mean [95 %]"], [*rows, ("faultless", found.faultless)]))
        print(f"{found.count} conversations scored, {found.unscored} not")
        return 0
    writable("--out", args.out, (".csv",))
    count = draw_sample(args.file, args.out, count=args.count, seed=args.seed)
    print(f"{count} conversations in {args.out}; score each:")
    for name, meaning in RUBRIC.items():
        print(f"  {name}: {meaning}")
    return 0
