"""Parts of this package become a released file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from edt_former.connectors import make_connector
from edt_former.graph import make_encoder
from edt_former.language.frozen import CONFIG
from edt_former.language.manifest import MANIFEST, Manifest
from edt_former.released.mora import is_generator, to_generator
from edt_former.released.plan import Plan, compare, refuse, shapes_of
from edt_former.released.predictor import is_predictor, to_gpt2
from edt_former.released.to_ours import empty_language_model, new_heads
from edt_former.released.tree import (
    BOTH,
    CONNECTOR,
    COPIES,
    GRAPH,
    HEADS,
    KEPT,
    LANGUAGE,
    POSITION_IDS,
    STATIC_MASK,
    UNUSED_HEAD,
    Layout,
    tree_name,
)
from edt_former.weights import WEIGHTS, StoredTensor, open_weights

FULL_PREFIX = "model."
"""Of the names of a whole model, where nothing else is known; an encoder's have none."""


def to_released(source: Path, *, prefix: str | None = None, language_model: bool = True) -> Plan:
    """Plans the released file of a folder, with the complete tree of names.

    What no part here reads comes from the folder's `released/`, or is made: masks and positions as
    published, the unused head of the 2D encoder as zeros. Tied tensors are written twice.

    Args:
        source: a checkpoint of a `MoleculeLM`, a folder with `graph_encoder/`, `connector/` and
            perhaps `heads/`, one of a next-atom predictor, which becomes a GPT-2, or one with the
            `connector/` of MoRA alone.
        prefix: "", "model." or "mol_llama." before every name; None: as in the file that the
            folder was converted from, else "model." for a whole model and "" for an encoder.
        language_model: include the language model where there is one.

    Raises:
        ValueError: the folder is of another architecture, or its weights do not fit its configs.
    """
    if is_predictor(source):
        return to_gpt2(source)
    if is_generator(source):
        return to_generator(source, prefix)
    parts = _Parts(source)
    view = _view(source, parts)
    tree: dict[str, StoredTensor] = {}
    for part, weights in parts.weights.items():
        tree |= {tree_name(part, name, view): stored for name, stored in weights.items()}
    full = parts.language is not None and language_model
    if full:
        tree |= parts.language_weights()
    for copy, original in COPIES.items():
        if HEADS in parts.weights:
            tree[copy] = tree[original]
    kept, layout = _kept(source, FULL_PREFIX if full else "")
    made = {n: stored for n, stored in _defaults(parts, view).items() if n not in kept}
    tree |= made | kept
    if prefix is not None:
        layout = Layout(prefix)
    weights = {layout.spell(name): stored for name, stored in tree.items()}
    kind = "EDT-Former" if full else "encoder of EDT-Former"
    plan = Plan(f"{kind} in {', '.join(parts.found(full))}", layout.spell("encoder.*"))
    plan.files[""] = weights
    plan.sharded.add("")
    if made:
        plan.notes.append(f"made, as {source / KEPT} does not have them: {', '.join(made)}")
    return plan


