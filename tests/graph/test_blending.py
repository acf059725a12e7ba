"""Blending against torch's own attention, the published numbers, and the promises of an encoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from edt_former.chem import read_molecules
from edt_former.graph import Blended, GraphBatch, GraphFeatures, make_encoder
from edt_former.released import read_tree

REDUCED = {
    "name": "blended",
    "flat": {"name": "gin", "layers": 5, "width": 48},
    "spatial": {
        "name": "unimol",
        "layers": 4,
        "width": 64,
        "heads": 8,
        "ffn": 128,
        "special_tokens": True,
        "hydrogens": False,
    },
    "layers": 2,
    "width": 64,
    "heads": 4,
    "special_tokens": True,
}
SMALL = {
    "flat": {"name": "gin", "layers": 2, "width": 8},
    "spatial": {"layers": 2, "width": 16, "heads": 2, "ffn": 32},
    "layers": 2,
    "width": 24,
    "heads": 3,
}
MOLECULES = read_molecules(["CC(=O)Oc1ccccc1C(=O)O", "[He]", "[2H]C([2H])([2H])O", "[Na+].[Cl-]"])
PREFIXES = ("graph_encoder.", "ln_graph.", "blending_module.")


def packed(*which: int) -> GraphBatch:
    places = []
    for m in which:
        generator = np.random.default_rng(m)
        places.append(generator.normal(size=(MOLECULES[m].num_atoms, 3)) * 2 + 5)
    return GraphBatch.pack([MOLECULES[m] for m in which], places)


def small(**options: object) -> Blended:
    torch.manual_seed(0)
    model = Blended(**{**SMALL, **options}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def published_encoder(state: dict[str, torch.Tensor], **options: object) -> Blended:
    model = make_encoder({**REDUCED, **options})
    model.load_state_dict(read_tree(state).parts["graph_encoder"])
    return model.eval()


def unit(state: dict[str, torch.Tensor], name: str, x: torch.Tensor, source: torch.Tensor):
    """A residual attention unit by torch's modules, one molecule [L, width]."""
    width = x.shape[1]
    inner = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}

    def load(module, prefix):
        at = f"{prefix}."
        module.load_state_dict({k[len(at) :]: v for k, v in inner.items() if k.startswith(at)})
        return module

    q, k, v = (
        load(torch.nn.LayerNorm(width), f"ln_{n}")(rows)
        for n, rows in (("q", x), ("k", source), ("v", source))
    )
    attention = load(torch.nn.MultiheadAttention(width, SMALL["heads"], batch_first=True), "attn")
    y = x + attention(q[None], k[None], v[None], need_weights=False)[0][0]
    layers = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
    mlp = load(torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1]), "mlp")
    return y + mlp(load(torch.nn.LayerNorm(width), "ln")(y))


@torch.no_grad()
def plain(model: Blended, batch: GraphBatch) -> torch.Tensor:
    """One molecule: [mean, 2D atoms, CLS, 3D atoms, SEP]."""
    state = model.state_dict()
    atoms = model.graph_encoder["moleculestm"](batch).values
    views = {
        "moleculestm": torch.cat([atoms.mean(0, keepdim=True), atoms]),
        "unimol": model.graph_encoder["unimol"](batch).values,
    }
    for name, values in views.items():
        norm = torch.nn.functional.layer_norm(
            values,
            values.shape[1:],
            state[f"ln_graph.{name}.weight"],
            state[f"ln_graph.{name}.bias"],
        )
        at = f"blending_module.mlp.{name}.0"
        views[name] = norm @ state[f"{at}.weight"].T + state[f"{at}.bias"]
    flat, spatial = views.values()
    for n in range(2):
        at = f"blending_module.cross_attn_blocks.{n}"
        flat = unit(state, f"{at}.self_attn_block_2D", flat, flat)
        spatial = unit(state, f"{at}.self_attn_block_3D", spatial, spatial)
        flat = unit(state, f"{at}.cross_attn_block_3Dto2D", flat, spatial)
        spatial = unit(state, f"{at}.cross_attn_block_2Dto3D", spatial, flat)
    return torch.cat([flat, spatial])


@pytest.mark.parametrize("m", range(4), ids=["aspirin", "one-atom", "deuterated", "salt"])
def test_equals_blending_by_torchs_attention(m):
    model, batch = small(special_tokens=True), packed(m)
    expected, n = plain(model, batch), batch.num_atoms
    features = model(batch)
    torch.testing.assert_close(features.values, expected, rtol=1e-4, atol=1e-4)
    assert features.offsets.tolist() == [0, 2 * n + 3]
    for atoms, start in zip(features.atoms(), (1, n + 2), strict=True):
        torch.testing.assert_close(atoms, expected[start : start + n], rtol=1e-4, atol=1e-4)


def test_without_special_tokens_only_the_atoms_of_both_views_are_left():
    batch = packed(0, 1, 2)
    full, features = small(special_tokens=True)(batch), small()(batch)
    assert torch.equal(features.offsets, 2 * batch.offsets)
    for view, expected in zip(features.atoms(), full.atoms(), strict=True):
        assert view.shape == (batch.num_atoms, 24)
        torch.testing.assert_close(view, expected)
    for m in range(3):
        start, stop = batch.offsets[m : m + 2].tolist()
        rows = torch.cat([view[start:stop] for view in features.views])
        assert rows.tolist() == list(range(2 * start, 2 * stop))


