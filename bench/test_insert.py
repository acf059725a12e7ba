"""Molecule tokens between the rows of packed text against torch.cat and index_copy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import edt_kernels
from bench.contest import OURS, Task
from bench.workloads import rows

ROWS, TEXT, WIDTH = 32, 88, 2048
BEFORE = 20  # text tokens before the molecule

pytestmark = pytest.mark.skipif(
    not hasattr(edt_kernels, "insert"), reason="this version has no insert"
)


def test_insert(contest, workload, dtype, backward):
    """One molecule per row of text. Ours also returns offsets and positions."""
    workload = workload.first(ROWS)
    molecules, token_offsets = len(workload.queries), workload.query_offsets
    counts = workload.queries.tolist()
    embed_offsets = TEXT * torch.arange(molecules + 1)
    at = embed_offsets[:-1] + BEFORE
    inputs = [
        rows(molecules * TEXT, WIDTH, dtype=dtype),
        rows(int(token_offsets[-1]), WIDTH, dtype=dtype, seed=2),
    ]

    def by_cat(embeds: Tensor, tokens: Tensor) -> Tensor:
        text = embeds.split([BEFORE, TEXT - BEFORE] * molecules)
        parts = zip(text[::2], tokens.split(counts), text[1::2], strict=True)
        return torch.cat([part for row in parts for part in row])

    # The peers get every row's place for nothing.
    first_token = molecules * TEXT
    source = by_cat(torch.arange(first_token), first_token + torch.arange(len(inputs[1])))
    from_text = (source < first_token).nonzero().squeeze(1)
    from_tokens = (source >= first_token).nonzero().squeeze(1)

    def by_index_copy(embeds: Tensor, tokens: Tensor) -> Tensor:
        out = embeds.new_zeros(len(source), WIDTH).index_copy_(0, from_text, embeds)
        return out.index_copy_(0, from_tokens, tokens)

    def by_gather(embeds: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat([embeds, tokens]).index_select(0, source)

    def ours(embeds: Tensor, tokens: Tensor) -> Tensor:
        return edt_kernels.insert(embeds, embed_offsets, tokens, token_offsets, at).embeds

    task = Task.of(by_cat, inputs, backward=backward)
    contest(
        "insert",
        workload.name,
        task,
        [
            task.contender(OURS, ours),
            task.contender("cat of parts", by_cat),
            task.contender("index_copy", by_index_copy),
            task.contender("cat, index_select", by_gather),
        ],
        work=task.work(reread=False),
    )
