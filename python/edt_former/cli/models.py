"""Which shipped model a command asks, by its connector or by what its graph encoder reads."""

from __future__ import annotations

import argparse

from edt_former.shipped import ENCODERS, encoder_of


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `connector_of`."""
    parser.add_argument(
        "--encoder",
        choices=ENCODERS,
        help="what EDT-Former's graph encoder reads: bonds (2d), the places of atoms in a "
        "conformer (3d), or both, blended (default: 2d)",
    )
    parser.add_argument("--connector", help="a shipped connector (default: that of --encoder)")


def connector_of(args: argparse.Namespace) -> str:
    """The shipped connector that the options name.

    Raises:
        ValueError: the connector's graph encoder is not the one that `--encoder` names.
    """
    if args.connector is None:
        return ENCODERS[args.encoder or "2d"]
    reads = encoder_of(args.connector)
    if args.encoder not in (None, reads):
        raise ValueError(
            f"--encoder must be {reads} with --connector {args.connector}, got {args.encoder}"
        )
    return args.connector