@pytest.mark.parametrize(
    "which", [None, *([m] for m in range(8))], ids=["batch", *(f"molecule {m}" for m in range(8))]
)
def test_equals_the_published_numbers_edt_encoder_blend(published, which):
    record, model = published.blend, published_encoder(published.state)
    batch = published.batch(record, which)
    which = list(range(8)) if which is None else which
    masks = {name: record[f"enc.{name}.mask"][which] for name in ("moleculestm", "unimol")}

    assert masks["moleculestm"].sum() + masks["unimol"].sum() == record["node_mask"][which].sum()
    expected = record["node"][which][record["node_mask"][which]]
    features = model(batch)
    torch.testing.assert_close(features.values, expected, rtol=0, atol=1e-4)
    assert torch.equal(features.offsets.diff(), record["node_mask"][which].sum(1))


def test_every_published_level_is_equal_edt_encoder_blend(published):
    record, model = published.blend, published_encoder(published.state)
    seen = {}

    def remember(name):
        def hook(_, __, out):
            seen[name] = out

        return hook

    for name in ("moleculestm", "unimol"):
        model.graph_encoder[name].register_forward_hook(remember(f"enc.{name}"))
        model.ln_graph[name].register_forward_hook(remember(f"norm.{name}"))
    for n, block in enumerate(model.blending_module.cross_attn_blocks):
        block.register_forward_hook(remember(f"block{n}"))
    model(published.batch(record))
    masks = {name: record[f"enc.{name}.mask"] for name in ("moleculestm", "unimol")}

    def recorded(key, name):
        return record[key][masks[name]]

    close = {"rtol": 0, "atol": 1e-4}
    flat = masks["moleculestm"].clone()
    flat[:, 0] = False
    atoms = seen["enc.moleculestm"].values
    torch.testing.assert_close(atoms, record["enc.moleculestm.node"][flat], **close)
    spatial = seen["enc.unimol"].values
    torch.testing.assert_close(spatial, recorded("enc.unimol.node", "unimol"), **close)
    for name in masks:
        norm = recorded(f"enc.{name}.node_ln", name)
        torch.testing.assert_close(seen[f"norm.{name}"], norm, **close)
    for n in range(2):
        flat, spatial = (view.values for view in seen[f"block{n}"])
        expected = recorded(f"blend.block{n}.f2d", "moleculestm")
        torch.testing.assert_close(flat, expected, **close)
        torch.testing.assert_close(spatial, recorded(f"blend.block{n}.f3d", "unimol"), **close)


def test_equals_the_published_numbers_in_float64_edt_encoder_blend(published):
    model = published_encoder(published.state).double()
    expected = published.exact["node"][published.blend["node_mask"]]
    features = model(published.batch(published.blend))
    torch.testing.assert_close(features.values, expected, rtol=0, atol=2e-5)


def test_bfloat16_stays_within_its_budget(published):
    batch = published.batch(published.blend)
    exact = published_encoder(published.state)(batch).values
    model = published_encoder(published.state).bfloat16()
    assert (model(batch).values.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("special_tokens", [True, False])
def test_a_molecule_alone_equals_it_in_a_batch(special_tokens):
    model = small(special_tokens=special_tokens)
    together = model(packed(0, 1, 2, 3))
    for m in range(4):
        start, stop = together.offsets[m : m + 2]
        alone = model(packed(m)).values
        torch.testing.assert_close(together.values[start:stop], alone, rtol=1e-5, atol=1e-5)


def test_no_molecules():
    features = small()(GraphBatch.pack([], []))
    assert features.values.shape == (0, 24)
    assert features.offsets.tolist() == [0]


def test_gradients_flow_where_nothing_is_frozen():
    model = small(special_tokens=True)
    model(packed(0, 2)).values.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_frozen_with_its_blending():
    model = small().freeze().train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_frozen_but_for_its_blending():
    model = small(train_blending=True).freeze().train()
    assert model.training and model.blending_module.training
    assert not any(module.training for module in model.graph_encoder.values())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(packed(0, 3)).values.square().sum().backward()
    step.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("graph_encoder."), name


@pytest.mark.parametrize("hydrogens", [True, False])
def test_the_config_builds_the_same_encoder(hydrogens):
    spatial = {**SMALL["spatial"], "hydrogens": hydrogens}
    model = small(spatial=spatial, special_tokens=True, train_blending=True)
    again = make_encoder(json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    torch.testing.assert_close(again(packed(0, 2)).values, model(packed(0, 2)).values)


def test_names_and_default_sizes_are_the_published_ones(published):
    with torch.device("meta"):
        state = Blended().state_dict()
    sizes = {f"encoder.{name}": list(value.shape) for name, value in state.items()}
    expected = {
        name: shape
        for name, shape in published.names.items()
        if name.startswith(tuple(f"encoder.{prefix}" for prefix in PREFIXES))
        and "graph_pred_linear" not in name
    }
    assert len(expected) > 700
    assert sizes == expected


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width must be a multiple of heads 8, got 20"):
        Blended(width=20)


def test_the_atoms_of_one_view_are_the_values():
    values = torch.randn(3, 2)
    assert GraphFeatures(values, torch.tensor([0, 3])).atoms() == (values,)


def test_levels_end_with_the_features_and_have_their_rows():
    batch = packed(0, 2, 1)
    for special in (False, True):
        model = small(special_tokens=special)
        found = model.with_levels(batch)
        assert len(found.levels) == 3 and found.levels[-1] is found.values
        assert {level.shape for level in found.levels} == {found.values.shape}
        expected = model(batch)
        torch.testing.assert_close(found.values, expected.values, rtol=0, atol=0)
        assert torch.equal(found.offsets, expected.offsets)
        assert all(map(torch.equal, found.views, expected.views))
        flat, _ = model.blending_module.levels(model.flat(batch), model.spatial(batch))[0]
        first = found._replace(values=found.levels[0]).atoms()[0]
        torch.testing.assert_close(first, flat.atoms()[0], rtol=0, atol=0)
