"""`edt`: one sub-command per file of this folder."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

COMMANDS = ("demo", "describe", "train")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when all went well, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="edt",
        description="Let a frozen language model read molecules.",
        epilog='example: edt describe "CC(=O)Oc1ccccc1C(=O)O" --ask "How many rings does it have?"',
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        _command(name).add(commands)
    args = parser.parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return _command(args.command).run(args)
    except (ValueError, TypeError, FileNotFoundError, RuntimeError, ImportError) as error:
        if os.environ.get("EDT_DEBUG"):
            raise
        print(f"edt {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"edt {args.command}: interrupted", file=sys.stderr)
        return 130


def _command(name: str) -> object:
    """The module of a command; what it needs is imported when it runs, so that help is instant."""
    from importlib import import_module

    return import_module(f"edt_former.cli.{name}")


if __name__ == "__main__":
    sys.exit(main())
