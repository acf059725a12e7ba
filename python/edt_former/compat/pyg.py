"""PyTorch Geometric: batches of molecules in and out, and an aggregation on `segment_pool`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

try:
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn.aggr import Aggregation
except ImportError as error:
    raise ImportError(
        "edt_former.compat.pyg needs torch_geometric: pip install 'edt-kernels[pyg]'"
    ) from error

import edt_kernels
from edt_former.chem.features import ATOM_FEATURE_SIZES
from edt_former.chem.graph_data import check_graph_data, check_table
from edt_former.graph.batch import GraphBatch

# OGB's number of every number that torch_geometric.utils.from_smiles gives, column by column.
_ATOM_NUMBERS = (
    (118, *range(118)),  # 0 is a wildcard, which OGB has last
    (0, 1, 2, *[3] * 6),
    tuple(range(11)),
    tuple(range(12)),
    tuple(range(9)),
    tuple(range(5)),
    (5, 5, 0, 1, 2, 3, 4, 5),  # UNSPECIFIED, S, SP, SP2, SP3, SP3D, SP3D2, OTHER
    (0, 1),
    (0, 1),
)
_BOND_NUMBERS = (
    (4, 0, 1, 2, *[4] * 8, 3, *[4] * 9),  # single, double and triple follow UNSPECIFIED; aromatic
    (0, 5, 1, 2, 3, 4),
    (0, 1),
)


class SegmentAggregation(Aggregation):
    """Mean, sum, max or min as an aggregation of PyTorch Geometric, on `edt_kernels.segment_pool`.

    Equal to `MeanAggregation`, `SumAggregation`, `MaxAggregation` and `MinAggregation`, an empty
    group is 0, with sums in the order of the rows: the same bits in every run, for any number of
    threads, and for a molecule alone or in a batch. The gradient of max and min goes to the first
    row that holds the extreme, where theirs is shared among ties.

    Args:
        reduce: "mean", "sum", "max" or "min".

    Raises:
        ValueError: the reduction is unknown; in a call, `dim_size` is too small for `index`, or
            `ptr` is malformed.
        TypeError: in a call, `x` is not of floating point, or `index` is not int64.

    Example:
        >>> import torch
        >>> from edt_former.compat.pyg import SegmentAggregation
        >>> x, index = torch.tensor([[1.0], [5.0], [3.0]]), torch.tensor([0, 2, 0])
        >>> SegmentAggregation("mean")(x, index)
        tensor([[2.],
                [0.],
                [5.]])
        >>> from torch_geometric.nn import SAGEConv
        >>> conv = SAGEConv(1, 4, aggr=SegmentAggregation("max"))
        >>> conv(x, torch.tensor([[0, 1], [1, 2]])).shape
        torch.Size([3, 4])
    """

    def __init__(self, reduce: str = "mean") -> None:
        super().__init__()
        if reduce not in ("mean", "sum", "max", "min"):
            raise ValueError(f"reduce must be 'mean', 'sum', 'max' or 'min', got {reduce!r}")
        self.reduction = reduce

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
        max_num_elements: int | None = None,
    ) -> Tensor:
        """Groups along `dim` of `x` [*, N, *] pooled to [*, dim_size, *].

        Args:
            x: floating point.
            index: [N] int64, the group of every row, in any order.
            ptr: [B + 1], offsets of grouped rows; it goes before `index` where both come.
            dim_size: number of groups; counted where it is not given.
            dim: the dimension of the rows.
            max_num_elements: not needed here; other aggregations of PyTorch Geometric read it.
        """
        rows = x.movedim(dim, 0)
        if ptr is not None:
            pooled = edt_kernels.segment_pool(rows, ptr, reduce=self.reduction)
        else:
            _check_groups(index, dim_size)
            pooled = edt_kernels.pool_by_id(rows, index, dim_size, reduce=self.reduction)
        return pooled.movedim(0, dim)

    def __repr__(self) -> str:
        return f"SegmentAggregation({self.reduction!r})"


def from_pyg(data: Data | Batch, *, features: str = "ogb") -> GraphBatch:
    """The molecules of a `Data` or `Batch`, in the order of its atoms.

    Args:
        data: with `x` [N, 9], `edge_index` [2, E] in both directions and `edge_attr` [E, 3], and,
            for more than one molecule, `ptr` or `batch`. Empty molecules and single atoms are
            legal; `edge_attr` may be missing where there is no bond.
        features: "ogb", the numbers of the Open Graph Benchmark (see `edt_former.chem.features`),
            or "from_smiles", those of `torch_geometric.utils.from_smiles` and of PyTorch
            Geometric's `MoleculeNet`, which are translated.

    Returns:
        A `GraphBatch` on the device of `x`.

    Raises:
        TypeError: `data` lacks `x`, `edge_index` or `edge_attr`.
        ValueError: what cannot be right: widths, values outside the tables, a bond in one direction
            only, of an atom with itself or between two molecules, `ptr` or `batch` that do not fit.

    Example:
        >>> from torch_geometric.data import Batch
        >>> from torch_geometric.utils import from_smiles
        >>> batch = Batch.from_data_list([from_smiles("CO"), from_smiles("[Na+]")])
        >>> graph = from_pyg(batch, features="from_smiles")
        >>> graph.elements.tolist(), graph.offsets.tolist()
        ([6, 8, 11], [0, 2, 3])
    """
    x, edge_index, edge_attr = _arrays(data)
    if features == "from_smiles":
        x = _renumbered("x", x, _ATOM_NUMBERS, "atom")
        edge_attr = _renumbered("edge_attr", edge_attr, _BOND_NUMBERS, "bond")
    elif features != "ogb":
        raise ValueError(f"features must be 'ogb' or 'from_smiles', got {features!r}")
    check_graph_data(x, edge_index, edge_attr)
    offsets = _offsets(data, len(x))
    molecule = np.searchsorted(offsets[1:], edge_index, side="right")
    across = np.flatnonzero(molecule[0] != molecule[1])
    if len(across):
        i, j = edge_index[:, across[0]].tolist()
        raise ValueError(f"edge_index must stay within a molecule, got a bond of {i} and {j}")
    order = np.lexsort(edge_index)
    incoming = np.bincount(edge_index[1], minlength=len(x))
    tensors = GraphBatch(
        atom_features=torch.from_numpy(x.astype(np.int64)),
        bond_index=torch.from_numpy(edge_index[:, order].astype(np.int64)),
        bond_features=torch.from_numpy(edge_attr[order].astype(np.int64)),
        bond_offsets=edt_kernels.offsets_from_lengths(torch.from_numpy(incoming)),
        offsets=torch.from_numpy(offsets),
        elements=torch.from_numpy((x[:, 0].astype(np.int64) + 1) % ATOM_FEATURE_SIZES[0]),
    )
    return tensors.to(data.x.device)


def to_pyg(graph: GraphBatch) -> Batch:
    """The inverse of `from_pyg`: OGB's `x`, `edge_index`, `edge_attr`, with `batch` and `ptr`.

    Args:
        graph: at least one molecule; `Batch` knows no batch without any.

    Raises:
        ValueError: there is no molecule.

    Example:
        >>> from edt_former.chem import read_molecules
        >>> batch = to_pyg(GraphBatch.pack(read_molecules(["CO", "[Na+]"])))
        >>> batch.ptr.tolist(), batch.edge_index.tolist(), batch.get_example(1).num_nodes
        ([0, 2, 3], [[1, 0], [0, 1]], 1)
    """
    if graph.num_molecules == 0:
        raise ValueError("graph must have at least one molecule, got none")
    bounds = graph.offsets.tolist()
    bonds = graph.bond_offsets[graph.offsets].tolist()
    molecules = []
    for m in range(graph.num_molecules):
        atoms, edges = slice(bounds[m], bounds[m + 1]), slice(bonds[m], bonds[m + 1])
        molecules.append(
            Data(
                x=graph.atom_features[atoms],
                edge_index=graph.bond_index[:, edges] - bounds[m],
                edge_attr=graph.bond_features[edges],
            )
        )
    return Batch.from_data_list(molecules)


def _check_groups(index: Tensor, dim_size: int) -> None:
    """What PyTorch Geometric refuses: a group out of range; on a GPU nobody looks."""
    if index.device.type != "cpu" or torch.compiler.is_compiling() or not index.numel():
        return
    low, high = index.aminmax()
    if low < 0 or high >= dim_size:
        raise ValueError(
            f"index must hold groups from 0 to {dim_size - 1}, one less than dim_size, "
            f"got {int(low) if low < 0 else int(high)}"
        )


def _arrays(data: Data | Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`x`, `edge_index` and `edge_attr`."""
    x, edge_index, edge_attr = (
        getattr(data, name, None) for name in ("x", "edge_index", "edge_attr")
    )
    if isinstance(edge_index, Tensor) and edge_index.numel() == 0 and edge_attr is None:
        edge_attr = edge_index.new_zeros(0, 3)
    for name, value in (("x", x), ("edge_index", edge_index), ("edge_attr", edge_attr)):
        if not isinstance(value, Tensor):
            raise TypeError(f"data.{name} must be a tensor, got {type(value).__name__}")
    return tuple(value.detach().cpu().numpy() for value in (x, edge_index, edge_attr))


