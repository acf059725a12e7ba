"""`edt eval`: what a trained model is worth."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

NO_TEXTS = "--texts needs captions (give --vocabulary) or properties"


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "eval",
        help="scores of a trained model, or of captions in a file",
        description="Evaluate a model that edt train made on prepared data: retrieval of the first "
        "stage, captions and perplexity of the second, properties of a head. Or score captions "
        "that are in a file.",
        epilog="example: edt eval runs/stage2/model --data data/test --vocabulary vocab.txt",
    )
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="the folder of a model; or a table with tabs whose columns 'ground truth' and "
        "'output' hold captions",
    )
    parser.add_argument(
        "--data", type=Path, action="append", default=[], metavar="DIR", help="of edt prepare"
    )
    parser.add_argument(
        "--vocabulary",
        type=Path,
        metavar="FILE",
        help="WordPieces for BLEU and METEOR, one a line: SciBERT's vocab.txt is the field's. "
        "Without it no captions are made",
    )
    parser.add_argument(
        "--known",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="training data, for captions of the nearest neighbour and of any molecule",
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="(default: 64)")
    parser.add_argument(
        "--rerank", type=int, default=0, metavar="K", help="the best K again, by matching"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only so many rows, drawn")
    parser.add_argument("--question", help="instead of that of the training")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--beams", type=int, default=1, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", metavar="NAME", help="(default: a GPU where there is one)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="scores and settings, as JSON")
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="captions or properties of every row, as CSV"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table, write what was asked for."""
    import torch

    from edt_former.cli.files import writable
    from edt_former.language.frozen import write_json
    from edt_former.report.table import table
    from edt_former.tasks.benchmark import (
        PROPERTIES,
        EvalOptions,
        evaluate,
        kind_of,
        rows_of,
        score_file,
    )

    for option, path in (("--out", args.out), ("--texts", args.texts)):
        if path is not None:
            writable(option, path)
    texts: list[tuple[str, ...]] = []
    if args.model.is_file():
        if args.vocabulary is None:
            raise ValueError("--vocabulary is needed to score a file of captions")
        scores, settings = score_file(args.model, args.vocabulary)
    else:
        if not args.data:
            raise ValueError("--data is needed to evaluate a model")
        if args.texts and args.vocabulary is None and kind_of(args.model) != PROPERTIES:
            raise ValueError(NO_TEXTS)
        options = EvalOptions(
            batch_size=args.batch_size,
            candidates=args.rerank,
            vocabulary=args.vocabulary,
            known=tuple(args.known),
            limit=args.limit,
            max_new_tokens=args.max_new_tokens,
            beams=args.beams,
            question=args.question,
            seed=args.seed,
            device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )
        scores, settings, texts = evaluate(args.model, args.data, options)
    header, *rows = rows_of(scores)
    print(f"{settings['kind']}, {settings['rows']} rows")
    print(table(header, rows))
    if any("meteor" in row and row["meteor"] != row["meteor"] for row in scores.values()):
        print("meteor: WordNet is not there (python -m nltk.downloader wordnet)")
    if args.out is not None:
        # JSON has no NaN.
        known = {
            name: {n: None if x != x else x for n, x in row.items()} for name, row in scores.items()
        }
        write_json(args.out, {"scores": known, "settings": settings})
    if args.texts is not None:
        if len(texts) < 2:
            raise ValueError(NO_TEXTS)
        with args.texts.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(texts)
    return 0
