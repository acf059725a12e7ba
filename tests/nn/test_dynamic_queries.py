from __future__ import annotations

import pytest
import torch

from edt_former.connectors import make_connector
from edt_former.graph import GraphFeatures
from edt_former.tokens import pack_patches
from edt_kernels import Patches, find_patches, ragged_split
from edt_kernels.nn import DynamicQueries
from edt_kernels.testing import ragged

IDS = [[0, 0, 1, 0], [], [4], [1, 0, 1]]  # patches that are no contiguous runs


def by_hand(module, values, ids):
    """Molecule by molecule, patch by patch."""
    rows, start = [], 0
    for molecule in ids:
        rows.append(module.anchors)
        for patch in sorted(set(molecule)):
            atoms = [start + i for i, own in enumerate(molecule) if own == patch]
            rows.append(module.project(values[atoms].mean(0, keepdim=True)))
        start += len(molecule)
    return torch.cat(rows)


def test_values_offsets_and_gradients():
    module = DynamicQueries(3, 6, 4, dtype=torch.float64)
    values, _ = ragged([len(x) for x in IDS], 4, dtype=torch.float64)
    found, expected = [], []
    for run, result in (
        (lambda x: module(x, pack_patches(IDS))[0], found),
        (lambda x: by_hand(module, x, IDS), expected),
    ):
        x = values.clone().requires_grad_()
        out = run(x)
        weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        result += [out, *torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert module(values, pack_patches(IDS))[1].tolist() == [0, 5, 8, 12, 17]


def test_at_capacity_and_trimmed():
    module = DynamicQueries(2, 6, 4, reduce="max", dtype=torch.float64)
    values, offsets = ragged((7, 0, 1, 9), 4, tail=2, dtype=torch.float64)
    values[-2:] = torch.nan
    patches = find_patches(values[:, 0].contiguous(), offsets)
    trimmed, cut = module(values, patches.trim())
    full, full_cut = module(values, patches)
    assert torch.equal(cut, full_cut) and len(trimmed) == cut[-1] < len(full)
    assert torch.equal(full[: len(trimmed)], trimmed)
    assert (full[len(trimmed) :] == 0).all()
    assert all(torch.equal(x[:2], module.anchors) for x in ragged_split(trimmed, cut))


def test_they_are_the_queries_of_the_connector():
    size = {"width": 8, "layers": 1, "heads": 2, "ffn": 8, "num_queries": 3, "encoder_width": 4}
    connector = make_connector({"name": "edt_former", "llm_width": 4, **size})
    module = DynamicQueries(3, 8, 4)
    state = {
        "anchors": connector.query_tokens[0],
        "project.weight": connector.local_q_proj.weight,
        "project.bias": connector.local_q_proj.bias,
    }
    module.load_state_dict(state)
    values, offsets = ragged([len(x) for x in IDS], 4)
    patches = pack_patches(IDS)
    expected = connector.queries(GraphFeatures(values, offsets), {"entropy": patches})
    found, cut = module(connector.ln_graph(values), patches)
    torch.testing.assert_close(found, expected.values)
    assert torch.equal(cut, expected.offsets)


def test_compiles():
    module = DynamicQueries(2, 6, 4)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(values, offsets):
        return module(values, find_patches(values[:, 0].contiguous(), offsets))

    for lengths in ((7, 0, 3), (4, 9, 1, 2)):
        values, offsets = ragged(lengths, 4)
        found, cut = compiled(values, offsets)
        found.sum().backward()
        expected = module(values, find_patches(values[:, 0].contiguous(), offsets))
        torch.testing.assert_close((found, cut), expected)


def test_bfloat16():
    module = DynamicQueries(2, 6, 4, dtype=torch.bfloat16)
    values, _ = ragged([len(x) for x in IDS], 4, dtype=torch.bfloat16)
    found, _ = module(values, pack_patches(IDS))
    expected, _ = module.double()(values.double(), pack_patches(IDS))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=1e-3)


def test_errors_are_those_of_the_ops():
    module = DynamicQueries(2, 6, 4)
    broken = pack_patches(IDS)._replace(atom_offsets=torch.tensor([0, 9, 3]))
    assert isinstance(broken, Patches)
    with pytest.raises(ValueError, match="offsets must not decrease"):
        module(torch.zeros(8, 4), broken)
