"""Questions about graphs that are no molecules: how many nodes, which degree, is it connected."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edt_former.graph.plain import Graph, read_graph

MOST = 12
"""Nodes of a random graph, at most."""

QUESTIONS = {
    "nodes": "how many nodes does the graph have?",
    "degree": "what is the largest degree of a node?",
    "connected": "is the graph connected?",
}
"""What can be asked, by its short name."""


def random_graphs(count: int, *, seed: int = 0) -> list[Graph]:
    """Random graphs of 3 to `MOST` nodes, about half of them connected, all nodes alike.

    Every pair of nodes is an edge with a probability of its graph's own, drawn around the threshold
    of connectivity, ln n / n (Erdős and Rényi 1960).

    >>> [graph.num_atoms for graph in random_graphs(3)]
    [11, 8, 12]
    """
    return [_random_graph(np.random.default_rng((seed, index))) for index in range(count)]


def graph_answers(graph: Graph) -> dict[str, str]:
    """The true answer to each of `QUESTIONS`, by its short name.

    >>> from types import SimpleNamespace
    >>> path = SimpleNamespace(num_nodes=3, edge_index=[[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> graph_answers(read_graph(path))
    {'nodes': '3', 'degree': '2', 'connected': 'yes'}
    """
    degrees = np.bincount(graph.bond_index[1], minlength=graph.num_atoms)
    return {
        "nodes": str(graph.num_atoms),
        "degree": str(degrees.max(initial=0)),
        "connected": "yes" if _connected(graph) else "no",
    }


def questions(graphs: list[Graph]) -> Iterator[tuple[Graph, str, str]]:
    """(graph, question, answer) of every question about every graph.

    >>> [answer for _, _, answer in questions(random_graphs(1))]
    ['11', '5', 'no']
    """
    for graph in graphs:
        answers = graph_answers(graph)
        yield from ((graph, text, answers[name]) for name, text in QUESTIONS.items())


def _random_graph(rng: np.random.Generator) -> Graph:
    count = int(rng.integers(3, MOST + 1))
    share = min(1.0, rng.uniform(0.6, 1.8) * np.log(count) / count)
    pairs = np.argwhere(np.triu(rng.random((count, count)) < share, 1)).T
    edges = np.concatenate([pairs, pairs[::-1]], 1)
    return read_graph(_Data(count, edges))


class _Data:
    def __init__(self, num_nodes: int, edge_index: np.ndarray) -> None:
        self.num_nodes, self.edge_index = num_nodes, edge_index


def _connected(graph: Graph) -> bool:
    reached = np.zeros(graph.num_atoms, dtype=bool)
    reached[:1] = True
    source, target = graph.bond_index
    for _ in range(graph.num_atoms):
        reached[target[reached[source]]] = True
    return bool(reached.all())
