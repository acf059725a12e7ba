from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from edt_former.chem import read_molecules
from edt_former.graph import GraphBatch, make_encoder

pytest.importorskip("torch_geometric", reason="torch_geometric is not installed")

from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GINConv, aggr
from torch_geometric.utils import from_smiles

from edt_former.compat.pyg import SegmentAggregation, from_pyg, to_pyg

STOCK = {
    "mean": aggr.MeanAggregation,
    "sum": aggr.SumAggregation,
    "max": aggr.MaxAggregation,
    "min": aggr.MinAggregation,
}
INDEX = {
    "sorted": torch.tensor([0, 0, 1, 3, 3, 3]),
    "unsorted": torch.tensor([3, 0, 1, 3, 0, 3]),
    "one group": torch.zeros(6, dtype=torch.int64),
}
SMILES = [
    "C[C@H](N)C(=O)O",
    "C[C@@H](N)C(=O)O",
    "c1ccc2[nH]ccc2c1",
    "F/C=C/F",
    "F/C=C\\F",
    "N#CC=C(C)[N+](=O)[O-]",
    "[Na+].[Cl-]",
    "[He]",
    "*C",
    "FS(F)(F)(F)(F)F",
    "ClP(Cl)(Cl)(Cl)Cl",
    "[CH2]C",
    "[O-2]",
    "C[Si](C)(C)C",
    "[Fe]",
]


def with_grad(module, x, *args, **options):
    x = x.clone().requires_grad_()
    out = module(x, *args, **options)
    weight = torch.linspace(-1, 2, out.numel(), dtype=x.dtype).view(out.shape)
    return out.detach(), torch.autograd.grad((out * weight).sum(), x)[0]


@pytest.mark.parametrize("reduce", STOCK)
@pytest.mark.parametrize(
    ("shape", "dim"), [((6, 4), -2), ((6, 4), 0), ((2, 6, 3), 1), ((2, 3, 6), -1), ((6,), 0)]
)
@pytest.mark.parametrize("name", INDEX)
@pytest.mark.parametrize("size", [None, 6])
def test_index(reduce, shape, dim, name, size):
    x = torch.randn(shape, dtype=torch.float64)
    options = {"dim_size": size, "dim": dim}
    found = with_grad(SegmentAggregation(reduce), x, INDEX[name], **options)
    expected = with_grad(STOCK[reduce](), x, INDEX[name], **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduce", STOCK)
@pytest.mark.parametrize(("shape", "dim"), [((6, 4), -2), ((6, 4), 0), ((6,), 0)])
def test_ptr(reduce, shape, dim):
    x, ptr = torch.randn(shape, dtype=torch.float64), torch.tensor([0, 2, 2, 5, 6])
    found = with_grad(SegmentAggregation(reduce), x, ptr=ptr, dim=dim)
    expected = with_grad(STOCK[reduce](), x, ptr=ptr, dim=dim)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    both = SegmentAggregation(reduce)(x, torch.tensor([0, 0, 2, 2, 2, 3]), ptr=ptr, dim=dim)
    assert torch.equal(both, found[0])


@pytest.mark.parametrize("reduce", STOCK)
def test_ptr_of_an_inner_dimension(reduce):
    # PyTorch Geometric needs torch-scatter for this.
    x, ptr = torch.randn(2, 6, 3), torch.tensor([0, 2, 2, 5, 6])
    pool = SegmentAggregation(reduce)
    expected = torch.stack([pool(rows, ptr=ptr) for rows in x])
    assert torch.equal(pool(x, ptr=ptr), expected)
    assert torch.equal(pool(x.mT, ptr=ptr, dim=-1), expected.mT)


@pytest.mark.parametrize("reduce", STOCK)
def test_neither_index_nor_ptr_is_one_group(reduce):
    x = torch.randn(6, 4)
    torch.testing.assert_close(SegmentAggregation(reduce)(x), STOCK[reduce]()(x))


def test_nothing_to_aggregate():
    x, none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert SegmentAggregation()(x, none).shape == (0, 4)
    assert SegmentAggregation("max")(x, none, dim_size=3).eq(0).all()


def test_a_group_has_the_same_bits_alone():
    index, x = torch.randint(0, 50, (4000,)).sort().values, torch.randn(4000, 16)
    whole = SegmentAggregation("sum")(x, index, dim_size=50)
    for group in range(0, 50, 7):
        alone = x[index == group]
        own = torch.zeros(len(alone), dtype=torch.int64)
        assert torch.equal(SegmentAggregation("sum")(alone, own, dim_size=1)[0], whole[group])
    shuffled = torch.randperm(4000)
    again = SegmentAggregation("sum")(x[shuffled], index[shuffled], dim_size=50)
    torch.testing.assert_close(again, whole)


def test_inside_a_convolution():
    torch.manual_seed(0)
    x, edges = torch.randn(5, 3), torch.tensor([[0, 1, 2, 3, 4, 0], [1, 0, 3, 2, 0, 4]])
    for reduce, stock in STOCK.items():
        conv = GINConv(torch.nn.Linear(3, 4), aggr=SegmentAggregation(reduce))
        ours = conv(x, edges)
        conv.aggr_module = stock()
        torch.testing.assert_close(ours, conv(x, edges))
    assert repr(SegmentAggregation("max")) == "SegmentAggregation('max')"


def test_errors_of_the_aggregation():
    with pytest.raises(ValueError, match=r"reduce must be 'mean', .* got 'mul'"):
        SegmentAggregation("mul")
    pool, x = SegmentAggregation(), torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"index must hold groups from 0 to 1, .* got 2"):
        pool(x, torch.tensor([0, 2, 1]), dim_size=2)
    with pytest.raises(ValueError, match=r"index must hold groups from 0 to 1, .* got -1"):
        pool(x, torch.tensor([0, -1, 1]), dim_size=2)
    with pytest.raises(ValueError, match="offsets must not decrease"):
        pool(x, ptr=torch.tensor([0, 3, 2]))
    with pytest.raises(TypeError, match="values must be float32"):
        pool(torch.ones(3, 2, dtype=torch.int64), torch.tensor([0, 1, 1]))


