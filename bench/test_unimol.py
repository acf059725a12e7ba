"""Uni-Mol and blending of published size against the same modules padded, in the published order.

64 drug-like molecules.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from bench.contest import OURS, Contender, Task, Work
from bench.padded_encoders import in_eights, padded_blending, padded_unimol
from bench.workloads import SMALL, rows
from edt_former.graph import GraphBatch, GraphFeatures, UniMol
from edt_former.graph.blending import FLAT, SPATIAL, Blending
from edt_kernels import offsets_from_lengths

MOLECULES = SMALL.first(64)
PADDED = "padded"
FULL = "padded, fp32"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@cache
def batch() -> GraphBatch:
    atoms = int(MOLECULES.atoms.sum())
    generator = torch.Generator().manual_seed(3)
    kinds = torch.tensor([6, 6, 6, 6, 7, 8, 8, 16])
    no_bonds = torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long)
    return GraphBatch(
        torch.zeros(atoms, 9, dtype=torch.long),
        *no_bonds,
        torch.zeros(atoms + 1, dtype=torch.long),
        MOLECULES.atom_offsets,
        kinds[torch.randint(len(kinds), (atoms,), generator=generator)],
        3 * rows(atoms, 3, seed=4),
    )


@cache
def unimol(dtype: torch.dtype) -> UniMol:
    torch.manual_seed(0)
    return UniMol(special_tokens=True).to(dtype).eval().requires_grad_(False)


@cache
def blending(dtype: torch.dtype) -> Blending:
    torch.manual_seed(0)
    model = Blending({FLAT: 300, SPATIAL: 512}, layers=8, width=512, heads=8)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_unimol(contest, dtype):
    tokens = unimol(dtype)._tokens(batch())
    ids, real = in_eights(tokens.ids[:, None], tokens.offsets)
    ids = ids[..., 0]
    places, _ = in_eights(tokens.positions, tokens.offsets)

    def twin(of: torch.dtype) -> Tensor:
        return padded_unimol(unimol(of), ids, places, real)

    def packed(found: list[Tensor]) -> list[Tensor]:
        return [found[0][real]]

    truth = (twin(torch.float32)[real].double(),)
    contenders = [
        Contender(OURS, lambda: unimol(dtype)(batch()).values, truth),
        Contender(PADDED, lambda: twin(dtype), truth, packed=packed),
    ]
    if dtype != torch.float32:
        contenders.append(Contender(FULL, lambda: twin(torch.float32), truth, packed=packed))
    long, pairs = len(tokens.ids), int(tokens.offsets.diff().square().sum())
    weights = sum(p.numel() for n, p in unimol(dtype).encoder.named_parameters() if p.dim() == 2)
    flops = 2.0 * weights * long + 15 * 4 * 512 * pairs + 2 * pairs * 128 * (128 + 64)
    moved = 15 * 2 * pairs * 64 * dtype.itemsize
    contest(
        "Uni-Mol",
        "64 drug-like",
        Task((places.to(dtype),), (), truth, 1),
        contenders,
        work=Work(moved, flops),
        goals={PADDED: 1.4} if dtype == torch.float32 else None,
        tolerance=TOLERANCE[dtype],
        budget=20,
    )


def test_blending(contest, dtype):
    views = [
        (rows(int((MOLECULES.atoms + more).sum()), width, seed=seed), MOLECULES.atoms + more)
        for width, more, seed in ((300, 1, 5), (512, 2, 6))
    ]
    packed_views = [(values, offsets_from_lengths(lengths)) for values, lengths in views]
    padded_views = [in_eights(*view) for view in packed_views]
    real = tuple(real for _, real in padded_views)

    def ragged() -> tuple[Tensor, Tensor]:
        flat, spatial = (GraphFeatures(values.to(dtype), cut) for values, cut in packed_views)
        flat, spatial = blending(dtype)(flat, spatial)
        return flat.values, spatial.values

    def twin(of: torch.dtype) -> tuple[Tensor, Tensor]:
        flat, spatial = (values.to(of) for values, _ in padded_views)
        return padded_blending(blending(of), flat, spatial, real)

    def packed(found: tuple[Tensor, ...]) -> list[Tensor]:
        return [x[where] for x, where in zip(found, real, strict=True)]

    truth = tuple(x.double() for x in packed(twin(torch.float32)))
    contenders = [
        Contender(OURS, ragged, truth),
        Contender(PADDED, lambda: twin(dtype), truth, packed=packed),
    ]
    if dtype != torch.float32:
        contenders.append(Contender(FULL, lambda: twin(torch.float32), truth, packed=packed))
    lengths = [cut.diff().double() for _, cut in packed_views]
    dense = sum(p.numel() for p in blending(dtype).cross_attn_blocks.parameters() if p.dim() == 2)
    pairs = sum(float((a * b).sum()) for a in lengths for b in lengths)
    flops = dense * float(sum(lengths).sum()) + 8 * 4 * 512 * pairs
    contest(
        "blending",
        "64 drug-like",
        Task(tuple(values.to(dtype) for values, _ in views), (), truth, 2),
        contenders,
        work=Work(2.0 * dense, flops),
        goals={PADDED: 1.9} if dtype == torch.float32 else None,
        tolerance=TOLERANCE[dtype],
        budget=20,
    )