def _renumbered(
    name: str, array: np.ndarray, numbers: Sequence[Sequence[int]], row: str
) -> np.ndarray:
    """OGB's numbers in place of those of `from_smiles`."""
    check_table(name, array, [len(table) for table in numbers], row)
    columns = zip(array.T, numbers, strict=True)
    return np.stack([np.array(table)[column] for column, table in columns], 1)


def _offsets(data: Data | Batch, atoms: int) -> np.ndarray:
    """Offsets [B + 1] by `ptr`, or by `batch`, or of one molecule."""
    ptr, batch = getattr(data, "ptr", None), getattr(data, "batch", None)
    if ptr is not None:
        offsets = ptr.detach().cpu().numpy().astype(np.int64)
        falls = (np.diff(offsets) < 0).any()
        if falls or offsets[:1].tolist() != [0] or offsets[-1] != atoms:
            raise ValueError(
                f"ptr must rise from 0 to {atoms}, the number of atoms, got {ptr.tolist()}"
            )
        return offsets
    if batch is None:
        return np.array([0, atoms])
    offsets = edt_kernels.offsets_from_batch(batch.detach().cpu()).numpy()
    if offsets[-1] != atoms:
        raise ValueError(f"batch must have one entry for each of {atoms} atoms, got {len(batch)}")
    return offsets