def equal(a: GraphBatch, b: GraphBatch) -> None:
    assert a.coordinates is None and b.coordinates is None
    for name, tensor in vars(a).items():
        assert name == "coordinates" or torch.equal(tensor, getattr(b, name)), name


def data(molecule, order=None):
    """OGB's data of a molecule, its bonds in the order of their sources unless one is given."""
    index, features = torch.tensor(molecule.bond_index), torch.tensor(molecule.bond_features)
    order = (index[0] * 1000 + index[1]).argsort() if order is None else order
    x = torch.tensor(molecule.atom_features)
    return Data(x=x, edge_index=index[:, order], edge_attr=features[order])


EMPTY = Data(
    x=torch.zeros(0, 9, dtype=torch.int64),
    edge_index=torch.zeros(2, 0, dtype=torch.int64),
    edge_attr=torch.zeros(0, 3, dtype=torch.int64),
)


@pytest.mark.parametrize("smiles", [SMILES, ["[He]"], ["C"], ["CC"]], ids=len)
def test_there_and_back(smiles):
    expected = GraphBatch.pack(read_molecules(smiles))
    batch = to_pyg(expected)
    assert batch.num_graphs == len(smiles)
    assert torch.equal(batch.ptr, expected.offsets)
    equal(from_pyg(batch), expected)
    for one, molecule in zip(batch.to_data_list(), read_molecules(smiles), strict=True):
        equal(from_pyg(one), GraphBatch.pack([molecule]))
        assert one.edge_attr.shape[1] == 3


def test_a_batch_of_a_loader_with_empty_molecules():
    molecules = read_molecules(SMILES)
    items = [EMPTY, *map(data, molecules), EMPTY, EMPTY]
    batch = next(iter(DataLoader(items, batch_size=len(items))))
    graph = from_pyg(batch)
    expected = GraphBatch.pack(molecules)
    assert graph.offsets.tolist() == [0, *expected.offsets.tolist(), *[graph.num_atoms] * 2]
    graph.offsets = expected.offsets
    equal(graph, expected)
    back = to_pyg(from_pyg(batch))
    assert torch.equal(back.ptr, batch.ptr) and torch.equal(back.batch, batch.batch)


def test_a_batch_vector_in_the_place_of_ptr():
    molecules = read_molecules(SMILES[:4])
    batch = Batch.from_data_list([data(m) for m in molecules])
    plain = SimpleNamespace(**{k: batch[k] for k in ("x", "edge_index", "edge_attr", "batch")})
    equal(from_pyg(plain), GraphBatch.pack(molecules))
    alone = read_molecules(["[He]"])[0]
    equal(
        from_pyg(
            SimpleNamespace(
                x=torch.tensor(alone.atom_features), edge_index=torch.zeros(2, 0, dtype=torch.int64)
            )
        ),
        GraphBatch.pack([alone]),
    )


