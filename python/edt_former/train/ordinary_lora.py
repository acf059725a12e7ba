"""Ordinary LoRA in the place of a molecule's adapters: what they are compared with."""

from __future__ import annotations

from pathlib import Path

from edt_former.connectors import MoRA
from edt_former.language import find_sites
from edt_former.language.sites import MLP, linear_layers
from edt_former.model import MoleculeLM
from edt_former.train.config import FinetuneConfig, LoraConfig, Stage2Config, build
from edt_former.train.finetune import finetune
from edt_former.train.provenance import read_provenance
from edt_former.train.stage2 import build_model


def train_ordinary_lora(folder: Path, out: Path) -> Path:
    """LoRA of the rank of a MoRA, trained on the same data with the same settings.

    It adapts the same kinds of linear layers (for the path around the MLP those of the MLP) in
    every layer, and no molecule speaks: it learns from the texts alone.

    Args:
        folder: of a model that the second stage made with MoRA.
        out: gets the runs; one that was stopped goes on.

    Returns:
        The folder of the model with LoRA.

    Raises:
        ValueError: the folder is of another model, or does not say how it was trained.
    """
    told = read_provenance(folder)
    if told is None or told["stage"] != "stage2":
        raise ValueError(f"{folder} must be a model of the second stage, with its provenance")
    config = build(Stage2Config, {n: x for n, x in told["config"].items() if n != "kind"})
    model = build_model(config)
    if not isinstance(model.connector, MoRA):
        raise ValueError(f"the connector of {folder} must be 'mora', got {model.connector.name!r}")
    start = out / "start"
    if not start.is_dir():
        model.save_pretrained(start)
    options = model.connector.options
    return finetune(
        FinetuneConfig(
            out=str(out / "lora"),
            model=str(start),
            data=config.data,
            training=config.training,
            lora=LoraConfig(
                rank=options.rank,
                alpha=options.alpha or options.rank,
                dropout=0.0,
                targets=targets(model),
            ),
            train_connector=False,
            prompt=config.prompt,
            max_length=config.max_length,
            seed=config.seed,
        )
    )


def targets(model: MoleculeLM) -> tuple[str, ...]:
    """The last names of the linear layers that a model's MoRA adapts.

    >>> import edt_former
    >>> sorted(targets(edt_former.load("mora")))
    ['down_proj', 'gate_proj', 'o_proj', 'up_proj']
    """
    options, names = model.connector.options, []
    sites = find_sites(model.language_model, options.types, options.names)
    for kind, layers in sites.items():
        site = layers[0].name
        if kind == MLP:
            names += linear_layers(model.language_model.get_submodule(site))
        else:
            names.append(site.rpartition(".")[2])
    return tuple(dict.fromkeys(names))
