"""The GIN encoder against a plain one, the published numbers, and the promises of an encoder."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from edt_former.graph import GIN, GraphBatch, GraphEncoder, make_encoder, register_encoder

ATOMS, BONDS = (119, 4, 12, 12, 10, 6, 6, 2, 2), (5, 6, 2)
BONDS_OF = [[(0, 1), (1, 2), (2, 3), (1, 3)], [], [], [(0, 1)]]
LENGTHS = [4, 1, 0, 2]


def oracle(name: str) -> dict[str, torch.Tensor]:
    safetensors = pytest.importorskip("safetensors.torch")
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of the recorded published numbers) is not set")
    return safetensors.load_file(Path(os.environ["EDT_SHARED"], "oracles", name))


def packed(edges: torch.Tensor, bond_features, atom_features, offsets) -> GraphBatch:
    order = edges[1].argsort(stable=True)
    incoming = torch.bincount(edges[1], minlength=len(atom_features))
    return GraphBatch(
        atom_features=atom_features,
        bond_index=edges[:, order],
        bond_features=bond_features[order],
        bond_offsets=F.pad(incoming.cumsum(0), (1, 0)),
        offsets=offsets,
        elements=atom_features[:, 0] + 1,
    )


def molecules(*which: int) -> GraphBatch:
    """Some of four fixed molecules: a ring with a tail, one atom, none, two atoms."""
    atoms, bonds, edges, lengths = [], [], [], []
    for m in which:
        torch.manual_seed(m)
        start, lengths = sum(lengths), [*lengths, LENGTHS[m]]
        atoms.append(torch.stack([torch.randint(n, (LENGTHS[m],)) for n in ATOMS], 1))
        for i, j in BONDS_OF[m]:
            feature = torch.stack([torch.randint(n, ()) for n in BONDS])
            edges += [(start + i, start + j), (start + j, start + i)]
            bonds += [feature, feature]
    offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    index = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T
    features = torch.stack(bonds) if bonds else torch.zeros(0, 3, dtype=torch.int64)
    return packed(index, features, torch.cat(atoms), offsets)


def small(seed: int = 0) -> GIN:
    torch.manual_seed(seed)
    model = GIN(layers=3, width=8)
    for _, value in model.named_buffers():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    for layer in model.molecule_node_model.gnns:
        torch.nn.init.uniform_(layer.eps, -0.5, 0.5)
    return model.eval()


def plain(state: dict[str, torch.Tensor], batch: GraphBatch, layers: int) -> torch.Tensor:
    """GIN written out: one bond at a time."""
    root = {k.removeprefix("molecule_node_model."): v for k, v in state.items()}

    def norm(x, name):
        shift = (x - root[f"{name}.running_mean"]) / (root[f"{name}.running_var"] + 1e-5).sqrt()
        return shift * root[f"{name}.weight"] + root[f"{name}.bias"]

    h = sum(
        root[f"atom_encoder.atom_embedding_list.{i}.weight"][column]
        for i, column in enumerate(batch.atom_features.T)
    )
    for n in range(layers):
        received = torch.zeros_like(h)
        for (source, target), bond in zip(batch.bond_index.T, batch.bond_features, strict=True):
            tables = f"gnns.{n}.bond_encoder.bond_embedding_list"
            e = sum(root[f"{tables}.{i}.weight"][bond[i]] for i in range(3))
            received[target] += F.relu(h[source] + e)
        x = (1 + root[f"gnns.{n}.eps"]) * h + received
        x = x @ root[f"gnns.{n}.mlp.0.weight"].T + root[f"gnns.{n}.mlp.0.bias"]
        x = F.relu(norm(x, f"gnns.{n}.mlp.1"))
        x = x @ root[f"gnns.{n}.mlp.3.weight"].T + root[f"gnns.{n}.mlp.3.bias"]
        h = norm(x, f"batch_norms.{n}")
        h = h if n == layers - 1 else F.relu(h)
    return h


def test_equals_gin_written_out():
    model, batch = small(), molecules(0, 1, 2, 3)
    expected = plain(model.state_dict(), batch, layers=3)
    torch.testing.assert_close(model(batch).values, expected, rtol=1e-5, atol=1e-5)


def test_equals_the_published_numbers_at_every_level_llamo_gin():
    record = oracle("llamo_gin.safetensors")
    model = make_encoder({"name": "gin"}).eval()
    state = {k.removeprefix("enc."): v for k, v in record.items() if k.startswith("enc.")}
    model.load_state_dict(state)
    lengths = torch.bincount(record["in.batch"])
    batch = packed(
        record["in.edge_index"],
        record["in.edge_attr"],
        record["in.x"],
        F.pad(lengths.cumsum(0), (1, 0)),
    )
    for i, level in enumerate(model.levels(batch)):
        torch.testing.assert_close(level.values, record[f"level{i}_flat"], rtol=0, atol=1e-4)


def test_parameter_names_and_default_sizes_are_the_published_ones():
    names = {name: tuple(value.shape) for name, value in GIN().state_dict().items()}
    root = "molecule_node_model."
    for i, size in enumerate(ATOMS):
        assert names.pop(f"{root}atom_encoder.atom_embedding_list.{i}.weight") == (size, 300)
    for n in range(5):
        assert names.pop(f"{root}gnns.{n}.eps") == (1,)
        assert names.pop(f"{root}gnns.{n}.mlp.0.weight") == (600, 300)
        assert names.pop(f"{root}gnns.{n}.mlp.3.weight") == (300, 600)
        assert names.pop(f"{root}gnns.{n}.mlp.0.bias") == (600,)
        assert names.pop(f"{root}gnns.{n}.mlp.3.bias") == (300,)
        for i, size in enumerate(BONDS):
            table = f"{root}gnns.{n}.bond_encoder.bond_embedding_list.{i}.weight"
            assert names.pop(table) == (size, 300)
        for norm, size in ((f"gnns.{n}.mlp.1", 600), (f"batch_norms.{n}", 300)):
            for part in ("weight", "bias", "running_mean", "running_var"):
                assert names.pop(f"{root}{norm}.{part}") == (size,)
            assert names.pop(f"{root}{norm}.num_batches_tracked") == ()
    assert not names


@pytest.mark.parametrize("m", range(4), ids=["ring", "one-atom", "empty", "two-atoms"])
def test_a_molecule_alone_equals_it_in_a_batch(m):
    model, batch = small(), molecules(0, 1, 2, 3)
    start, stop = batch.offsets[m : m + 2]
    alone = model(molecules(m)).values
    torch.testing.assert_close(model(batch).values[start:stop], alone, rtol=1e-5, atol=1e-6)


def test_no_molecules():
    assert small()(GraphBatch.pack([])).values.shape == (0, 8)


def test_a_frozen_encoder_does_not_change():
    model = small().freeze()
    torch.nn.Sequential(model).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head = torch.nn.Linear(8, 1)
    step = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=1.0)
    head(model(molecules(0, 3)).values).sum().backward()
    step.step()
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_training_an_unfrozen_encoder_moves_its_statistics():
    model = small().train()
    before = model.molecule_node_model.batch_norms[0].running_mean.clone()
    model(molecules(0, 3)).values.sum().backward()
    assert not torch.equal(model.molecule_node_model.batch_norms[0].running_mean, before)
    assert model.molecule_node_model.gnns[0].eps.grad.abs() > 0


def test_the_config_builds_the_same_encoder():
    model = make_encoder({"name": "gin", "layers": 2, "width": 8, "dropout": 0.5})
    again = make_encoder(json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    assert again.width == 8


def test_an_unknown_encoder_lists_the_known():
    with pytest.raises(ValueError, match=r"known graph encoder, .*'gin'.*got 'gcn'"):
        make_encoder({"name": "gcn"})


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="depth"):
        make_encoder({"name": "gin", "depth": 3})


def test_registering_an_encoder(monkeypatch):
    monkeypatch.setattr("edt_former.graph.encoder._ENCODERS", {})

    @register_encoder("constant")
    class Constant(GraphEncoder):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width

    assert make_encoder({"name": "constant", "width": 3}).width == 3
