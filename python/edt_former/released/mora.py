"""The weight generator of MoRA's authors as a connector here, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edt_former.connectors import MoRA, make_connector
from edt_former.connectors.mora import FULL
from edt_former.language.frozen import CONFIG
from edt_former.released.plan import Plan, compare, refuse, shapes_of
from edt_former.weights import WEIGHTS, StoredTensor, open_weights

CONNECTOR, KEPT = "connector", "released"
ORPHAN = "pos_embed"
"""Part of every published file, read by nobody."""

_PROJECTION, _SHARED = "visual_proj.weight", "Bs"
_GENERATOR = re.compile(r"gen\.(?:(\d+)\.)?(queries|decoders|norm|weights_head)\b(.*)")


@dataclass(frozen=True)
class GeneratorSizes:
    """What shapes do not tell of a published weight generator; by default as published.

    Args:
        rank: of the adapters.
        types: the kinds that have them, in the order of the generators.
        every: which layers have them, see `edt_former.connectors.MoRAConfig`.
        alpha: adapters are scaled by alpha / rank; None for no scaling.
        heads: of the generators' attention.
    """

    rank: int = 64
    types: str = "qkvom"
    every: int = 4
    alpha: float | None = None
    heads: int = 16


def prefix_of(names: Iterable[str]) -> str | None:
    """What stands before the names of a weight generator; None where they are of something else.

    >>> prefix_of(["model.mm_projector.Bs", "model.mm_projector.visual_proj.weight"])
    'model.mm_projector.'
    """
    names = list(names)
    found = [n.removesuffix(_SHARED) for n in names if n.rpartition(".")[2] == _SHARED]
    if len(found) != 1 or found[0] + _PROJECTION not in names:
        return None
    return found[0] if all(name.startswith(found[0]) for name in names) else None


def from_generator(source: Path, sizes: GeneratorSizes) -> Plan:
    """Plans a connector from a published weight generator in a file or folder.

    `connector/` is what `load_part(make_connector, ...)` reads; `released/` keeps the prefix of the
    names and the table of positions, which the published program never reads.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; sizes do not fit.
    """
    stored = open_weights(source)
    prefix = prefix_of(stored)
    weights = {name.removeprefix(prefix): x.read() for name, x in stored.items()}
    with torch.device("meta"):
        config = make_connector(connector_config(weights, sizes)).config
    kept = {ORPHAN: weights.pop(ORPHAN)} if ORPHAN in weights else {}
    state = to_ours(weights, config)
    refuse(source, [compare(state, shapes_of(make_connector, config), str)])
    plan = Plan(f"weight generator of MoRA: {_size(config)}", f"{prefix}*")
    plan.files[f"{CONNECTOR}/{WEIGHTS}"] = _stored(state)
    plan.files[f"{KEPT}/{WEIGHTS}"] = _stored(kept)
    plan.json[f"{CONNECTOR}/{CONFIG}"] = config
    plan.json[f"{KEPT}/{CONFIG}"] = {"prefix": prefix}
    return plan


def is_generator(folder: Path) -> bool:
    """Whether a folder holds a connector that may have a published file."""
    file = folder / CONNECTOR / CONFIG
    return file.is_file() and json.loads(file.read_text()).get("name") == MoRA.name


def to_generator(source: Path, prefix: str | None = None) -> Plan:
    """Plans the published file of a connector in `source`/connector.

    Args:
        source: a folder.
        prefix: before every name; None: as in the file that it was converted from, else "".

    Raises:
        ValueError: it is none that the published program can have; its weights do not fit.
    """
    config = json.loads((source / CONNECTOR / CONFIG).read_text())
    width = config["llm_width"]
    wanted = {
        "head": FULL,
        "graph_norm": False,
        "graph_token": False,
        "sum_tokens": 0,
        "widths": {kind: [width, width] for kind in config["types"]},
    }
    for option, value in wanted.items():
        if config[option] != value:
            raise ValueError(
                f"{option} of the connector in {source} must be {value!r} to have a released "
                f"file, got {config[option]!r}"
            )
    state = {name: x.read() for name, x in open_weights(source / CONNECTOR).items()}
    refuse(source, [compare(state, shapes_of(make_connector, config), str)])
    weights = to_published(state, config)
    folder = source / KEPT
    if (folder / WEIGHTS).is_file():
        weights |= {name: x.read() for name, x in open_weights(folder).items()}
    if prefix is None and (folder / CONFIG).is_file():
        prefix = json.loads((folder / CONFIG).read_text())["prefix"]
    plan = Plan(f"weight generator of MoRA: {_size(config)}", f"{prefix or ''}*")
    plan.files[""] = {(prefix or "") + n: x for n, x in _stored(weights).items()}
    plan.sharded.add("")
    return plan


def connector_config(weights: Mapping[str, Any], sizes: GeneratorSizes) -> dict[str, Any]:
    """The config of the connector that published weights, by names without prefix, are of.

    Raises:
        ValueError: the weights lack what tells it, or their shapes do not fit `sizes`.
    """
    lacking = [name for name in (_PROJECTION, _SHARED) if name not in weights]
    read = list(filter(None, map(_GENERATOR.fullmatch, weights)))
    inner = [match[0] for match in read if match[3] == ".0.linear1.weight"]
    if lacking or not inner:
        raise ValueError(f"a weight generator must have {', '.join(lacking) or 'decoders'}")
    width, encoder_width = weights[_PROJECTION].shape
    _, maps, numbers = weights[_SHARED].shape
    if maps % len(sizes.types):
        raise ValueError(f"types must divide the {maps} adapted maps, got {sizes.types!r}")
    if numbers % sizes.rank:
        raise ValueError(f"rank must divide the {numbers} numbers of an adapter, got {sizes.rank}")
    return {
        "name": MoRA.name,
        "llm_width": numbers // sizes.rank,
        "llm_layers": maps // len(sizes.types) * sizes.every,
        "types": sizes.types,
        "every": sizes.every,
        "rank": sizes.rank,
        "alpha": sizes.alpha,
        "separate": any(match[1] for match in read),
        "width": width,
        "layers": len({m[3].split(".")[1] for m in read if m[2] == "decoders"}),
        "heads": sizes.heads,
        "ffn": weights[inner[0]].shape[0],
        "encoder_width": encoder_width,
    }


def to_ours(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of the connector of `config`, from published weights by names without prefix.

    Bits stay: the shared B are cut by kind, and everything else has another name only.
    """
    types, rank, width = config["types"], config["rank"], config["llm_width"]
    state = {}
    for name, value in weights.items():
        match = _GENERATOR.fullmatch(name)
        if match is not None:
            head = f".{width}" if match[2] == "weights_head" else ""
            state[f"gen.{match[1] or 0}.{match[2]}{head}{match[3]}"] = value
        elif name == _SHARED:
            parts = value.reshape(len(types), -1, width, rank)
            state |= {f"b.{kind}": part for kind, part in zip(types, parts, strict=True)}
        else:
            state[name] = value
    return state


def to_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `to_ours`."""
    types, width = config["types"], config["llm_width"]
    shared = torch.cat([state[f"b.{kind}"] for kind in types]).flatten(1)[None]
    weights = {_SHARED: shared}
    for name, value in state.items():
        if name.startswith("b."):
            continue
        published = name.replace(f"weights_head.{width}", "weights_head")
        if not config["separate"]:
            published = published.replace("gen.0.", "gen.")
        weights[published] = value
    return weights


def _stored(weights: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    return {name: StoredTensor.of(x) for name, x in weights.items()}


def _size(config: Mapping[str, Any]) -> str:
    generators = len(config["types"]) if config["separate"] else 1
    adapted = config["llm_layers"] // config["every"]
    return (
        f"{generators} of {config['layers']} layers, width {config['width']}, for "
        f"{config['types']} of {adapted} layers of width {config['llm_width']}, rank "
        f"{config['rank']}"
    )
