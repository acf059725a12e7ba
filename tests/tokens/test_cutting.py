"""Patches of molecules: every option, alone and in a batch, however the SMILES was written."""

import pytest
import torch
from rdkit import Chem

from edt_former.chem import read_molecules
from edt_former.graph import GraphBatch
from edt_former.tokens import (
    NextAtomPredictor,
    PatchOptions,
    connected_patches,
    cut_by_entropy,
    cut_molecules,
    unpack_patches,
)

SMILES = [
    *("CC(=O)Oc1ccccc1C(=O)O", "C", "[Na+].CC(=O)[O-]", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"),
    *("CC(C)Cc1ccc(cc1)C(C)C(=O)O", "OCCOCCOCCO", "[2H]C([2H])O"),
]
OPTIONS = [
    pytest.param({}, id="default"),
    pytest.param({"connected": True}, id="connected"),
    pytest.param({"control": "random"}, id="random"),
    pytest.param({"control": "shuffled", "control_seed": 3}, id="shuffled"),
    pytest.param({"control": "shuffled", "connected": True}, id="shuffled-connected"),
    pytest.param({"entropy_source": "surprisal"}, id="surprisal"),
    pytest.param({"entropy_source": "node", "rule": "rising_edge"}, id="node"),
    pytest.param({"tokens": 8}, id="tokens"),
    pytest.param({"tokens": 5, "max_size": 3, "connected": True}, id="tokens-connected"),
]
SOURCES = ["entropy", "brics"]


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(1)
    model = NextAtomPredictor({"layers": 1, "width": 16}).eval().requires_grad_(False)
    torch.nn.init.normal_(model.wte.weight)
    return model


def cut(smiles, source, predictor, **options):
    molecules = read_molecules(smiles)
    graph = GraphBatch.pack(molecules)
    found = cut_molecules(source, molecules, graph, PatchOptions(**options), predictor)
    assert found.count == found.patch_offsets[-1] == len(found.atom_offsets) - 1
    return unpack_patches(found, graph.offsets)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_molecule_is_cut_alike_in_every_batch(source, options, predictor):
    together = cut(SMILES, source, predictor, **options)
    assert cut(SMILES[::-1], source, predictor, **options) == together[::-1]
    assert [cut([one], source, predictor, **options)[0] for one in SMILES] == together
    for smiles, ids in zip(SMILES, together, strict=True):
        assert sorted(set(ids)) == list(range(max(ids) + 1)), smiles


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("options", OPTIONS)
def test_patches_do_not_depend_on_how_a_smiles_is_written(source, options, predictor):
    smiles = SMILES[3]
    written = Chem.MolToRandomSmilesVect(Chem.MolFromSmiles(smiles), 10, randomSeed=5)
    assert len(set(written)) == 10
    (ids,) = cut([smiles], source, predictor, **options)
    assert cut(written, source, predictor, **options) == [ids] * 10


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("control", [None, "shuffled", "random"])
def test_connected_patches_are_connected_and_no_finer_than_need_be(source, control, predictor):
    graph = GraphBatch.pack(read_molecules(SMILES))
    before = cut(SMILES, source, predictor, control=control)
    after = cut(SMILES, source, predictor, control=control, connected=True)

    def apart(ids):
        return torch.cat([100 * i + torch.tensor(x) for i, x in enumerate(ids)])

    assert connected_patches(apart(after), graph.bond_index).all()
    whole = connected_patches(apart(before), graph.bond_index)
    names, kept = apart(before).unique(return_inverse=True)
    for patch in range(len(names)):
        pieces = apart(after)[kept == patch].unique()
        assert (len(pieces) == 1) == bool(whole[patch])
        assert not (torch.isin(apart(after)[kept != patch], pieces)).any()


def test_surprisal_is_the_loss_of_every_atom(predictor):
    molecules = read_molecules(SMILES)
    graph = GraphBatch.pack(molecules)
    options = PatchOptions(entropy_source="surprisal")
    found, _ = cut_by_entropy(graph, options, predictor, unit="bits")
    p = predictor(graph.elements, graph.offsets).softmax(-1)
    own = p.gather(1, predictor.tokens(graph.elements)[:, None]).squeeze(1)
    torch.testing.assert_close(found, -own.log2())


def test_tokens_are_as_many_as_asked_for(predictor):
    ids = cut(SMILES, "entropy", predictor, tokens=6)
    plain = cut(SMILES, "entropy", predictor)
    for finer, coarse in zip(ids, plain, strict=True):
        assert max(finer) + 1 == max(max(coarse) + 1, min(6, len(finer)))


def test_a_large_molecule_has_as_many_patches_as_its_rule_cuts(predictor):
    smiles = ["C(CO)" * 60 + "C"]
    options = {"rule": "threshold", "threshold": -1.0}
    (ids,) = cut(smiles, "entropy", predictor, **options)
    assert ids == list(range(181))


def test_node_entropies_need_no_predictor():
    assert not PatchOptions(entropy_source="node").needs_predictor
    assert PatchOptions(entropy_source="surprisal").needs_predictor
    assert cut(["OCCO"], "entropy", None, entropy_source="node") == [[0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entropy_source": "atom"}, "entropy_source must be one of 'next_atom'"),
        ({"control": "none"}, "control must be one of None, 'random', 'shuffled', got 'none'"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"control_seed": -1}, "control_seed must be from 0"),
        ({"rule": "published", "entropy_source": "node"}, "entropy_source 'next_atom'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PatchOptions(**options)
