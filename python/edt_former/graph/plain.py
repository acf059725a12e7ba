"""Graphs that are no molecules: nodes and edges with features, and no chemistry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph as arrays, under the names that molecules have.

    Attributes:
        atom_features: int64 [n, F], of the nodes.
        bond_index: int64 [2, E], row 0 the source and row 1 the target, sorted by target.
        bond_features: int64 [E, G], of the edges.
        smiles: nothing, as of a molecule without one.
    """

    atom_features: np.ndarray
    bond_index: np.ndarray
    bond_features: np.ndarray
    smiles: str = ""

    @property
    def num_atoms(self) -> int:
        """Number of nodes n."""
        return len(self.atom_features)

    @property
    def elements(self) -> np.ndarray:
        """0 for every node [n]."""
        return np.zeros(self.num_atoms, dtype=np.int64)


def read_graph(data: Any) -> Graph:
    """A graph from data in the manner of PyTorch Geometric, or a `Graph` as it is.

    Args:
        data: with `edge_index` [2, E], integers, an edge in both directions where both nodes shall
            hear of it; `x` [n, F], integers, entries of the graph encoder's tables; `edge_attr`
            [E, G] likewise. Without `x` there are `num_nodes` nodes with the feature 0, without
            `edge_attr` edges with the feature 0.

    Raises:
        TypeError: there is no `edge_index`.
        ValueError: shapes, dtypes, negative features, or nodes that are not there.

    >>> from types import SimpleNamespace
    >>> path = SimpleNamespace(num_nodes=3, edge_index=[[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> graph = read_graph(path)
    >>> graph.num_atoms, graph.bond_index.tolist(), graph.bond_features.shape
    (3, [[1, 0, 2, 1], [0, 1, 1, 2]], (4, 1))
    """
    if isinstance(data, Graph):
        return data
    edges = getattr(data, "edge_index", None)
    if edges is None:
        raise TypeError(
            f"a graph must have edge_index, as PyTorch Geometric's Data, got {type(data).__name__}"
        )
    edges = np.asarray(edges)
    if edges.ndim != 2 or len(edges) != 2:
        raise ValueError(f"edge_index must have shape [2, E], got {list(edges.shape)}")
    count = edges.shape[1]
    nodes = getattr(data, "x", None)
    if nodes is None:
        nodes = np.zeros((int(data.num_nodes), 1), dtype=np.int64)
    attributes = getattr(data, "edge_attr", None)
    if attributes is None:
        attributes = np.zeros((count, 1), dtype=np.int64)
    nodes = _table("x", nodes)
    attributes = _table("edge_attr", attributes)
    if len(attributes) != count:
        raise ValueError(f"edge_attr must have a row per edge, {count}, got {len(attributes)}")
    if count and not np.issubdtype(edges.dtype, np.integer):
        raise ValueError(f"edge_index must hold integers, got {edges.dtype}")
    if count and not 0 <= edges.min() <= edges.max() < len(nodes):
        raise ValueError(
            f"edge_index must name nodes from 0 to {len(nodes) - 1}, "
            f"got {int(edges.min())} to {int(edges.max())}"
        )
    order = np.lexsort(edges)
    return Graph(nodes, edges[:, order].astype(np.int64), attributes[order])


def _table(name: str, values: Any) -> np.ndarray:
    table = np.asarray(values)
    if table.ndim != 2:
        raise ValueError(f"{name} must have two dimensions, got {list(table.shape)}")
    if table.size and not np.issubdtype(table.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, got {table.dtype}")
    if table.size and table.min() < 0:
        raise ValueError(f"{name} must not be negative, got {int(table.min())}")
    return table.astype(np.int64)
