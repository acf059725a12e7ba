"""From logits and atom features to a prompt with molecule tokens: what a CUDA graph holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import edt_kernels
from bench.workloads import rows
from edt_former.connectors import EDTFormer
from edt_former.graph.encoder import GraphFeatures

VOCABULARY, ENCODER_WIDTH, PROMPT_WIDTH, ANCHORS, BEFORE = 38, 64, 96, 8, 3


class Batch(NamedTuple):
    """Molecules at a capacity: rows beyond the last offset are tail."""

    logits: Tensor  # [N, V], row i predicts atom i
    atoms: Tensor  # [N, width]
    offsets: Tensor  # [B + 1]
    prompt: Tensor  # [B, S, E]

    @classmethod
    def of(
        cls, lengths: Sequence[int], capacity: int, device: torch.device, dtype: torch.dtype
    ) -> Batch:
        """Random numbers, NaN in the tail."""
        seed, used = sum(lengths), sum(lengths)
        logits = rows(capacity, VOCABULARY, dtype=dtype, seed=seed)
        atoms = rows(capacity, ENCODER_WIDTH, dtype=dtype, seed=seed + 1)
        logits[used:], atoms[used:] = torch.nan, torch.nan
        offsets = edt_kernels.offsets_from_lengths(torch.tensor(lengths))
        slots = BEFORE + ANCHORS + capacity // 2 + 2
        prompt = rows(len(lengths), slots, PROMPT_WIDTH, dtype=dtype, seed=seed + 2)
        return cls(*(x.to(device) for x in (logits, atoms, offsets, prompt)))


class Pipeline(nn.Module):
    """Entropy -> patches -> pool -> connector -> splice."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        size = {"width": 64, "layers": layers, "heads": 4, "ffn": 128, "dropout": 0.0}
        widths = {"encoder_width": ENCODER_WIDTH, "llm_width": PROMPT_WIDTH}
        self.connector = EDTFormer({**size, **widths, "num_queries": ANCHORS})

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The prompt with the molecules' tokens, the offsets of these, and patch ids."""
        _, patches = edt_kernels.entropy_patches(batch.logits, batch.offsets)
        features = GraphFeatures(batch.atoms, batch.offsets)
        tokens = self.connector(features, {"entropy": patches})
        place = torch.arange(batch.prompt.shape[1], device=batch.prompt.device)
        count = tokens.offsets.diff().unsqueeze(1)
        slots = (place >= BEFORE) & (place < BEFORE + count)
        prompt = edt_kernels.splice(batch.prompt, tokens.values, tokens.offsets, slots)
        return prompt, tokens.offsets, patches.ids
