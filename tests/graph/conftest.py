from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from edt_former.graph import GraphBatch

HYDROGEN = 1


def load(name: str) -> dict[str, torch.Tensor]:
    safetensors = pytest.importorskip("safetensors.torch")
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of the recorded published numbers) is not set")
    return safetensors.load_file(Path(os.environ["EDT_SHARED"], "oracles", f"{name}.safetensors"))


def full_size_names() -> dict[str, list[int]]:
    text = Path(os.environ["EDT_SHARED"], "oracles", "edt_full_keys_stage1.json").read_text()
    return {name: entry["shape"] for name, entry in json.loads(text)["keys"].items()}


def places(distance: torch.Tensor) -> torch.Tensor:
    """Coordinates [n, 3] of points with these distances [n + 1, n + 1]; the first is the origin."""
    square = distance.double() ** 2
    gram = (square[0, 1:, None] + square[0, None, 1:] - square[1:, 1:]) / 2
    values, vectors = torch.linalg.eigh(gram)
    found = vectors * values.clamp(min=0).sqrt()
    return F.pad(found, (3, 0))[:, -3:].float()


def recorded_batch(record: dict[str, torch.Tensor], which: list[int] | None = None) -> GraphBatch:
    """Molecules of a record, at the distances that were recorded."""
    which = list(range(len(record["in.stm.ptr"]) - 1)) if which is None else which
    parts, start = [], 0
    for m in which:
        begin, end = record["in.stm.ptr"][m : m + 2].tolist()
        x, edges = record["in.stm.x"][begin:end], record["in.stm.edge_index"]
        inside = (edges[1] >= begin) & (edges[1] < end)
        elements = x[:, 0] + 1
        # Hydrogens were not recorded: a place that must not be read.
        where = torch.full((len(x), 3), torch.nan)
        heavy = elements != HYDROGEN
        tokens = int(heavy.sum()) + 1
        where[heavy] = places(record["in.unimol.src_distance"][m, :tokens, :tokens])
        edges = edges[:, inside] - begin + start
        parts.append((x, edges, record["in.stm.edge_attr"][inside], elements, where))
        start += len(x)
    x, edges, bonds, elements, where = zip(*parts, strict=True)
    edges, bonds = torch.cat(edges, 1), torch.cat(bonds)
    order = edges[1].argsort(stable=True)
    counts = torch.tensor([len(rows) for rows in x])
    return GraphBatch(
        atom_features=torch.cat(x),
        bond_index=edges[:, order],
        bond_features=bonds[order],
        bond_offsets=F.pad(torch.bincount(edges[1], minlength=start).cumsum(0), (1, 0)),
        offsets=F.pad(counts.cumsum(0), (1, 0)),
        elements=torch.cat(elements),
        coordinates=torch.cat(where),
    )


@pytest.fixture(scope="session")
def published():
    """The record of the reduced published encoder: its numbers, its weights, its batches."""
    return SimpleNamespace(
        blend=load("edt_encoder_blend"),
        exact=load("edt_encoder_blend_fp64"),
        unimol=load("edt_encoder_unimol"),
        state=load("edt_encoder_state"),
        names=full_size_names(),
        batch=recorded_batch,
    )