class _Parts:
    """The parts in a folder, as a checkpoint or in folders of their own."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.configs: dict[str, dict[str, Any]] = {}
        self.weights: dict[str, dict[str, StoredTensor]] = {}
        self.language: Path | None = None
        self.trained: dict[str, StoredTensor] = {}
        if (source / MANIFEST).is_file():
            self._read_checkpoint()
        elif (source / CONNECTOR / CONFIG).is_file() and (source / GRAPH / CONFIG).is_file():
            for part in (GRAPH, CONNECTOR):
                self._read(part, source / part)
        else:
            raise ValueError(
                f"{source} must be a checkpoint, or a folder with {GRAPH}/ and {CONNECTOR}/, or "
                "one of a next-atom predictor"
            )
        if (source / HEADS / CONFIG).is_file():
            self._read(HEADS, source / HEADS)
        builders = {GRAPH: make_encoder, CONNECTOR: make_connector}
        if HEADS in self.configs:
            builders[HEADS] = partial(new_heads, self.configs[CONNECTOR])
        comparisons = []
        for part, build in builders.items():
            expected = shapes_of(build, self.configs[part])
            comparisons.append(compare(self.weights[part], expected, f"{part}/{{}}".format))
        refuse(source, comparisons)

    def found(self, full: bool) -> list[str]:
        """The names of the parts."""
        return [*self.weights, *([LANGUAGE] if full else [])]

    def language_weights(self) -> dict[str, StoredTensor]:
        """The tensors of the language model by their names in the tree, tied ones twice."""
        weights = {**open_weights(self.language), **self.trained}
        expected, tied = empty_language_model(AutoConfig.from_pretrained(self.language))
        refuse(self.language, [compare(weights, expected, str)])
        weights |= {copy: weights[original] for copy, original in tied.items()}
        return {tree_name(LANGUAGE, name): stored for name, stored in weights.items()}

    def _read(self, part: str, folder: Path) -> None:
        self.configs[part] = json.loads((folder / CONFIG).read_text())
        self.weights[part] = open_weights(folder)

    def _read_checkpoint(self) -> None:
        manifest = Manifest.read(self.source)
        config = json.loads((self.source / CONFIG).read_text())
        self._read(GRAPH, manifest.folder(GRAPH))
        self.language = manifest.folder(LANGUAGE)
        stored = open_weights(self.source / WEIGHTS)
        if "new_rows" in stored:
            raise ValueError(
                f"{self.source} has trained rows of new tokens, a released file has no place for "
                "them"
            )
        self.configs[CONNECTOR] = config["connector_config"]
        self.weights[CONNECTOR] = _inside(stored, CONNECTOR)
        self.trained = _inside(stored, LANGUAGE)
        self.weights[GRAPH] |= _inside(stored, GRAPH)


def _inside(weights: Mapping[str, StoredTensor], part: str) -> dict[str, StoredTensor]:
    prefix = f"{part}."
    return {n.removeprefix(prefix): x for n, x in weights.items() if n.startswith(prefix)}


def _view(source: Path, parts: _Parts) -> str:
    """The view that the connector reads, which the graph encoder must give.

    Raises:
        ValueError: one of the two is not of the published architecture.
    """
    connector, graph = parts.configs[CONNECTOR], parts.configs[GRAPH]
    if connector.get("name") != "edt_former_published":
        raise ValueError(
            f"the connector in {source} must be 'edt_former_published' to have a released file, "
            f"got {connector.get('name')!r}"
        )
    view = connector["patches"]["encoder"]
    inside = (graph.get("flat", {}).get("name"), graph.get("spatial", {}).get("name"))
    names = (graph.get("name"), *inside)
    wanted = ("blended", "gin", "unimol") if view == BOTH else ("unimol", None, None)
    if names != wanted:
        raise ValueError(
            f"the graph encoder in {source} must be {' of '.join(filter(None, wanted))} to have a "
            f"released file, got {' of '.join(filter(None, names))}"
        )
    return view


def _kept(source: Path, prefix: str) -> tuple[dict[str, StoredTensor], Layout]:
    """What the conversion from a released file kept, and the layout of that file."""
    folder = source / KEPT
    if not (folder / CONFIG).is_file():
        return {}, Layout(prefix)
    told = json.loads((folder / CONFIG).read_text())
    weights = open_weights(folder) if (folder / WEIGHTS).is_file() else {}
    return weights, Layout(told["prefix"], told["bare"])


def _defaults(parts: _Parts, view: str) -> dict[str, StoredTensor]:
    connector, graph = parts.configs[CONNECTOR], parts.configs[GRAPH]
    made: dict[str, Tensor] = {
        STATIC_MASK: torch.ones(1, connector["num_queries"], dtype=torch.bool),
        POSITION_IDS: torch.arange(connector["text_positions"])[None],
    }
    if view == BOTH:
        dtype = parts.weights[CONNECTOR]["query_tokens"].dtype
        made[f"{UNUSED_HEAD}weight"] = torch.zeros(1, graph["flat"]["width"], dtype=dtype)
        made[f"{UNUSED_HEAD}bias"] = torch.zeros(1, dtype=dtype)
    return {name: StoredTensor.of(tensor) for name, tensor in made.items()}
