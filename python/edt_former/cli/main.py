"""`edt`: one sub-command per file of this folder."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

COMMANDS = (
    *("contest", "convert", "demo", "describe", "doctor", "eval", "eval forgetting", "inspect"),
    *("inspect oversmoothing", "patch", "prepare", "prepare conversations", "profile"),
    *("review conversations", "train"),
)
"""A file of this folder each, a blank in the name being an underscore in the file's."""
MENDABLE = (ValueError, TypeError, OSError, EOFError, RuntimeError, ImportError, csv.Error)
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Environment in which transformers, imported later, loads models without a word."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when all went well, 2 for what the user can mend.

    With `EDT_DEBUG` in the environment an error shows its traceback.
    """
    parser = argparse.ArgumentParser(
        prog="edt",
        description="Let a frozen language model read molecules.",
        epilog='example: edt describe "CC(=O)Oc1ccccc1C(=O)O" --ask "How many rings does it have?"',
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        _command(name).add(commands)
    args = parser.parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        return _command(args.command).run(args)
    except MENDABLE as error:
        if os.environ.get("EDT_DEBUG"):
            raise
        print(f"edt {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"edt {args.command}: interrupted", file=sys.stderr)
        return 130


def _joined(arguments: Sequence[str]) -> list[str]:
    """The arguments with the two words of a command as one."""
    words = " ".join(arguments[:2])
    return [words, *arguments[2:]] if words in COMMANDS else list(arguments)


def _command(name: str) -> ModuleType:
    """The module of a command; what it needs is imported when it runs, so that help is instant."""
    return import_module(f"edt_former.cli.{name.replace(' ', '_')}")


if __name__ == "__main__":
    sys.exit(main())
