"""LLaMo's projector: the recorded published numbers, a padded twin, and its variants."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from torch import nn

from edt_former.chem import motif_features, read_as_written, read_molecules
from edt_former.connectors import make_connector
from edt_former.connectors.llamo import PROJECTORS
from edt_former.graph import GIN, GraphBatch, GraphFeatures, MotifFeatures
from edt_kernels import offsets_from_lengths, pad, unpad

SMILES = ["CC(=O)Oc1ccccc1C(=O)O", "C", "CCO", "[Na+].[Cl-]"]
SIZE = {"llm_width": 12, "encoder_width": 8, "num_levels": 4, "heads": 2, "depth": 2}


def connector(**options):
    model = make_connector({"name": "llamo", **SIZE, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def features(smiles=SMILES, *, seed: int = 0) -> GraphFeatures:
    torch.manual_seed(seed)
    molecules = read_molecules(smiles)
    graph = GraphBatch.pack(molecules, motifs=motif_features(molecules))
    encoder = GIN(layers=3, width=8).eval()
    return connector().read_graph(encoder, graph)


def test_equals_the_published_numbers_llamo_projector(recorded):
    record = recorded("llamo_projector")
    model = make_connector({"name": "llamo", "llm_width": 128}).eval()
    model.load_state_dict({name: record[f"state.{name}"] for name in model.state_dict()})
    lengths = record["in.mask"].sum(1)
    offsets = offsets_from_lengths(lengths)
    levels = tuple(unpad(record[f"in.h{i}"], offsets) for i in range(6))
    molecules = [read_as_written(smiles) for smiles in published_smiles()]
    motifs = MotifFeatures.pack(motif_features(molecules))
    given = GraphFeatures(levels[-1], offsets, None, levels, motifs)
    with torch.no_grad():
        read, tokens = model.read(given), model(given, {})
    torch.testing.assert_close(read, record["pre_layer_norm"], rtol=0, atol=1e-4)
    torch.testing.assert_close(
        tokens.values.unflatten(0, (8, 28)), record["out"], rtol=0, atol=1e-4
    )


def published_smiles() -> list[str]:
    path = f"{os.environ['EDT_SHARED']}/oracles/llamo_projector.safetensors"
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["smiles"])


def padded_twin(model, given: GraphFeatures) -> torch.Tensor:
    """The multi-level projector on rectangles, with torch's attention and masks."""
    options = model.options

    def attend(module, queries, rows, offsets):
        twin = nn.MultiheadAttention(
            module.embed_dim, module.num_heads, kdim=module.kdim, vdim=module.vdim, batch_first=True
        )
        twin.load_state_dict(module.state_dict())
        keys, real = pad(rows, offsets)
        queries = queries.expand(len(keys), -1, -1)
        return twin(queries, keys, keys, key_padding_mask=~real, need_weights=False)[0]

    read = []
    for i, level in enumerate(given.levels):
        module = model.cross_attention[0 if options.shared_attention else i]
        read.append(attend(module, model.query_tokens[i], level, given.offsets))
    known = given.motifs.offsets.diff() > 0
    rows = model.motif_weight(given.motifs.values.float())
    bounds = offsets_from_lengths(given.motifs.offsets.diff()[known])
    motifs = model.motif_query_tokens.expand(len(known), -1, -1).clone()
    motifs[known] = attend(model.motif_cross_attention, model.motif_query_tokens, rows, bounds)
    return model.net(model.layer_norm(torch.cat([motifs, *read], 1))).flatten(0, 1)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-level"])
def test_equals_a_padded_twin_in_values_and_gradients(shared):
    given = features()
    model = connector(shared_attention=shared)
    model.requires_grad_(True)
    weight = torch.randn(4 * 20, 12)
    ours = model(given, {}).values
    grads = torch.autograd.grad((ours * weight).sum(), list(model.parameters()))
    twin = padded_twin(model, given)
    torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(
        (twin * weight).sum(), list(model.parameters()), allow_unused=True
    )
    named = zip(model.named_parameters(), grads, strict=True)
    # The twin's attention is a copy, so it has gradients of what comes before and after only.
    for ((name, _), grad), other in zip(named, expected, strict=True):
        assert grad.abs().sum() > 0, name
        if other is not None and not name.endswith("query_tokens"):
            torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("motifs", [0, 3], ids=["no-motifs", "motifs"])
@pytest.mark.parametrize("sums", [0, 2], ids=["no-sums", "sums"])
def test_every_projector_gives_a_molecule_its_tokens_alone_as_in_a_batch(projector, motifs, sums):
    model = connector(projector=projector, motif_queries=motifs, sum_tokens=sums)
    tokens = model(features(), {})
    count = motifs + 4 * 4
    assert model.token_counts({}, 4) == [count] * 4 and model.num_anchors == count
    assert tokens.offsets.tolist() == [count * m for m in range(5)]
    for m, smiles in enumerate(SMILES):
        alone = model(features([smiles]), {}).values
        rows = tokens.values[m * count : (m + 1) * count]
        torch.testing.assert_close(alone, rows, rtol=1e-4, atol=1e-5)
    assert make_connector(model.config).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("projector", PROJECTORS)
def test_every_parameter_learns(projector):
    model = connector(projector=projector, sum_tokens=1)
    model(features(), {}).values.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


READ = {"levels": (0, 1, 2, 3), "low": (1,), "high": (3,), "resampler": (3,)}


@pytest.mark.parametrize("projector", PROJECTORS)
def test_each_projector_reads_the_levels_that_it_says(projector):
    model, given = connector(projector=projector), features()
    before = model(given, {}).values
    changed = []
    for i in range(4):
        levels = list(given.levels)
        levels[i] = levels[i].roll(1, 1)
        other = given._replace(values=levels[-1], levels=tuple(levels))
        if not torch.allclose(model(other, {}).values, before, atol=1e-6):
            changed.append(i)
    assert tuple(changed) == READ.get(projector, (0, 1, 2, 3))


def test_sums_count_what_means_cannot():
    given = features(["C=C", "C=C"])
    twice = given._replace(
        offsets=torch.tensor([0, 2, 6]),
        values=torch.cat([given.values, given.values[2:]]),
        levels=tuple(torch.cat([level, level[2:]]) for level in given.levels),
    )
    for sums, equal in ((0, True), (2, False)):
        model = connector(motif_queries=0, sum_tokens=sums)
        first, second = model(twice, {}).values.unflatten(0, (2, -1))
        assert torch.allclose(first, second, atol=1e-5) is equal


def test_what_is_missing_is_named():
    given = features()
    with pytest.raises(ValueError, match="must have 4 levels"):
        connector()(given._replace(levels=None), {})
    with pytest.raises(ValueError, match="must have the motifs of 4 molecules, got none"):
        connector()(given._replace(motifs=None), {})
    with pytest.raises(ValueError, match=r"must have 4 levels .* got 3"):
        connector()(given._replace(levels=given.levels[1:]), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector": "best"}, "projector must be one of"),
        ({"heads": 3}, "width must be a multiple of heads 3"),
        ({"projector": "low", "num_levels": 1}, "num_levels must be at least 2"),
        ({"depth": 0}, "depth must be at least 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        connector(**options)
