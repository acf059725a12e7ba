"""Rows in a loader's processes: no hang after threads of kernels ran, errors name the row."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

import edt_kernels
from edt_former.data import PreparedData
from edt_former.graph import GraphBatch
from edt_former.train.collating import CollateRows

pytest.importorskip("pyarrow", reason="prepared data need pyarrow")
SECONDS = 120
"""Until a loader that hangs is an error."""


def pooled(rows):
    """A batch that runs native kernels where it is made."""
    graph = GraphBatch.pack([row.molecules[0].molecule for row in rows])
    atoms = graph.atom_features.float()
    q = atoms.unsqueeze(1)
    read = edt_kernels.ragged_attention(q, q, q, graph.offsets, graph.offsets)
    return edt_kernels.segment_pool(read.squeeze(1), graph.offsets)


def refusing(rows):
    if any(row.number == 10 for row in rows):
        raise KeyError("charge")
    return len(rows)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_compute_what_the_process_does(prepared_data, start, two_threads):
    data = PreparedData(prepared_data)
    rows = [data[i] for i in range(len(data))]
    here = [pooled(rows[i : i + 8]) for i in range(0, len(rows), 8)]
    loader = DataLoader(
        data,
        8,
        collate_fn=CollateRows(pooled),
        num_workers=2,
        multiprocessing_context=start,
        timeout=SECONDS,
    )
    for batch, wanted in zip(loader, here, strict=True):
        assert torch.equal(batch, wanted)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_names_the_row(prepared_data, workers):
    data = PreparedData(prepared_data)
    loader = DataLoader(
        data,
        16,
        collate_fn=CollateRows(refusing),
        num_workers=workers,
        timeout=SECONDS * bool(workers),
    )
    row = next(row for row in (data[i] for i in range(len(data))) if row.number == 10)
    with pytest.raises(ValueError, match=rf"row 10 \({row.id}\) makes no batch: 'charge'"):
        list(loader)


def test_an_error_of_the_batch_alone_names_all(prepared_data):
    data = PreparedData(prepared_data)

    def single(rows):
        (row,) = rows
        return row

    with pytest.raises(ValueError, match=r"rows 0 \(\d+\), 1 \(\d+\) make no batch: too many"):
        CollateRows(single)([data[0], data[1]])
