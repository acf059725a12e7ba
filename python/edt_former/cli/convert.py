"""`edt convert`: released files of EDT-Former and MoRA to this package, and back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edt_former.released import Plan

OURS, RELEASED = "ours", "released"
TO_OURS = (
    *("moleculestm", "unimol", "language_model", "predictor", "predictor_heads", "lora_alpha"),
    *("heads", "blending_heads", "max_dynamic", "allow_missing", "allow_unexpected"),
    *("mora_rank", "mora_types", "mora_every", "mora_alpha"),
)


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "convert",
        help="released files of EDT-Former and MoRA to this package, and back",
        description="Convert the released files of EDT-Former (an encoder of the first stage, a "
        "whole model, the next-atom predictor) and MoRA (its weight generator) to folders that "
        "this package reads, or such folders to released files. Tensors keep their bits. Nothing "
        "is written unless every tensor has its place.",
        epilog="example: edt convert edt-former-encoder.safetensors encoder --dry-run",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a file (.safetensors, .bin, .pt, .pth), or a folder with one, several or an index; "
        "with --to released a folder of this package",
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="a folder; with --to released also a file that ends in .safetensors",
    )
    parser.add_argument("--to", default=OURS, help="ours or released (default: %(default)s)")
    model = parser.add_argument_group("a whole model")
    model.add_argument(
        "--language-model", type=Path, metavar="DIR", help="has its config.json and its tokenizer"
    )
    model.add_argument(
        "--no-language-model", action="store_true", help="convert encoder and connector only"
    )
    model.add_argument(
        "--predictor", type=Path, metavar="PATH", help="its next-atom predictor: GPT-2, or ours"
    )
    model.add_argument(
        "--lora-alpha", type=float, metavar="A", help="merge LoRA adapters of the language model"
    )
    files = parser.add_argument_group("graph encoders that SOURCE does not hold")
    files.add_argument("--moleculestm", type=Path, metavar="FILE", help="molecule_model.pth")
    files.add_argument("--unimol", type=Path, metavar="FILE", help="mol_pre_no_h_220816.pt")
    told = parser.add_argument_group("what shapes do not tell")
    told.add_argument(
        "--heads", type=int, help="of the query transformer (default: 12) or generator (16)"
    )
    told.add_argument("--blending-heads", type=int, metavar="N", help="(default: 8)")
    told.add_argument("--predictor-heads", type=int, metavar="N", help="(default: 2)")
    told.add_argument(
        "--max-dynamic", type=int, metavar="N", help="most patches of a molecule (default: 64)"
    )
    told.add_argument("--mora-rank", type=int, metavar="R", help="of adapters (default: 64)")
    told.add_argument("--mora-types", metavar="KINDS", help="that have them (default: qkvom)")
    told.add_argument(
        "--mora-every", type=int, metavar="N", help="which layers have them (default: 4)"
    )
    told.add_argument("--mora-alpha", type=float, metavar="A", help="scales them (default: R)")
    told.add_argument(
        "--prefix", help="of names with --to released: '', model. or mol_llama. (default: as found)"
    )
    differing = parser.add_argument_group("differences")
    differing.add_argument(
        "--allow-missing", action="append", metavar="PATTERN", help="initialise anew what matches"
    )
    differing.add_argument(
        "--allow-unexpected", action="append", metavar="PATTERN", help="leave out what matches"
    )
    parser.add_argument(
        "--shard-size", metavar="SIZE", help="most bytes of a file, as in 500MB (default: 2GB)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT")
    parser.add_argument("--dry-run", action="store_true", help="print the report only")


def run(args: argparse.Namespace) -> int:
    """Print what was found, and write what it becomes."""
    if args.to not in (OURS, RELEASED):
        raise ValueError(f"--to must be ours or released, got {args.to}")
    useless = ("prefix",) if args.to == OURS else TO_OURS
    for name in useless:
        if getattr(args, name) is not None:
            other = RELEASED if args.to == OURS else OURS
            raise ValueError(f"--{name.replace('_', '-')} needs --to {other}, got --to {args.to}")
    if args.no_language_model and args.language_model is not None:
        raise ValueError("--language-model and --no-language-model exclude one another")
    _check_places(args)

    from edt_former.released.plan import SHARD_SIZE
    from edt_former.weights import byte_count

    shard_size = SHARD_SIZE if args.shard_size is None else byte_count(args.shard_size)
    plan = _plan(args)
    print(_report(plan))
    if args.dry_run:
        return 0
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    with tqdm(total=plan.nbytes, desc="written", unit="B", unit_scale=True, disable=quiet) as bar:
        plan.write(
            args.out,
            shard_size=shard_size,
            force=args.force,
            progress=bar.update,
        )
    print(f"\nwrote {args.out}")
    return 0


def _check_places(args: argparse.Namespace) -> None:
    from edt_former.released.plan import check_free

    source, out = args.source.resolve(), args.out.resolve()
    if not source.exists():
        raise FileNotFoundError(f"there is no {args.source}")
    if args.to == RELEASED and not source.is_dir():
        raise ValueError(f"SOURCE must be a folder with --to released, got {args.source}")
    if args.to == OURS and out.suffix == ".safetensors":
        raise ValueError(f"OUT must be a folder, got {args.out}")
    if source == out or out in source.parents or source in out.parents:
        raise ValueError(f"OUT must be apart from SOURCE, got {args.out}")
    if not out.parent.is_dir():
        raise ValueError(f"OUT must be in a folder that exists, got {args.out}")
    if not args.dry_run:
        check_free(args.out, force=args.force)


def _plan(args: argparse.Namespace) -> Plan:
    from edt_former.released import GeneratorSizes, Options, Told, to_ours, to_released

    with_language_model = not args.no_language_model
    if args.to == RELEASED:
        if args.prefix not in (None, "", "model.", "mol_llama."):
            raise ValueError(f"--prefix must be '', model. or mol_llama., got {args.prefix}")
        return to_released(args.source, prefix=args.prefix, language_model=with_language_model)
    sizes = {n: getattr(args, n) for n in ("heads", "blending_heads", "max_dynamic")}
    adapters = {n: getattr(args, f"mora_{n}") for n in ("rank", "types", "every", "alpha")}
    adapters["heads"] = args.heads
    options = Options(
        Told(**{name: size for name, size in sizes.items() if size is not None}),
        moleculestm=args.moleculestm,
        unimol=args.unimol,
        language_model=args.language_model,
        predictor=args.predictor,
        predictor_heads=args.predictor_heads,
        lora_alpha=args.lora_alpha,
        generator=GeneratorSizes(**{n: x for n, x in adapters.items() if x is not None}),
        allow_missing=tuple(args.allow_missing or ()),
        allow_unexpected=tuple(args.allow_unexpected or ()),
    )
    return to_ours(args.source, options, language_model=with_language_model)


def _report(plan: Plan) -> str:
    from edt_former.report.table import table

    rows = [
        (path or "weights", tensors, values, f"{size / 1e6:.1f}", dtypes)
        for path, tensors, values, size, dtypes in plan.rows()
    ]
    keys = sum(row[1] for row in rows)
    named = f" named {plan.layout}" if plan.layout else ""
    lines = [
        f"found {plan.found}",
        f"{keys} tensors{named}, {plan.nbytes / 1e6:.1f} MB\n",
        table(["to be written", "tensors", "values", "MB", "dtypes"], rows),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])
