"""`edt profile`: what ragged queries save, measured here."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edt_former.report.profile import Profile
    from edt_former.report.timing import Spread

PLOTS = (".png", ".svg", ".pdf")
ROUNDS = {"published": 5, "tiny": 15}


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "profile",
        help="time and memory from SMILES to an answer, beside static queries and padding",
        description="Time EDT-Former from SMILES to generated tokens, stage by stage, beside the "
        "static Q-Former (32 queries, and as many as EDT-Former has on average) and beside padding "
        "(to the longest molecule of a batch, and to the 96 slots of arXiv:2602.02742). All share "
        "their weights and run in turns in one process, after their results were compared. Needs "
        "about a minute on two free cores.",
        epilog="example: edt profile --size tiny --json profile.json --plot profile.png",
    )
    parser.add_argument(
        "--molecules", type=Path, metavar="FILE", help="SMILES; default: the held-out drugs"
    )
    parser.add_argument(
        "--count",
        type=int,
        default=8,
        help="molecules, drawn at random from FILE (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=8,
        help="molecules that go through together (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        choices=("published", "tiny"),
        default="published",
        help="connector of 12 layers and width 768 with random weights, or the shipped models "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--llm",
        metavar="40m|135m|1b|8b|DIR",
        help="of the published size: a Llama-like model of that many parameters with random "
        "weights, or the folder of your own (default: 40m)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of connector and language model (default: %(default)s)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="of torch; default: as torch chooses")
    parser.add_argument(
        "--rounds", type=int, help="that are timed (default: 5 of published size, 15 of tiny)"
    )
    parser.add_argument(
        "--text-tokens", type=int, default=32, help="of the question (default: %(default)s)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=8, help="of the answer (default: %(default)s)"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every figure")
    parser.add_argument(
        "--plot", type=Path, metavar="OUT", help="write a picture: .png, .svg, .pdf"
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    _check(args)
    import torch

    from edt_former.machine import busy
    from edt_former.report.profile import profile
    from edt_former.report.workload import Workload

    if args.plot is not None:
        import matplotlib  # noqa: F401 (where it is missing, this is the time to say so)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    workload = Workload(
        size=args.size,
        llm=args.llm or "40m",
        dtype=args.dtype,
        device=args.device,
        batch=args.batch,
        text_tokens=args.text_tokens,
        new_tokens=args.new_tokens,
    )
    smiles, unreadable = _molecules(args.molecules, args.count)
    if warning := busy():
        print(f"warning: {warning}", file=sys.stderr)
    found = profile(
        workload,
        smiles,
        rounds=args.rounds or ROUNDS[args.size],
        memory=not args.no_memory,
        progress=sys.stderr.isatty(),
    )
    found = replace(found, notes=unreadable + found.notes)
    _print(found)
    if args.json is not None:
        from edt_former.language.frozen import write_json

        write_json(args.json, found.to_json())
    if args.plot is not None:
        from edt_former.report.profile_plot import profile_figure

        profile_figure(found).savefig(args.plot, dpi=150)
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be wrong is said before a minute is spent."""
    for name in ("count", "batch", "rounds", "threads", "text_tokens", "new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.llm is not None and args.size == "tiny":
        raise ValueError("--llm goes with --size published: the tiny models have their own")
    if args.plot is not None and args.plot.suffix not in PLOTS:
        raise ValueError(f"--plot must end in {', '.join(PLOTS)}, got {args.plot}")
    for name in ("json", "plot"):
        if (path := getattr(args, name)) is not None:
            _check_writable(name, path)


def _check_writable(name: str, path: Path) -> None:
    """By opening it, which is the only way to know; what it holds stays."""
    there = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"--{name} cannot be written: {error}") from error
    if not there:
        path.unlink()


def _molecules(file: Path | None, count: int) -> tuple[list[str], list[str]]:
    """At most `count` readable SMILES in random order, and what to tell of the others."""
    import random

    from edt_former.chem import Invalid, read_file, read_molecule
    from edt_former.tasks.heldout import heldout_molecules

    rows = heldout_molecules() if file is None else list(read_file(file))
    invalid, smiles = [], []
    for _, text in random.Random(0).sample(rows, len(rows)):
        if len(smiles) == count:
            break
        molecule = read_molecule(text)
        if isinstance(molecule, Invalid):
            invalid.append(molecule)
        else:
            smiles.append(text)
    notes = []
    if invalid:
        bad = invalid[0]
        notes.append(
            f"{len(invalid)} of {len(invalid) + len(smiles)} rows that were drawn cannot be read, "
            f"the first {bad.source[:60]!r}: {bad.reason}"
        )
    if not smiles:
        raise ValueError(f"{file} has no valid molecule: {notes[0] if notes else 'no rows'}")
    if len(smiles) < count:
        notes.append(f"{file or 'the list'} has {len(smiles)} valid molecules, fewer than {count}")
    return smiles, notes


def _print(found: Profile) -> None:
    from edt_former.report.pipeline import ENCODING, STAGES
    from edt_former.report.table import table
    from edt_former.report.timing import Spread

    for what, explanation in [*found.description(), *(("note", note) for note in found.notes)]:
        print(f"{what:<11}{explanation}")

    header = ("contender", "query tokens", "molecules/s", "query tokens/s", "time ratio")
    rows = [
        (
            m.name,
            round(m.tokens, 1),
            round(found.molecules_per_second(m, ENCODING), 1),
            round(found.query_tokens_per_second(m)),
            _ratio(found.ratio(m, ENCODING)),
        )
        for m in found.measured
    ]
    print(f"\nFrom SMILES to query tokens of the language model:\n\n{table(header, rows)}")

    header = (
        "contender",
        "prompt tokens",
        "padded",
        "prefill ms",
        "decoded/s",
        "molecules/s",
        "time ratio",
        "peak MB",
        "working MB",
    )
    rows = [
        (
            m.name,
            round(m.prompt_tokens, 1),
            round(m.computed_tokens, 1),
            round(1000 * Spread.of(m.seconds["prefill"]).median, 1),
            round(found.decoded_per_second(m)),
            round(found.molecules_per_second(m), 1),
            _ratio(found.ratio(m)),
            "-" if m.peak is None else round(m.peak.total / 1e6),
            "-" if m.peak is None else round(m.peak.working / 1e6),
        )
        for m in found.measured
    ]
    print(f"\nFrom SMILES to an answer:\n\n{table(header, rows)}\n")
    print("padded: what the language model computes, its rows padded to the longest of a batch.")
    if any(m.peak for m in found.measured):
        source = next(m.peak.source for m in found.measured if m.peak)
        print(f"peak: {source} of a process of its own; working: what comes on top of the models.")

    rows = [
        (m.name, *(round(1000 * Spread.of(m.seconds[stage]).median, 1) for stage in STAGES))
        for m in found.measured
    ]
    print(f"\nMilliseconds by stage:\n\n{table(('contender', *STAGES), rows)}")


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f} [{spread.low:.2f}, {spread.high:.2f}]"
