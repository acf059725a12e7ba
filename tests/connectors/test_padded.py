"""The padded connector computes what the ragged one does: it differs in time only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edt_former.connectors import make_connector
from edt_former.connectors.padded import padded_read
from edt_former.graph import GraphFeatures
from edt_former.tokens import pack_patches

SIZE = {"llm_width": 8, "encoder_width": 12, "width": 16, "layers": 3, "heads": 2, "ffn": 32}
CONNECTORS = {
    "edt_former": {"name": "edt_former", "num_queries": 3},
    "edt_former every second layer": {
        "name": "edt_former",
        "num_queries": 1,
        "cross_attention_freq": 2,
    },
    "qformer": {"name": "qformer", "num_queries": 5},
    "qformer with sums": {"name": "qformer", "num_queries": 5, "sum_tokens": 2},
}


@pytest.fixture
def batch():
    lengths = [4, 1, 7]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    features = GraphFeatures(torch.randn(12, 12, generator=generator), offsets)
    return features, {"entropy": pack_patches([[0, 0, 1, 2], [0], [0, 1, 2, 3, 4, 5, 5]])}


@pytest.mark.parametrize("config", CONNECTORS.values(), ids=CONNECTORS)
@pytest.mark.parametrize("slots", [None, 13])
@torch.no_grad()
def test_padding_changes_no_number(batch, config, slots):
    torch.manual_seed(0)
    connector = make_connector({**SIZE, **config}).eval()
    queries, keys = connector.queries(*batch), connector.keys(batch[0])
    padded = padded_read(connector, queries, keys, slots=slots)
    lengths = queries.offsets.diff()
    assert padded.shape == (3, slots or int(lengths.max()), 16)
    real = torch.arange(padded.shape[1]) < lengths[:, None]
    torch.testing.assert_close(padded[real], connector.read(*batch).values, rtol=0, atol=1e-5)


@torch.no_grad()
def test_what_is_padded_is_not_read(batch):
    connector = make_connector({**SIZE, **CONNECTORS["edt_former"]}).eval()
    queries, keys = connector.queries(*batch), connector.keys(batch[0])
    few, many = (padded_read(connector, queries, keys, slots=slots) for slots in (9, 20))
    torch.testing.assert_close(few[2], many[2, :9], rtol=0, atol=1e-5)


def test_too_few_slots_are_refused(batch):
    connector = make_connector({**SIZE, **CONNECTORS["edt_former"]})
    queries, keys = connector.queries(*batch), connector.keys(batch[0])
    with pytest.raises(ValueError, match=r"slots must be at least 9, .*got 8"):
        padded_read(connector, queries, keys, slots=8)


@torch.no_grad()
def test_attention_has_a_mask_only_where_something_is_padded(batch, monkeypatch):
    masks = []
    attend = F.scaled_dot_product_attention

    def watched(*args, attn_mask=None):
        masks.append(None if attn_mask is None else tuple(attn_mask.shape))
        return attend(*args, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    connector = make_connector({**SIZE, **CONNECTORS["qformer"], "layers": 1}).eval()
    padded_read(connector, connector.queries(*batch), connector.keys(batch[0]), slots=5)
    assert masks == [None, (3, 1, 1, 8)]  # queries to queries, queries to keys
