"""`edt contest`: connectors and ordinary LoRA on measured properties, at one training budget."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "contest",
        help="MoRA, EDT-Former, static Q-Former and LoRA on ESOL and BBBP",
        description="Train MoRA, EDT-Former, the static Q-Former and ordinary LoRA on the shipped "
        "language model, from scratch and with one budget, to answer questions about measured "
        "properties in text; scaffold split, several seeds, intervals. Goes on where it was "
        "stopped.",
        epilog="example: edt contest --data moleculenet --out runs/contest",
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="MoleculeNet's ESOL.csv.gz, BBBP.csv.gz",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/contest"), metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="N")
    parser.add_argument("--steps", type=int, default=150, help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train, ask, print a table."""
    from edt_former.report.table import table
    from edt_former.tasks.contest import run_contest

    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds must be at least 0, got {min(args.seeds)}")
    found = run_contest(args.data, args.out, seeds=args.seeds, steps=args.steps)
    for name, one in found["properties"].items():
        sizes = ", ".join(f"{count} {part}" for part, count in one["molecules"].items())
        print(f"\n{name}: {sizes}")
        header = (one["metric"], "", "95 % interval", "trained", "loss on other text")
        print(table(header, [_cells(who, row) for who, row in one["contenders"].items()]))
    print(f"\n{args.out / 'contest.json'}")
    return 0


def _cells(who: str, row: dict) -> tuple[object, ...]:
    text = ""
    if "runs" in row:
        lost = [run["forgetting"] for run in row["runs"]]
        change = sum(one["after"] - one["before"] for one in lost) / len(lost)
        text = "the same bits" if all(one["equal"] for one in lost) else f"{change:+.3f}"
    interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
    return who, f"{row['value']:.3f}", interval, f"{row['trained']:,}", text
