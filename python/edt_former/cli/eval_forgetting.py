"""`edt eval forgetting`: what training has cost the language model on plain text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edt_former.tasks.forgetting import Forgetting


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "eval forgetting",
        help="the language model's loss on plain text, before and after training",
        description="The loss of the frozen language model on plain text, and with all that was "
        "trained attached: with a connector it is the same to the bit, with LoRA it is not.",
        epilog="example: edt eval forgetting runs/mora/model --text wiki.txt --lora runs/lora",
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL", help="folders of models")
    parser.add_argument(
        "--text", type=Path, required=True, metavar="FILE", help="plain text, one a line"
    )
    parser.add_argument(
        "--lora",
        type=Path,
        metavar="DIR",
        help="also train ordinary LoRA of the rank of the first model, a MoRA, on the same data "
        "with the same settings, into this folder, and measure it",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N texts")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the intervals")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the figures, as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write what was asked for."""
    from dataclasses import asdict

    from edt_former.cli.files import writable
    from edt_former.language.frozen import write_json
    from edt_former.report.table import table

    if args.out is not None:
        writable("--out", args.out)
    texts = [line for line in args.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    texts = texts[: args.limit]
    models = list(args.models)
    if args.lora is not None:
        from edt_former.train.ordinary_lora import train_ordinary_lora

        models.append(train_ordinary_lora(models[0], args.lora))
    found = {str(folder): _measure(folder, texts, args) for folder in models}
    header = ("model", "before", "after", "change", "95 % interval", "same bits")
    print(f"{len(texts)} texts, nats per token")
    print(table(header, [(name, *_cells(one)) for name, one in found.items()]))
    if args.out is not None:
        write_json(args.out, {name: asdict(one) for name, one in found.items()})
    return 0


def _measure(folder: Path, texts: list[str], args: argparse.Namespace) -> Forgetting:
    import torch
    from transformers import AutoModelForCausalLM

    from edt_former.model import MoleculeLM
    from edt_former.tasks.forgetting import forgetting

    model = MoleculeLM.from_pretrained(folder)
    if model.processor is None:
        raise ValueError(f"{folder} has no processor, so no tokenizer to read texts with")
    plain = AutoModelForCausalLM.from_pretrained(
        model.frozen_parts["language_model"].path, dtype=torch.float32, use_safetensors=True
    )
    return forgetting(model, plain.eval(), texts, batch_size=args.batch_size, seed=args.seed)


def _cells(one: Forgetting) -> tuple[str, ...]:
    return (
        f"{one.before:.4f}",
        f"{one.after:.4f}",
        f"{one.change:+.4f}",
        f"[{one.low:+.4f}, {one.high:+.4f}]",
        "yes" if one.equal else "no",
    )
