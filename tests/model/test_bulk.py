"""Molecules in bulk: tokens from a packed batch, with nothing read back from the device."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from edt_former.chem import read_molecules
from edt_former.graph import GraphBatch
from edt_former.tokens import PatchOptions, cut_on_device

SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "C", "CCO", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"] * 3
LONGEST = 14


@pytest.fixture
def graph():
    return GraphBatch.pack(read_molecules(SMILES))


@pytest.mark.parametrize("connector", ["edt_former", "qformer"])
def test_tokens_are_those_of_the_molecules(connector, graph, make_model):
    model = make_model(connector=connector)
    bulk, exact = model.embed_graph(graph), model.embed_molecules(SMILES)
    assert torch.equal(bulk.offsets, exact.offsets)
    torch.testing.assert_close(bulk.values[: bulk.offsets[-1]], exact.values)
    assert not bulk.values.requires_grad


def without_contents(graph: GraphBatch, mode: FakeTensorMode) -> GraphBatch:
    """Tensors that raise where their contents are asked for: what a device would be waited for."""
    held = (getattr(graph, field.name) for field in fields(graph))
    return GraphBatch(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in held))


@pytest.mark.parametrize("connector", ["edt_former", "qformer"])
def test_nothing_is_read_back(connector, graph, make_model):
    model = make_model(connector=connector)
    assert graph.num_atoms > model.predictor.positions
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tokens = model.embed_graph(without_contents(graph, mode), longest=LONGEST)
    assert tokens.values.shape == model.embed_graph(graph).values.shape


def test_a_batch_whose_longest_molecule_is_not_known_is_looked_at(graph, make_model):
    model = make_model()
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        pytest.raises(DataDependentOutputException),
    ):
        model.embed_graph(without_contents(graph, mode))


@pytest.mark.parametrize(
    "options",
    [
        {"sources": ("brics", "entropy")},
        {"entropy_source": "node"},
        {"tokens": 8},
        {"control": "random"},
        {"connected": True},
    ],
    ids=str,
)
def test_patches_that_are_found_on_the_host_are_refused(options, graph):
    with pytest.raises(ValueError, match=r"patches are cut on the device by .*, got PatchOptions"):
        cut_on_device(graph, PatchOptions(**options), None)


@pytest.mark.parametrize(
    "options",
    [{}, {"rule": "published", "max_patches": 3}, {"entropy_source": "surprisal"}],
    ids=str,
)
def test_patches_are_at_their_capacity(options, graph, make_model):
    found = cut_on_device(graph, PatchOptions(**options), make_model().predictor)["entropy"]
    assert len(found.trim().atom_offsets) == found.count + 1 <= len(found.atom_offsets)
