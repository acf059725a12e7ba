"""The encoders of pretrain-gnns against dense matrices, with the published weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rdkit import Chem

from edt_former.chem import PRETRAIN_FEATURES_ID, read_as_written, read_molecule, read_molecules
from edt_former.graph import GIN, GraphBatch, PretrainGNN, make_encoder

SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "[Na+].[Cl-]", "C/C=C\\C", "N[C@@H](C)C(=O)O", "[He]", "C#CF"]
LAYERS = ("gin", "gcn", "graphsage")


def packed(smiles: list[str] = SMILES) -> GraphBatch:
    return GraphBatch.pack(read_molecules(smiles), features=PRETRAIN_FEATURES_ID)


def small(layer: str, **options: object) -> PretrainGNN:
    torch.manual_seed(0)
    model = PretrainGNN(layer, layers=3, width=8, **options)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and name.startswith("batch_norms"):
            value.uniform_(0.5, 1.5)
    return model.eval()


def dense(state: dict[str, torch.Tensor], layer: str, smiles: str, loop: int = 4) -> torch.Tensor:
    """One molecule, features straight from RDKit, as matrices over all pairs of atoms, in fp64."""
    state = {name: value.double() for name, value in state.items()}
    mol = Chem.MolFromSmiles(read_molecule(smiles).smiles)
    n = mol.GetNumAtoms()
    tags = {"CHI_UNSPECIFIED": 0, "CHI_TETRAHEDRAL_CW": 1, "CHI_TETRAHEDRAL_CCW": 2}
    types = {"SINGLE": 0, "DOUBLE": 1, "TRIPLE": 2, "AROMATIC": 3}
    directions = {"NONE": 0, "ENDUPRIGHT": 1, "ENDDOWNRIGHT": 2}
    adjacent, kind, side = torch.eye(n).double(), loop * torch.eye(n).long(), torch.zeros(n, n)
    for bond in mol.GetBonds():
        for i, j in (
            (bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()),
            (bond.GetEndAtomIdx(), bond.GetBeginAtomIdx()),
        ):
            adjacent[i, j] = 1
            kind[i, j] = types[str(bond.GetBondType())]
            side[i, j] = directions[str(bond.GetBondDir())]
    elements = torch.tensor([atom.GetAtomicNum() - 1 for atom in mol.GetAtoms()])
    chirality = torch.tensor([tags[str(atom.GetChiralTag())] for atom in mol.GetAtoms()])
    h = state["x_embedding1.weight"][elements] + state["x_embedding2.weight"][chirality]
    degree = adjacent.sum(1)
    count = sum(name.endswith("running_mean") for name in state)
    for index in range(count):
        own = {
            name.removeprefix(f"gnns.{index}."): value
            for name, value in state.items()
            if name.startswith(f"gnns.{index}.")
        }
        edges = own["edge_embedding1.weight"][kind] + own["edge_embedding2.weight"][side.long()]
        if layer != "gin":
            h = h @ own["linear.weight"].T + own["linear.bias"]
        messages = h[None] + edges  # [i, j, :], to i from j
        if layer == "gin":
            x = torch.einsum("ij,ijd->id", adjacent, messages)
            x = F.relu(x @ own["mlp.0.weight"].T + own["mlp.0.bias"])
            h = x @ own["mlp.2.weight"].T + own["mlp.2.bias"]
        elif layer == "gcn":
            scaled = adjacent / (degree[:, None] * degree[None]).sqrt()
            h = torch.einsum("ij,ijd->id", scaled, messages)
        else:
            x = torch.einsum("ij,ijd->id", adjacent / degree[:, None], messages)
            h = x / x.norm(dim=1, keepdim=True)
        norm = f"batch_norms.{index}."
        spread = (state[f"{norm}running_var"] + 1e-5).sqrt()
        h = (h - state[f"{norm}running_mean"]) / spread
        h = h * state[f"{norm}weight"] + state[f"{norm}bias"]
        h = h if index == count - 1 else F.relu(h)
    return h


@pytest.mark.parametrize("layer", LAYERS)
def test_equals_dense_matrices(layer):
    model = small(layer)
    found = model(packed()).values
    expected = torch.cat([dense(model.state_dict(), layer, smiles) for smiles in SMILES])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


PUBLISHED = [
    pytest.param("gcn", "pretrain_gnns_gcn_contextpred.pth", id="gcn"),
    pytest.param("gcn", "pretrain_gnns_gcn_supervised_contextpred.pth", id="gcn-supervised"),
    pytest.param("graphsage", "pretrain_gnns_graphsage_contextpred.pth", id="graphsage"),
]


@pytest.mark.parametrize(("layer", "file"), PUBLISHED)
def test_the_published_weights_load_and_compute_what_dense_matrices_do(layer, file):
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of the published weights) is not set")
    path = Path(os.environ["EDT_SHARED"], "data", "weights", file)
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = PretrainGNN(layer).eval()
    model.load_state_dict(state, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    found = model(packed()).values
    expected = torch.cat([dense(state, layer, smiles) for smiles in SMILES])
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, (expected / scale).float(), rtol=0, atol=1e-5)


MOLCA = ["C", "CC", "CC(=O)Oc1ccccc1C(=O)O", "Cn1c(=O)c2c(ncn2C)n(C)c1=O", "CC(=O)[O-].[Na+]"]
MOLCA += ["C[C@H](N)C(=O)O", "Cc1ccc(NC(=O)c2ccc(CN3CCN(C)CC3)cc2)cc1Nc1nccc(-c2cccnc2)n1"]
MOLCA += ["c1ccccc1"]


def test_equals_the_published_numbers_qformer_molca_q8(recorded):
    """MolCA's encoder from SMILES: its features, then [mean; atoms] under its LayerNorm."""
    record = recorded("qformer_molca_q8")
    molecules = [read_as_written(smiles) for smiles in MOLCA]
    batch = GraphBatch.pack(molecules, features=PRETRAIN_FEATURES_ID)
    assert torch.equal(batch.atom_features, record["in.x"])
    bonds = [
        sorted(torch.cat([index, features.T]).T.tolist())
        for index, features in (
            (batch.bond_index, batch.bond_features),
            (record["in.edge_index"], record["in.edge_attr"]),
        )
    ]
    assert bonds[0] == bonds[1]

    model = PretrainGNN("gin", layers=3, width=48, self_loop=0).eval()
    prefix = "state.graph_encoder."
    model.load_state_dict({k: record[f"{prefix}{k}"] for k in model.state_dict()}, strict=True)
    assert sum(k.startswith(prefix) for k in record) == len(model.state_dict())
    with torch.no_grad():
        atoms = model(batch).values.split(batch.offsets.diff().tolist())
    weight, bias = record["state.ln_graph.weight"], record["state.ln_graph.bias"]
    for m, x in enumerate(atoms):
        rows = torch.cat([x.mean(0, keepdim=True), x])
        found = F.layer_norm(rows, (48,), weight, bias)
        expected = record["node"][m][record["node_mask"][m]]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_parameter_names_and_default_sizes_of_gin_are_the_published_ones():
    names = {name: tuple(value.shape) for name, value in PretrainGNN("gin").state_dict().items()}
    assert names.pop("x_embedding1.weight") == (120, 300)
    assert names.pop("x_embedding2.weight") == (3, 300)
    for n in range(5):
        assert names.pop(f"gnns.{n}.edge_embedding1.weight") == (6, 300)
        assert names.pop(f"gnns.{n}.edge_embedding2.weight") == (3, 300)
        assert names.pop(f"gnns.{n}.mlp.0.weight") == (600, 300)
        assert names.pop(f"gnns.{n}.mlp.0.bias") == (600,)
        assert names.pop(f"gnns.{n}.mlp.2.weight") == (300, 600)
        assert names.pop(f"gnns.{n}.mlp.2.bias") == (300,)
        for part in ("weight", "bias", "running_mean", "running_var"):
            assert names.pop(f"batch_norms.{n}.{part}") == (300,)
        assert names.pop(f"batch_norms.{n}.num_batches_tracked") == ()
    assert not names


