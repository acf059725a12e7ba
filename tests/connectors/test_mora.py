"""MoRA against the recorded weights of the published generator, and its promises."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from edt_former.connectors import MoleculeAdapters, MoRA, make_connector
from edt_former.graph import GraphFeatures
from edt_former.released.mora import GeneratorSizes, connector_config, to_ours
from edt_kernels import instance_lora, offsets_from_lengths

assert_close = torch.testing.assert_close

LLM = {"llm_width": 12, "llm_layers": 4, "every": 2, "rank": 3}
SIZE = {"width": 16, "layers": 2, "heads": 4, "ffn": 24, "encoder_width": 10}
ATOMS = [6, 0, 1, 9]
FACTORISED = {"head": "factorised", "factors": 5}
GROUPED = {"types": "qkvod", "widths": {"k": [12, 6], "v": [12, 6], "d": [20, 12]}}


def mora(**options: object) -> MoRA:
    model = make_connector({"name": "mora", **LLM, **SIZE, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def features(lengths=ATOMS) -> GraphFeatures:
    torch.manual_seed(1)
    return GraphFeatures(torch.randn(sum(lengths), 10), offsets_from_lengths(torch.tensor(lengths)))


def one(of: GraphFeatures, molecule: int) -> GraphFeatures:
    start, stop = of.offsets[molecule : molecule + 2].tolist()
    return GraphFeatures(of.values[start:stop], torch.tensor([0, stop - start]))


def record() -> dict:
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of the recorded published numbers) is not set")
    return json.loads(Path(os.environ["EDT_SHARED"], "oracles", "mora.json").read_text())


def sizes(told: dict) -> GeneratorSizes:
    return GeneratorSizes(
        told["lora_rank"],
        told["lora_type"],
        told["skip_layers"],
        told["mora_alpha"],
        told["num_heads"],
    )


def published(weights: dict[str, torch.Tensor], told: dict) -> MoRA:
    """The connector of recorded weights by names without prefix."""
    config = connector_config(weights, sizes(told))
    model = make_connector(config)
    unread = {"pos_embed": weights["pos_embed"]}
    state = to_ours({n: x for n, x in weights.items() if n not in unread}, config)
    model.load_state_dict(state)
    return model.eval()


def below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


@pytest.mark.parametrize(
    "case",
    ["qkvom_sep_skip4_alpha8", "qkvom_sep_skip1", "qv_nosep_skip2_alpha64", "qkvom_nosep_skip2"],
)
def test_the_generated_weights_are_those_recorded_in_mora(recorded, case):
    told, found = record()["cases"][case], below(f"{case}.", recorded("mora"))
    model = published(below("state.", found), told["kw"])
    nodes = found["in"]
    batch = GraphFeatures(nodes.flatten(0, 1), nodes.shape[1] * torch.arange(len(nodes) + 1))
    adapters = model(batch, {})
    maps = [(model.options.adapted.index(layer), kind) for layer, kind in told["active"]]
    assert len(maps) == sum(len(a) for a in adapters.a.values())
    for (index, kind), (layer, _) in zip(maps, told["active"], strict=True):
        a, b = (found[f"layer{layer}.{kind}.{name}"] for name in "AB")
        assert_close(adapters.a[kind][index], a, rtol=0, atol=1e-4)
        assert_close(adapters.b[kind][index][None] * adapters.scale, b, rtol=0, atol=1e-4)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters + found["state.pos_embed"].numel() == told["params"]
    raw = torch.cat([a.transpose(0, 1).flatten(2) for a in adapters.a.values()], 1)
    assert_close(raw, found["raw_weights"], rtol=0, atol=1e-4)


def test_the_published_size_is_that_recorded_in_mora():
    told = record()["report"]["published"]
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in told["keys"].items()}
        config = connector_config(weights, GeneratorSizes())
        assert (config["layers"], config["llm_width"], config["llm_layers"]) == (1, 4096, 32)
        model = make_connector({**config, "layers": 8})
        small = make_connector({**config, "layers": 8, **FACTORISED, "factors": 64})
    read = {n: x for n, x in weights.items() if n != "pos_embed"}
    state = {n: x.shape for n, x in model.state_dict().items()}
    ours = {n: x.shape for n, x in to_ours(read, config).items()}
    assert {n: state[n] for n in ours} == ours
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters + weights["pos_embed"].numel() == told["params"]
    heads = [
        sum(p.numel() for n, p in m.named_parameters() if "decoders" not in n)
        for m in (small, model)
    ]
    assert heads[0] < heads[1] / 30


def test_applied_as_recorded_in_mora(recorded):
    found = below("apply.", recorded("mora"))
    x, a, b = found["x"], found["A"], found["B"][0]
    offsets = x.shape[1] * torch.arange(len(x) + 1)
    assert_close(instance_lora(x, a, b, offsets), found["out"], rtol=0, atol=1e-4)
    # One adapter for a whole batch, as the published program broadcasts it.
    shared = below("apply_broadcast.", recorded("mora"))
    one_for_all = torch.tensor([0, x.shape[0] * x.shape[1]])
    assert_close(instance_lora(x, shared["A"], b, one_for_all), shared["out"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, FACTORISED, GROUPED, {**GROUPED, **FACTORISED}], ids=str)
@pytest.mark.parametrize("separate", [True, False])
def test_shapes_follow_the_kinds(options, separate):
    model = mora(separate=separate, **options)
    adapters = model(features(), {})
    assert list(adapters.a) == list(adapters.b) == list(model.options.types)
    for kind, (d_in, d_out) in model.options.widths.items():
        assert adapters.a[kind].shape == (2, len(ATOMS), d_in, 3)
        assert adapters.b[kind].shape == (2, d_out, 3)
    assert adapters.count == len(ATOMS)


@pytest.mark.parametrize("options", [{}, FACTORISED, {"graph_token": True, "sum_tokens": 2}])
def test_a_molecules_adapters_do_not_depend_on_the_batch(options):
    model, batch = mora(**options), features()
    together = model(batch, {})
    for molecule in range(len(ATOMS)):
        alone = model(one(batch, molecule), {})
        for kind, a in together.a.items():
            assert_close(a[:, molecule], alone.a[kind][:, 0], rtol=1e-5, atol=1e-5)
    differing = together.a["q"][:, 0] - together.a["q"][:, 3]
    assert differing.abs().max() > 0.1


def test_the_order_of_the_atoms_does_not_matter():
    model, batch = mora(), features()
    turned = batch._replace(values=torch.cat([batch.values[:7], batch.values[7:].flip(0)]))
    for a, b in zip(model(batch, {}).a.values(), model(turned, {}).a.values(), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_training_begins_at_the_plain_language_model():
    model = make_connector({"name": "mora", **LLM, **SIZE, **GROUPED})
    adapters = model(features(), {})
    assert all(b.count_nonzero() == 0 for b in adapters.b.values())
    assert all(a.abs().max() > 0 for a in adapters.a.values())


def test_alpha_scales():
    assert mora(alpha=6)(features(), {}).scale == 2
    assert mora()(features(), {}).scale == 1


def test_every_parameter_gets_a_gradient():
    model = mora(**FACTORISED, sum_tokens=1, graph_token=True, graph_norm=True, separate=False)
    adapters = model(features(), {})
    sum(x.square().sum() for xs in adapters[:2] for x in xs.values()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_rows_with_none_one_and_several_molecules():
    model = mora()
    adapters = model(features(), {})
    rows = adapters.of_rows(torch.tensor([0, 0, 1, 4]))
    for kind, a in adapters.a.items():
        expected = torch.stack([torch.zeros_like(a[:, 0]), a[:, 0], a[:, 1:].sum(1)], 1)
        assert_close(rows.a[kind], expected)
    x = torch.randn(3, 5, 12)
    offsets = 5 * torch.arange(4)
    added = instance_lora(x, rows.a["q"][1], adapters.b["q"][1], offsets)
    single = [x[2] @ adapters.a["q"][1, m] @ adapters.b["q"][1].T for m in (1, 2, 3)]
    assert_close(added[2], sum(single), rtol=1e-4, atol=1e-4)
    assert added[0].count_nonzero() == 0


def test_one_molecule_per_row_is_not_copied():
    adapters = mora()(features(), {})
    assert isinstance(adapters, MoleculeAdapters)
    assert adapters.of_rows(torch.arange(len(ATOMS) + 1)) is adapters


def test_no_token_enters_the_prompt():
    model = mora()
    assert model.adapts and model.token_counts({}, 3) == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"types": "qx"}, "types must be different letters of 'qkvomd', got 'qx'"),
        ({"types": "qq"}, "types must be different letters"),
        ({"head": "low"}, "head must be 'full' or 'factorised', got 'low'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"every": 5}, "every must be at most llm_layers 4, got 5"),
        ({"heads": 3}, "width must be a multiple of heads 3, got 16"),
        ({"types": "q", "widths": {"k": [1, 2]}}, "widths must be of types 'q', got"),
    ],
)
def test_options_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        mora(**options)


def test_every_molecule_of_a_batch_gets_what_it_gets_alone_as_recorded_in_mora(recorded):
    """The published program mixes the molecules of a batch; alone it gives these."""
    tensors = recorded("mora")
    weights = below("llama.gen.", tensors)
    told = record()["cases"]["qkvom_sep_skip4_alpha8"]["kw"]
    model = published(weights, {**told, "skip_layers": 2})
    nodes, counts = tensors["enc.nodes"], torch.bincount(tensors["enc.in.batch"])
    adapters = model(GraphFeatures(nodes, offsets_from_lengths(counts)), {})
    for molecule in range(3):
        alone = tensors[f"enc.single{molecule}.layer1.q.A"]
        assert_close(adapters.a["q"][0, molecule], alone[0], rtol=0, atol=1e-4)
