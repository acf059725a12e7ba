"""`edt train`: make models."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

STAGES = {
    "language": (
        "a small causal language model",
        "Train a small causal language model on the texts of prepared data, where there is none at "
        "hand.",
    ),
    "stage1": (
        "graphs and texts",
        "The first stage: a connector learns to read molecules by their texts, through contrast, "
        "matching and captioning.",
    ),
    "stage2": (
        "instructions, the language model frozen",
        "The second stage: a frozen language model learns to read the connector's tokens in "
        "conversations.",
    ),
    "finetune": (
        "a trained model, with adapters or a property head",
        "Fine-tune a model of the second stage: LoRA on its language model, or a head on its "
        "connector's tokens that predicts properties.",
    ),
}
RUNS = {
    "language": ("language", "train_language_model", "LanguageConfig"),
    "stage1": ("stage1", "train_stage1", "Stage1Config"),
    "stage2": ("stage2", "train_stage2", "Stage2Config"),
    "finetune": ("finetune", "finetune", "FinetuneConfig"),
}
"""By stage, the module and function that run it, and what it is told."""

RESUMES = (
    "A run that was stopped, in whatever way, goes on by the same command. Several processes: "
    "torchrun --nproc-per-node N -m edt_former.cli.main train ..."
)


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "train",
        help="train models",
        description="Train models from data that you have.",
        epilog="example: edt train stage1 --config recipe.yaml",
    )
    recipes = parser.add_subparsers(dest="recipe", required=True, metavar="RECIPE")
    for name, (short, long) in STAGES.items():
        _add_stage(recipes, name, short, long)
    _add_ablation(recipes)
    tiny = recipes.add_parser(
        "tiny",
        help="the small models that ship with the package",
        description="Train the shipped models again: graph encoders, next-atom predictor, language "
        "model and connectors. Resumes where it was stopped.",
        epilog="example: edt train tiny --data smiles_corpora --out runs/tiny",
    )
    tiny.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="files of ZINC SMILES"
    )
    tiny.add_argument("--out", type=Path, default=Path("runs/tiny"), metavar="DIR")
    tiny.add_argument("--seed", type=int, default=0)
    tiny.add_argument(
        "--processes", type=int, default=2, help="for reading molecules and their conformers"
    )
    tiny.add_argument(
        "--scale", type=float, default=1.0, help="share of molecules and steps, for a quick trial"
    )
    tiny.add_argument(
        "--connector",
        metavar="NAME",
        help="train this one alone, as llamo, against the frozen parts that ship",
    )


def _add_ablation(recipes: argparse._SubParsersAction) -> None:
    ablation = recipes.add_parser(
        "ablation",
        help="the projectors of LLaMo against one another",
        description="Train every projector of LLaMo from scratch at equal budgets, against the "
        "frozen parts that ship: on the questions of the shipped models, and on a property of a "
        "table, tested on scaffolds of its own. Prints scores with 95 %% intervals and paired "
        "differences to the published projector. Resumes where it was stopped.",
        epilog="example: edt train ablation --data smiles_corpora --table ESOL.csv --target logS",
    )
    ablation.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="files of ZINC SMILES"
    )
    ablation.add_argument(
        "--table", type=Path, required=True, metavar="FILE", help="molecules with a number each"
    )
    ablation.add_argument("--target", required=True, metavar="NAME", help="column of the number")
    ablation.add_argument("--out", type=Path, default=Path("runs/ablation"), metavar="DIR")
    ablation.add_argument("--seeds", type=int, default=2, help="of each projector")
    ablation.add_argument("--processes", type=int, default=2, help="for reading molecules")
    ablation.add_argument(
        "--scale", type=float, default=0.1, help="share of the recipe's molecules"
    )


def _add_stage(
    recipes: argparse._SubParsersAction, name: str, short: str, description: str
) -> None:
    parser = recipes.add_parser(
        name,
        help=short,
        description=f"{description} {RESUMES}",
        epilog=f"example: edt train {name} --config recipe.yaml",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="YAML or JSON, checked key by key; or the name of a recipe of the package",
    )
    parser.add_argument("--out", metavar="DIR", help="the folder of the run, instead of `out`")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="instead of a value of the file, as training.steps=100; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Run the recipe."""
    own = {"tiny": _run_tiny, "ablation": _run_ablation}
    return own.get(args.recipe, _run_stage)(args)


def _run_stage(args: argparse.Namespace) -> int:
    from edt_former.train import recipes
    from edt_former.train.config import read_config
    from edt_former.train.ranks import end_processes

    module, function, kind = RUNS[args.recipe]
    configs = import_module("edt_former.train.config")
    overrides = [*args.set, *([f"out={args.out}"] if args.out else [])]
    file = Path(args.config)
    if not file.suffix:
        file = recipes.path(args.config)
    config = read_config(getattr(configs, kind), file, overrides)
    made = getattr(import_module(f"edt_former.train.{module}"), function)(config)
    if end_processes() == 0:
        print(made)
    return 0


def _run_tiny(args: argparse.Namespace) -> int:
    from edt_former.tasks.questions import FACTS
    from edt_former.train.tiny.data import SELF_SUPERVISED
    from edt_former.train.tiny.encoder import SPATIALLY_SUPERVISED
    from edt_former.train.tiny.recipe import add_connector, run_recipe

    if not 0 < args.scale <= 1:
        raise ValueError(f"--scale must be in (0, 1], got {args.scale}")
    options = {"seed": args.seed, "processes": args.processes, "scale": args.scale}
    if args.connector is not None:
        add_connector(args.data, args.out, args.connector, **options)
        return 0
    print(
        f"the graph encoders learn from: {', '.join(SELF_SUPERVISED)}; "
        f"in 3D also from: {', '.join(SPATIALLY_SUPERVISED)}"
    )
    print(f"the questions ask for: {', '.join(fact.key for fact in FACTS)}")
    run_recipe(args.data, args.out, **options)
    return 0


def _run_ablation(args: argparse.Namespace) -> int:
    from edt_former.report.table import table
    from edt_former.train.tiny.ablation import PUBLISHED, result_lines, run_ablation

    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
    options = {"seeds": args.seeds, "processes": args.processes, "scale": args.scale}
    found = run_ablation(args.data, args.out, args.table, args.target, **options)
    for task, results in found.items():
        measure = "share right, macro" if task == "questions" else "RMSE on held-out scaffolds"
        header = ["projector", "parameters", f"{measure} [95 %]", f"to {PUBLISHED!r}", "seeds"]
        print(f"{task}\n{table(header, result_lines(results))}\n")
    return 0
