"""`edt prepare conversations`: multi-turn conversations from captions, names and facts."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tqdm import tqdm

    from edt_former.tasks.conversations import Context, Written

KEY = "OPENAI_API_KEY"


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "prepare conversations",
        help="multi-turn conversations about molecules",
        description="Write conversations about molecules from their captions, IUPAC names and what "
        "RDKit computes: by built-in templates, without any model; or by a model behind an "
        "OpenAI-compatible endpoint that you run. What contradicts RDKit, gives the SMILES away or "
        "is no conversation is dropped, with the reason. Resumes where it was stopped. The result "
        "is read by edt prepare.",
        epilog="example: edt prepare conversations captions.txt --names iupac.txt "
        "--out conversations.jsonl",
    )
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="molecules, as edt prepare reads them"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="JSONL")
    parser.add_argument("--names", type=Path, metavar="FILE", help="IUPAC names, as its text")
    parser.add_argument("--turns", type=int, default=4, help="questions (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first molecules only")
    parser.add_argument("--seed", type=int, default=0, help="of the templates")
    asked = parser.add_argument_group("a model that writes them, in the place of templates")
    asked.add_argument("--endpoint", metavar="URL", help="as http://localhost:8000/v1")
    asked.add_argument("--model", metavar="NAME", help="its name at the endpoint")
    asked.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time")
    asked.add_argument("--per-minute", type=float, metavar="N", help="requests begun in a minute")
    asked.add_argument("--temperature", type=float, default=0.7)
    asked.add_argument(
        "--key-from",
        default=KEY,
        metavar="NAME",
        help="environment variable that holds the endpoint's key (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Write, and say what came of it; 1 where requests failed."""
    if (args.endpoint is None) != (args.model is None):
        raise ValueError("--endpoint and --model go together")
    if args.turns < 1:
        raise ValueError(f"--turns must be at least 1, got {args.turns}")
    written = _write(args)
    print(f"{written.kept} conversations in {args.out}")
    for reason, count in written.dropped.most_common():
        print(f"  {count:>7}  dropped: {reason}")
    if written.failed:
        print(f"  {written.failed:>7}  without a reply; the same command asks again")
    return 1 if written.failed else 0


def _write(args: argparse.Namespace) -> Written:
    from itertools import islice

    from tqdm import tqdm

    from edt_former.tasks.conversations import (
        Endpoint,
        generate,
        read_contexts,
        write_from_templates,
    )

    sources = [*args.files, *([] if args.names is None else [args.names])]
    origin = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sources]
    contexts = islice(read_contexts(args.files, names=args.names), args.limit)
    with tqdm(desc="writing", unit="mol", disable=not sys.stderr.isatty()) as bar:
        if args.endpoint is None:
            seen = _counted(contexts, bar)
            options = {"turns": args.turns, "seed": args.seed, "origin": origin}
            return write_from_templates(seen, args.out, **options)
        endpoint = Endpoint(
            args.endpoint,
            args.model,
            os.environ.get(args.key_from) or "none",
            concurrency=args.concurrency,
            per_minute=args.per_minute,
            temperature=args.temperature,
        )
        options = {"turns": args.turns, "origin": origin, "progress": bar.update}
        return generate(contexts, args.out, endpoint, **options)


def _counted(contexts: Iterable[Context], bar: tqdm) -> Iterator[Context]:
    for context in contexts:
        yield context
        bar.update()
