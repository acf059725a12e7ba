"""From the disk to a packed batch of graphs, per core: prepared rows against featurising SMILES.

The 256 first known drugs of the held-out list. `ogb.utils.smiles2graph` is what published programs
call for every molecule, and every time it comes up.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.contest import Contender, Task, Work
from edt_former.chem import read_as_written, read_molecule
from edt_former.chem.rdkit_log import quiet
from edt_former.graph import GraphBatch
from edt_former.tasks.heldout import heldout_molecules

MOLECULES = 256
OURS, READ, CANONICAL, OGB = "prepared rows", "SMILES read", "SMILES read and canonical", "ogb"


@cache
def smiles() -> list[str]:
    """Canonical, so that all see the atoms in one order."""
    return [read_molecule(s).smiles for _, s in heldout_molecules()[:MOLECULES]]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    pytest.importorskip("pyarrow", reason="prepared data need pyarrow")
    from edt_former.data import PreparedData, prepare

    folder = tmp_path_factory.mktemp("data")
    (folder / "drugs.smi").write_text("\n".join(smiles()) + "\n")
    prepare([folder / "drugs.smi"], folder / "drugs", progress=False)
    return PreparedData(folder / "drugs")


def by_ogb() -> Tensor:
    """Atom features of all molecules; the bonds are made, too."""
    from ogb.utils import smiles2graph

    graphs = [smiles2graph(s) for s in smiles()]
    np.concatenate([graph["edge_index"] for graph in graphs], 1)
    np.concatenate([graph["edge_feat"] for graph in graphs])
    return torch.from_numpy(np.concatenate([graph["node_feat"] for graph in graphs]))


def test_featurising(contest, data):
    torch.set_num_threads(1)

    def prepared() -> Tensor:
        rows = [data[i] for i in range(len(data))]
        return GraphBatch.pack([row.molecules[0].molecule for row in rows]).atom_features

    def read(reader) -> Tensor:
        with quiet():
            return GraphBatch.pack([reader(s) for s in smiles()]).atom_features

    truth = (read(read_as_written).double(),)
    contenders = [
        Contender(OURS, prepared, truth),
        Contender(READ, lambda: read(read_as_written), truth),
        Contender(CANONICAL, lambda: read(read_molecule), truth),
        Contender(OGB, by_ogb, truth, optional=True),
    ]
    size = 8 * truth[0].numel()
    task = Task((torch.zeros(1),), (), truth, 1)
    contest(
        "featurising",
        f"{MOLECULES} drugs",
        task,
        contenders,
        work=Work(size),
        goals={OGB: 4.0},
        budget=3.0,
    )