@pytest.mark.parametrize("layer", LAYERS)
def test_a_molecule_alone_equals_it_in_a_batch(layer):
    model, batch = small(layer), packed()
    together = model(batch)
    for smiles, mine in zip(
        SMILES, together.values.split(batch.offsets.diff().tolist()), strict=True
    ):
        torch.testing.assert_close(mine, model(packed([smiles])).values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_no_molecules(layer):
    assert small(layer)(packed([])).values.shape == (0, 8)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_loop_of_an_atom_is_a_bond_of_its_own_type(layer):
    usual, single = small(layer), small(layer, self_loop=0)
    single.load_state_dict(usual.state_dict())
    expected = dense(usual.state_dict(), layer, SMILES[0], loop=0)
    found = single(packed(SMILES[:1])).values
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, usual(packed(SMILES[:1])).values)


def test_levels_end_in_the_features():
    model, batch = small("gin"), packed()
    levels = model.levels(batch)
    assert len(levels) == 4
    assert torch.equal(levels[-1].values, model(batch).values)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_reach_every_parameter(layer):
    model = small(layer).train()
    model(packed()).values.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("layer", LAYERS)
def test_the_config_builds_the_same_encoder(layer):
    model = small(layer, self_loop=0)
    again = make_encoder(json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    assert torch.equal(again(packed()).values, model(packed()).values)


def test_features_of_another_scheme_are_refused():
    molecules = read_molecules(SMILES)
    with pytest.raises(
        ValueError, match=r"PretrainGNN reads features 'pretrain-gnns-2-2'.*'ogb-9-3': 9"
    ):
        small("gin")(GraphBatch.pack(molecules))
    with pytest.raises(
        ValueError, match=r"GIN reads features 'ogb-9-3'.*'pretrain-gnns-2-2': 2 per"
    ):
        GIN(layers=1, width=8)(packed())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layer": "gat"}, "layer must be one of 'gin', 'gcn', 'graphsage', got 'gat'"),
        ({"features": "ogb-9-3"}, "features must be 'pretrain-gnns-2-2', got 'ogb-9-3'"),
        ({"self_loop": 6}, "self_loop must be a bond type, 0 to 5, got 6"),
    ],
)
def test_options_that_cannot_be(options, match):
    with pytest.raises(ValueError, match=match):
        PretrainGNN(**options)
