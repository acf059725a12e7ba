"""The frozen parts that a run is told to read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from edt_former import shipped
from edt_former.graph import GraphEncoder, make_encoder
from edt_former.language.frozen import content_hash, load_part, read_weights
from edt_former.language.manifest import FrozenPart, Manifest
from edt_former.tokens import NextAtomPredictor, PatchOptions
from edt_former.train.config import SHIPPED

GRAPH_ENCODER, PREDICTOR = "graph_encoder", "predictor"


def part_folder(name: str, source: str | None, stage1: Path | None = None) -> Path:
    """Where a part is.

    Args:
        name: "graph_encoder" or "predictor".
        source: a folder, or "shipped"; None takes that of `stage1`.
        stage1: a folder of the first stage.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is neither a source nor a first stage.
    """
    if source is None:
        if stage1 is None:
            raise ValueError(f"{name} must be given, there is no first stage to take it from")
        return Manifest.read(stage1).folder(name)
    folder = shipped.folder() / name if source == SHIPPED else Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"{name} must be a folder, there is no {folder}")
    return folder


def read_graph_encoder(folder: Path) -> GraphEncoder:
    """A graph encoder, in float32."""
    return load_part(make_encoder, folder)


def read_predictor(folder: Path) -> NextAtomPredictor:
    """A next-atom predictor, frozen."""
    return load_part(NextAtomPredictor, folder).eval().requires_grad_(False)


def frozen_part(folder: Path) -> FrozenPart:
    """How a manifest names the part in `folder`."""
    return FrozenPart(content_hash(read_weights(folder)), str(folder.resolve()), folder.name)


def needed_predictor(
    options: PatchOptions, find: Callable[[], Path]
) -> tuple[NextAtomPredictor | None, Path | None]:
    """The predictor and its folder, None both where no patch comes from it."""
    if not options.needs_predictor:
        return None, None
    folder = find()
    return read_predictor(folder), folder


def module_hash(module: nn.Module | None) -> str | None:
    """`content_hash` of a module's weights, None for none."""
    return None if module is None else content_hash(module.state_dict().items())
