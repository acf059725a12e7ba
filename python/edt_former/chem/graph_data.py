"""What can be right in a graph of atoms and bonds that somebody else made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edt_former.chem.features import ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES

_SECOND_ROW = 10  # elements up to neon have no d orbitals to hybridise
_SP3D, _SP3D2 = 3, 4


def check_graph_data(x: np.ndarray, edge_index: np.ndarray, edge_attr: np.ndarray) -> None:
    """Refuses arrays that cannot be a molecule in OGB's features, in both directions of bonds.

    Args:
        x: integers [N, 9], see `edt_former.chem.features`.
        edge_index: integers [2, E], every bond as (i, j) and as (j, i), in any order.
        edge_attr: integers [E, 3], the same for both directions of a bond.

    Raises:
        ValueError: shapes, dtypes or values; it names the argument and the first bad entry.

    >>> x = np.array([[5, 0, 4, 5, 3, 0, 2, 0, 0], [7, 0, 2, 5, 1, 0, 2, 0, 0]])
    >>> check_graph_data(x, np.array([[0, 1], [1, 0]]), np.zeros((2, 3), int))
    >>> check_graph_data(x, np.array([[0], [1]]), np.zeros((1, 3), int))
    Traceback (most recent call last):
    ...
    ValueError: edge_index must hold both directions of every bond, got (0, 1) without (1, 0)
    """
    check_table("x", x, ATOM_FEATURE_SIZES, "atom")
    check_table("edge_attr", edge_attr, BOND_FEATURE_SIZES, "bond")
    _check_numbering(x)
    _check_integers("edge_index", edge_index)
    if edge_index.ndim != 2 or edge_index.shape != (2, len(edge_attr)):
        raise ValueError(
            f"edge_index must have shape [2, E] with E = {len(edge_attr)} rows of edge_attr, "
            f"got {edge_index.shape}"
        )
    bad = (edge_index < 0) | (edge_index >= len(x))
    if bad.any():
        raise ValueError(
            f"edge_index must name atoms from 0 to {len(x) - 1}, got {edge_index[bad][0]}"
        )
    _check_directions(edge_index, edge_attr)


def _check_integers(name: str, array: np.ndarray) -> None:
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got {array.dtype}")


def check_table(name: str, array: np.ndarray, sizes: Sequence[int], row: str) -> None:
    """Refuses an array that is not [n, len(sizes)] of integers from 0 to sizes - 1.

    Args:
        name: of the array, for the error.
        array: one entry per atom or bond.
        sizes: of the tables, one per column.
        row: what an entry is, for the error.

    Raises:
        ValueError: shape, dtype or values; it names the first bad entry.

    >>> check_table("x", np.array([[1, 2], [0, 3]]), (2, 3), "atom")
    Traceback (most recent call last):
    ...
    ValueError: x must hold values from 0 to 2 in column 1, got 3 for atom 1
    """
    if array.ndim != 2 or array.shape[1] != len(sizes):
        raise ValueError(f"{name} must have shape [n, {len(sizes)}], got {array.shape}")
    _check_integers(name, array)
    bad = np.argwhere((array < 0) | (array >= np.array(sizes)))
    if len(bad):
        i, column = bad[0]
        raise ValueError(
            f"{name} must hold values from 0 to {sizes[column] - 1} in column {column}, "
            f"got {array[i, column]} for {row} {i}"
        )


def _check_numbering(x: np.ndarray) -> None:
    """The likeliest mistake has the right shape: features of PyTorch Geometric's own numbering."""
    expanded = (x[:, 6] == _SP3D) | (x[:, 6] == _SP3D2)
    bad = np.flatnonzero((x[:, 0] < _SECOND_ROW) & (x[:, 2] <= 4) & expanded)
    if len(bad):
        raise ValueError(
            f"x must be numbered as OGB does, got element {x[bad[0], 0] + 1} with d orbitals for "
            f"atom {bad[0]}: data of torch_geometric.utils.from_smiles is numbered otherwise "
            "(edt_former.compat.pyg.from_pyg reads it with features='from_smiles')"
        )


def _check_directions(edge_index: np.ndarray, edge_attr: np.ndarray) -> None:
    source, target = edge_index
    loops = np.flatnonzero(source == target)
    if len(loops):
        raise ValueError(f"edge_index must bind two atoms, got atom {source[loops[0]]} with itself")
    there, back = np.lexsort((source, target)), np.lexsort((target, source))
    pairs = edge_index[:, there]
    twice = np.flatnonzero((pairs[:, 1:] == pairs[:, :-1]).all(0))
    if len(twice):
        i, j = pairs[:, twice[0]].tolist()
        raise ValueError(f"edge_index must hold every bond once, got ({i}, {j}) twice")
    if (pairs != edge_index[::-1, back]).any():
        known = set(zip(source.tolist(), target.tolist(), strict=True))
        i, j = min((i, j) for i, j in known if (j, i) not in known)
        raise ValueError(
            f"edge_index must hold both directions of every bond, got ({i}, {j}) without ({j}, {i})"
        )
    differ = np.flatnonzero((edge_attr[there] != edge_attr[back]).any(1))
    if len(differ):
        i, j = pairs[:, differ[0]].tolist()
        raise ValueError(
            f"edge_attr must be the same for both directions of a bond, got {i} and {j} with two"
        )
