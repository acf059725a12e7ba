"""Uni-Mol against itself written out, the published numbers, and the promises of an encoder."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edt_former.chem import read_molecules
from edt_former.graph import GraphBatch, UniMol, make_encoder
from edt_former.graph.unimol import HIDDEN, SYMBOLS
from edt_former.released import read_tree

REDUCED = {"name": "unimol", "layers": 4, "width": 64, "heads": 8, "ffn": 128}
SMALL = {"layers": 3, "width": 16, "heads": 2, "ffn": 32}
SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "[He]", "[2H]C([2H])([2H])O", "[Na+].[Cl-]", "*C[U]"]
MOLECULES = read_molecules(SMILES)
NAMES = {0: "*", 1: "H", 2: "He", 6: "C", 8: "O", 11: "Na", 17: "Cl", 92: "U"}


def packed(*which: int) -> GraphBatch:
    places = []
    for m in which:
        generator = np.random.default_rng(m)
        places.append(generator.normal(size=(MOLECULES[m].num_atoms, 3)) * 2 + 5)
    return GraphBatch.pack([MOLECULES[m] for m in which], places)


def small(**options: object) -> UniMol:
    torch.manual_seed(0)
    model = UniMol(**SMALL, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def published_encoder(state: dict[str, torch.Tensor], **options: object) -> UniMol:
    model = make_encoder({**REDUCED, "special_tokens": True, "hydrogens": False, **options})
    model.load_state_dict(read_tree(state, view="3d").parts["graph_encoder"])
    return model.eval()


def plain(model: UniMol, symbols: list[str], places: np.ndarray) -> torch.Tensor:
    """One molecule written out: [CLS], atoms, [SEP], every pair in a rectangle."""
    state = model.state_dict()
    ids = [1, *(SYMBOLS.index(s) if s in SYMBOLS else SYMBOLS.index("[UNK]") for s in symbols), 2]
    x = torch.tensor(places - places.mean(0), dtype=torch.float32)
    x = torch.cat([torch.zeros(1, 3), x, torch.zeros(1, 3)])
    bias = []
    for i, a in enumerate(ids):
        for j, b in enumerate(ids):
            kind = a * len(SYMBOLS) + b
            mul, shift = state["gbf.mul.weight"][kind], state["gbf.bias.weight"][kind]
            std = state["gbf.stds.weight"][0].abs() + 1e-5
            z = (mul * (x[i] - x[j]).norm() + shift - state["gbf.means.weight"][0]) / std
            bias.append(torch.exp(-(z**2) / 2) / (math.sqrt(2 * 3.14159) * std))

    def linear(h, name):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(h, name):
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return h * state[f"{name}.weight"] + state[f"{name}.bias"]

    bias = linear(F.gelu(linear(torch.stack(bias), "gbf_proj.linear1")), "gbf_proj.linear2")
    scores = bias.reshape(len(ids), len(ids), -1).permute(2, 0, 1)
    heads = len(scores)
    h = norm(state["embed_tokens.weight"][ids], "encoder.emb_layer_norm")
    for n in range(len(model.encoder.layers)):
        layer = f"encoder.layers.{n}"
        qkv = linear(norm(h, f"{layer}.self_attn_layer_norm"), f"{layer}.self_attn.in_proj")
        q, k, v = (y.reshape(len(ids), heads, -1).transpose(0, 1) for y in qkv.chunk(3, -1))
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + scores
        read = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        h = h + linear(read, f"{layer}.self_attn.out_proj")
        hidden = F.gelu(linear(norm(h, f"{layer}.final_layer_norm"), f"{layer}.fc1"))
        h = h + linear(hidden, f"{layer}.fc2")
    return norm(h, "encoder.final_layer_norm")


@pytest.mark.parametrize(
    "m",
    [
        pytest.param(0, id="aspirin"),
        pytest.param(1, id="one atom of an unknown element"),
        pytest.param(2, id="isotopic hydrogens"),
        pytest.param(3, id="salt"),
        pytest.param(4, id="wildcard"),
    ],
)
def test_equals_unimol_written_out(m):
    model, batch = small(special_tokens=True), packed(m)
    symbols = [NAMES[e] for e in batch.elements.tolist()]
    expected = plain(model, symbols, batch.coordinates.numpy())
    features = model(batch)
    torch.testing.assert_close(features.values, expected, rtol=1e-4, atol=1e-4)
    assert features.offsets.tolist() == [0, len(symbols) + 2]
    torch.testing.assert_close(*features.atoms(), expected[1:-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(small()(batch).values, expected[1:-1], rtol=1e-4, atol=1e-4)


def test_a_hidden_element_is_read_as_mask():
    model, batch = small(), packed(0)
    batch.elements[3] = HIDDEN
    symbols = [NAMES.get(element, "[MASK]") for element in batch.elements.tolist()]
    assert symbols.count("[MASK]") == 1
    expected = plain(model, symbols, batch.coordinates.numpy())[1:-1]
    torch.testing.assert_close(model(batch).values, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("record", ["unimol", "blend"], ids="edt_encoder_{}".format)
def test_equals_the_published_numbers(published, record):
    record = getattr(published, record)
    features = published_encoder(published.state)(published.batch(record))
    expected = record["enc.unimol.node"][record["enc.unimol.mask"]]
    torch.testing.assert_close(features.values, expected, rtol=0, atol=1e-4)
    assert torch.equal(features.offsets.diff(), record["enc.unimol.mask"].sum(1))
    norm = torch.nn.LayerNorm(64)
    norm.load_state_dict({k: published.state[f"ln_graph.unimol.{k}"] for k in ("weight", "bias")})
    expected = record["enc.unimol.node_ln"][record["enc.unimol.mask"]]
    torch.testing.assert_close(norm(features.values), expected, rtol=0, atol=1e-4)


def test_equals_the_published_numbers_in_float64_edt_encoder_blend(published):
    expected = published.exact["enc.unimol.node"][published.blend["enc.unimol.mask"]]
    batch = published.batch(published.blend)
    features = published_encoder(published.state).double()(batch)
    torch.testing.assert_close(features.values, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("m", range(8))
def test_a_published_molecule_alone_edt_encoder_blend(published, m):
    features = published_encoder(published.state)(published.batch(published.blend, [m]))
    expected = published.blend["enc.unimol.node"][m][published.blend["enc.unimol.mask"][m]]
    torch.testing.assert_close(features.values, expected, rtol=0, atol=1e-4)


def test_an_atom_that_is_left_out_is_represented_by_cls(published):
    batch = published.batch(published.blend, [1, 4])
    features = published_encoder(published.state)(batch)
    (rows,) = features.views
    start = int(features.offsets[1])
    assert batch.elements[-5:].tolist() == [1, 6, 1, 1, 8]
    assert (rows[-5:] - start).tolist() == [0, 1, 0, 0, 2]
    assert rows[:13].tolist() == list(range(1, 14))


def test_a_molecule_of_hydrogens_only_keeps_them():
    (hydrogen,) = read_molecules(["[H][H]"])
    batch = GraphBatch.pack([hydrogen], [np.array([[0, 0, 0], [0, 0, 0.7]])])
    model = small(special_tokens=True, hydrogens=False)
    torch.testing.assert_close(model(batch).values, small(special_tokens=True)(batch).values)
    assert model(batch).views[0].tolist() == [1, 2]


@pytest.mark.parametrize("hydrogens", [True, False])
def test_a_molecule_alone_equals_it_in_a_batch(hydrogens):
    model = small(special_tokens=True, hydrogens=hydrogens)
    together = model(packed(0, 1, 2, 3, 4))
    for m in range(5):
        start, stop = together.offsets[m : m + 2]
        alone = model(packed(m))
        torch.testing.assert_close(together.values[start:stop], alone.values, rtol=1e-5, atol=1e-5)


def test_moving_and_turning_a_molecule_changes_nothing():
    model, batch = small(), packed(0, 2)
    expected = model(batch).values
    turn, _ = torch.linalg.qr(torch.randn(3, 3))
    batch.coordinates = batch.coordinates @ turn + 10
    torch.testing.assert_close(model(batch).values, expected, rtol=1e-4, atol=1e-4)


def test_stretching_a_molecule_changes_it():
    model, batch = small(), packed(0)
    expected = model(batch).values
    batch.coordinates = batch.coordinates * 1.1
    assert (model(batch).values - expected).abs().max() > 1e-3


def test_no_molecules_and_empty_molecules():
    empty = MOLECULES[1].__class__(
        "", np.zeros((0, 9), int), np.zeros((2, 0), int), np.zeros((0, 3), int), np.zeros(0, int)
    )
    nowhere = np.zeros((0, 3))
    assert small()(GraphBatch.pack([], [])).values.shape == (0, 16)
    batch = GraphBatch.pack([empty, MOLECULES[1], empty], [nowhere, np.zeros((1, 3)), nowhere])
    features = small(special_tokens=True)(batch)
    assert features.offsets.tolist() == [0, 2, 5, 7]
    assert features.views[0].tolist() == [3]
    alone = small()(GraphBatch.pack([MOLECULES[1]], [np.zeros((1, 3))]))
    torch.testing.assert_close(features.atoms()[0], alone.values)


def test_gradients_reach_every_parameter_and_the_coordinates():
    model, batch = small(), packed(0, 2)
    batch.coordinates.requires_grad_()
    model(batch).values.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert batch.coordinates.grad.isfinite().all() and batch.coordinates.grad.abs().sum() > 0


def test_gradients_equal_those_written_out():
    batch = packed(2)
    weight = torch.randn(5, 16)
    grads = []
    for run in ("ragged", "written out"):
        model = small()
        if run == "ragged":
            values = model(batch).values
        else:
            symbols = [NAMES[e] for e in batch.elements.tolist()]
            model.state_dict = lambda model=model: dict(model.named_parameters())
            values = plain(model, symbols, batch.coordinates.numpy())[1:-1]
        (values * weight).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        # Sums over all pairs cancel: what rounding leaves is small beside the largest of them.
        rounding = max(1e-4, 2e-5 * grad.abs().max().item())
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=rounding)


def test_bfloat16_stays_within_its_budget(published):
    batch = published.batch(published.blend)
    exact = published_encoder(published.state)(batch).values
    model = published_encoder(published.state).bfloat16()
    assert (model(batch).values.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_dropout_acts_in_training_only():
    model, batch = small().train(), packed(0)
    assert not torch.equal(model(batch).values, model(batch).values)
    model.freeze().train()
    assert not model.training
    assert torch.equal(model(batch).values, model(batch).values)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_parameter_names_and_default_sizes_are_the_published_ones():
    with torch.device("meta"):
        names = {name: tuple(value.shape) for name, value in UniMol().state_dict().items()}
    assert names.pop("embed_tokens.weight") == (31, 512)
    for name, shape in (
        ("mul", (961, 1)),
        ("bias", (961, 1)),
        ("means", (1, 128)),
        ("stds", (1, 128)),
    ):
        assert names.pop(f"gbf.{name}.weight") == shape
    shapes = {"gbf_proj.linear1": (128, 128), "gbf_proj.linear2": (64, 128)}
    norms = ["encoder.emb_layer_norm", "encoder.final_layer_norm"]
    for n in range(15):
        layer = f"encoder.layers.{n}"
        shapes[f"{layer}.self_attn.in_proj"] = (1536, 512)
        shapes[f"{layer}.self_attn.out_proj"] = (512, 512)
        shapes[f"{layer}.fc1"], shapes[f"{layer}.fc2"] = (2048, 512), (512, 2048)
        norms += [f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm"]
    for name, shape in shapes.items():
        assert (names.pop(f"{name}.weight"), names.pop(f"{name}.bias")) == (shape, shape[:1])
    for name in norms:
        assert (names.pop(f"{name}.weight"), names.pop(f"{name}.bias")) == ((512,), (512,))
    assert not names


def test_the_config_builds_the_same_encoder():
    model = small(special_tokens=True, hydrogens=False, dropout=0.2)
    again = make_encoder(json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    torch.testing.assert_close(again(packed(0)).values, model(packed(0)).values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"width": 10, "heads": 4}, "multiple of heads 4, got 10", id="width"),
        pytest.param({"hydrogens": False}, "special_tokens must be True", id="hydrogens"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        UniMol(**options)


def test_a_batch_without_coordinates_is_refused():
    with pytest.raises(ValueError, match=r"batch.coordinates must be given to a 3D encoder"):
        small()(GraphBatch.pack(MOLECULES))


@pytest.mark.parametrize("special", [False, True])
def test_levels_are_those_of_shallower_encoders(special):
    """The last passes the LayerNorm at the end; before, it is what the layers have made so far."""
    model, batch = small(special_tokens=special), packed(0, 1, 3)
    found = model.with_levels(batch)
    assert len(found.levels) == 4
    torch.testing.assert_close(found.values, model(batch).values, rtol=0, atol=0)
    symbols = model.embed_tokens(model._tokens(batch).ids)
    first = found._replace(values=found.levels[0]).atoms()[0]
    embedded = model.encoder.emb_layer_norm(symbols).index_select(0, model._tokens(batch).atoms)
    torch.testing.assert_close(first, embedded, rtol=0, atol=1e-6)
    model.encoder.layers = model.encoder.layers[:2]
    model.encoder.final_layer_norm = torch.nn.Identity()
    torch.testing.assert_close(found.levels[2], model(batch).values, rtol=0, atol=1e-5)
