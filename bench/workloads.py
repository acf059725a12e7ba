"""The workloads of every speed figure: named, seeded, of the sizes of molecules."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import edt_kernels
from edt_former.tokens import pack_patches
from edt_kernels import Patches

HEADS, HEAD_WIDTH = 12, 64
LAYERS, FEED_FORWARD = 12, 3072
ENCODER_WIDTH = 512
ANCHORS = 32
SLOTS = 96
"""Queries that the published program pads every molecule to."""


@dataclass(frozen=True, eq=False)
class Workload:
    """Molecules by their numbers of atoms [B] and of queries [B]."""

    name: str
    atoms: Tensor
    queries: Tensor

    @cached_property
    def atom_offsets(self) -> Tensor:
        """[B + 1]."""
        return edt_kernels.offsets_from_lengths(self.atoms)

    @cached_property
    def query_offsets(self) -> Tensor:
        """[B + 1]."""
        return edt_kernels.offsets_from_lengths(self.queries)

    @cached_property
    def patches(self) -> Patches:
        """A patch for every query that is no anchor, each a run of atoms cut at random."""
        generator = _seeded(2)

        def cut(atoms: int, count: int) -> Tensor:
            opens = torch.zeros(atoms, dtype=torch.long)
            opens[1 + torch.randperm(atoms - 1, generator=generator)[: count - 1]] = 1
            return opens.cumsum(0)

        sizes = zip(self.atoms.tolist(), (self.queries - ANCHORS).tolist(), strict=True)
        found = pack_patches([cut(atoms, count) for atoms, count in sizes])
        return Patches(*(x if x is None else x.to(self.atoms.device) for x in found))

    @cached_property
    def patch_ids(self) -> Tensor:
        """The patch of every atom, counted over the whole batch [N]."""
        first = self.patches.patch_offsets[:-1].repeat_interleave(self.atoms)
        return self.patches.ids + first

    def first(self, count: int) -> Workload:
        """Its first molecules."""
        return Workload(self.name, self.atoms[:count], self.queries[:count])

    def to(self, device: torch.device | str) -> Workload:
        """The same on another device."""
        return Workload(self.name, self.atoms.to(device), self.queries.to(device))


def rows(
    count: int,
    *shape: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normal values [count, *shape], the same numbers in every dtype up to its rounding."""
    draws = _seeded(seed, device)
    return torch.randn(count, *shape, generator=draws, device=device).to(dtype)


def _seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def drug_like(name: str, count: int, size: int = 30) -> Workload:
    """`size` atoms +- 30 % (8 to twice the size), a dynamic query for every 4 of them."""
    draws = torch.randn(max(count, 256), generator=_seeded(0))[:count]
    atoms = (size + 0.3 * size * draws).round().clamp(8, 2 * size).long()
    return Workload(name, atoms, ANCHORS + atoms // 4)


def _large(name: str, count: int) -> Workload:
    """130 +- 15 atoms (at most 150), 70 queries."""
    atoms = (130 + 15 * torch.randn(count, generator=_seeded(0))).round().clamp(8, 150).long()
    return Workload(name, atoms, torch.full_like(atoms, 70))


def _equal(name: str, count: int, atoms: int, queries: int) -> Workload:
    """Molecules of one size."""
    return Workload(name, torch.full((count,), atoms), torch.full((count,), queries))


SMALL = drug_like("C-S", 256)
LARGE = _large("C-L", 64)
TRAIN_48 = drug_like("W-T 48", 48)
TRAIN_4 = drug_like("W-T 4", 4)
WORKLOADS = (SMALL, LARGE, TRAIN_48, TRAIN_4)

MANY_PATCHES = _equal("256 x 120", 256, 120, ANCHORS + 32)
"""What the goals of pooling are about: 30 720 atoms in 8 192 patches, more than caches hold."""

SCREEN_SMALL = _equal("W-S", 4096, 30, ANCHORS + 8)
SCREEN_LARGE = _equal("W-L", 4096, 150, ANCHORS + 38)
"""For a GPU. No molecule needs padding here: what pads is at its best."""
