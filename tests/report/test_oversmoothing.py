"""Oversmoothing: cosines and ranks against themselves written out, and what smooths."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from edt_former.chem import make_conformers, read_molecules
from edt_former.graph import GraphBatch, make_encoder
from edt_former.report.oversmoothing import (
    effective_rank,
    level_rows,
    mean_cosines,
    oversmoothing_plot,
    smoothness,
)

MOLECULES = read_molecules(["CC(=O)Oc1ccccc1C(=O)O", "C", "CCO", "c1ccc2ccccc2c1"] * 10)


def test_cosines_are_those_of_all_pairs():
    lengths = [5, 1, 2, 0, 3]
    atoms = torch.randn(sum(lengths), 4)
    offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    expected = []
    for rows in atoms.split(lengths):
        if len(rows) > 1:
            pairs = [F.cosine_similarity(a, b, dim=0) for a, b in combinations(rows, 2)]
            expected.append(torch.stack(pairs).mean())
    torch.testing.assert_close(mean_cosines(atoms, offsets).float(), torch.stack(expected))


def test_the_rank_counts_directions():
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    for rank in (1, 3, 8):
        rows = torch.cat([basis[:rank]] * 2)
        assert effective_rank(rows.T @ rows) == pytest.approx(rank, rel=1e-6)
    uneven = torch.diag(torch.tensor([9.0, 1.0]))
    shares = torch.tensor([0.75, 0.25])
    assert effective_rank(uneven) == pytest.approx(float((-(shares * shares.log()).sum()).exp()))


@torch.no_grad()
def test_levels_of_an_encoder_are_what_its_features_say():
    encoder = make_encoder({"name": "gin", "layers": 2, "width": 16}).eval()
    found = smoothness(encoder, MOLECULES)
    assert [(s.level, s.view, s.width) for s in found] == [(0, "", 16), (1, "", 16), (2, "", 16)]
    graph = GraphBatch.pack(MOLECULES)
    for s, level in zip(found, encoder.levels(graph), strict=True):
        assert s.cosine == pytest.approx(float(mean_cosines(level.values, graph.offsets).mean()))
        gram = level.values.double().T @ level.values.double()
        assert s.rank == pytest.approx(effective_rank(gram), rel=1e-6)


def test_averaging_over_neighbours_smooths():
    """GraphSAGE without weights is an average over neighbours: level by level atoms grow alike."""
    encoder = make_encoder({"name": "pretrain_gnn", "layer": "graphsage", "layers": 6, "width": 12})
    for layer in encoder.gnns:
        torch.nn.init.eye_(layer.linear.weight)
        for parameter in (layer.linear.bias, *layer.edge_embedding1.parameters()):
            torch.nn.init.zeros_(parameter)
        torch.nn.init.zeros_(layer.edge_embedding2.weight)
    for table in (encoder.x_embedding1, encoder.x_embedding2):
        torch.nn.init.uniform_(table.weight)
    found = smoothness(encoder.eval(), MOLECULES)
    cosines = [s.cosine for s in found]
    assert cosines == sorted(cosines) and cosines[-1] > 0.99
    assert found[-1].rank < found[0].rank


def test_views_are_told_apart_and_drawn():
    small = {"layers": 1, "width": 8, "heads": 2}
    spatial = {**small, "ffn": 8, "gaussians": 4}
    flat = {"name": "gin", "layers": 1, "width": 8}
    encoder = make_encoder({"name": "blended", "flat": flat, "spatial": spatial, **small})
    molecules = MOLECULES[:4]
    places = [c.coordinates for c in make_conformers(molecules)]
    found = {"both": smoothness(encoder.eval(), molecules, places)}
    assert [(s.level, s.view) for s in found["both"]] == [
        *[(0, "2D"), (0, "3D"), (1, "2D"), (1, "3D")]
    ]
    assert [row[:3] for row in level_rows(found)][1] == ["both", 0, "3D"]
    figure = oversmoothing_plot(found)
    assert [line.get_label() for line in figure.axes[0].lines] == ["both 2D", "both 3D"]
    cosines = [line.get_ydata()[-1] for line in figure.axes[0].lines]
    assert cosines == [s.cosine for s in found["both"][2:]]


def test_atoms_alone_have_no_cosine():
    with pytest.raises(ValueError, match="must have one of two atoms or more"):
        smoothness(make_encoder({"name": "gin", "layers": 1, "width": 8}), read_molecules(["C"]))