def test_an_encoder_reads_it():
    encoder = make_encoder({"name": "gin", "layers": 2, "width": 8}).eval()
    molecules = read_molecules(SMILES)
    expected = encoder(GraphBatch.pack(molecules))
    found = encoder(from_pyg(Batch.from_data_list([data(m) for m in molecules])))
    assert torch.equal(found.values, expected.values)


def test_features_of_from_smiles_are_translated():
    batch = Batch.from_data_list([from_smiles(s) for s in SMILES])
    found = from_pyg(batch, features="from_smiles")
    molecules = read_molecules(SMILES)
    start = 0
    for m, molecule in enumerate(molecules):
        rows = found.offsets[m] + torch.tensor(molecule.order)
        expected = torch.tensor(molecule.atom_features)
        assert torch.equal(found.offsets[m : m + 2], torch.tensor([start, start + len(rows)]))
        # Whether a centre is written @ or @@ depends on the order of atoms, which differs here.
        keep = [0, 2, 3, 4, 5, 6, 7, 8]
        assert torch.equal(found.atom_features[rows][:, keep], expected[:, keep]), molecule.smiles
        assert torch.equal(found.atom_features[rows][:, 1] > 0, expected[:, 1] > 0)
        start += len(rows)
    totals = GraphBatch.pack(molecules).bond_features
    for column in range(3):
        ours = torch.bincount(found.bond_features[:, column], minlength=6)
        assert torch.equal(ours, torch.bincount(totals[:, column], minlength=6)), column


@pytest.mark.parametrize("smiles", ["CCO", "C=O", "c1ccccc1"])
def test_features_of_from_smiles_are_not_taken_for_ogbs(smiles):
    with pytest.raises(ValueError, match=r"numbered as OGB does.*features='from_smiles'|edge_attr"):
        from_pyg(from_smiles(smiles))


def changed(**fields):
    batch = Batch.from_data_list([data(m) for m in read_molecules(["CC", "CO"])])
    for name, function in fields.items():
        batch[name] = function(batch[name])
    return batch


@pytest.mark.parametrize(
    ("batch", "options", "error", "message"),
    [
        (changed(x=lambda x: x.float()), {}, ValueError, "x must hold integers, got float32"),
        (changed(x=lambda x: x[:, :7]), {}, ValueError, r"x must have shape \[n, 9\]"),
        (changed(x=lambda x: x.tolist()), {}, TypeError, "data.x must be a tensor, got list"),
        (changed(edge_attr=lambda x: None), {}, TypeError, "edge_attr must be .*, got NoneType"),
        (
            changed(edge_index=lambda i: i[:, ::2], edge_attr=lambda x: x[::2]),
            {},
            ValueError,
            r"both directions of every bond, got",
        ),
        (
            changed(edge_index=lambda i: torch.tensor([[0, 2, 1, 3], [2, 0, 3, 1]])),
            {},
            ValueError,
            "must stay within a molecule, got a bond of 0 and 2",
        ),
        (
            changed(ptr=lambda p: torch.tensor([0, 2, 3])),
            {},
            ValueError,
            r"ptr must rise from 0 to 4, the number of atoms, got \[0, 2, 3\]",
        ),
        (changed(ptr=lambda p: torch.tensor([0, 5, 4])), {}, ValueError, "ptr must rise"),
        (
            changed(ptr=lambda p: None, batch=lambda b: b[:3]),
            {},
            ValueError,
            "batch must have one entry for each of 4 atoms, got 3",
        ),
        (changed(), {"features": "own"}, ValueError, "must be 'ogb' or 'from_smiles', got 'own'"),
        (
            changed(x=lambda x: x + 8),
            {"features": "from_smiles"},
            ValueError,
            "x must hold values from 0 to 10 in column 2, got 12 for atom 0",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(batch, options, error, message):
    with pytest.raises(error, match=message):
        from_pyg(batch, **options)


def test_no_molecules_are_no_batch():
    with pytest.raises(ValueError, match="at least one molecule, got none"):
        to_pyg(GraphBatch.pack([]))
