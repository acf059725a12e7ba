"""Patches: which atoms share a dynamic query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from edt_former.tokens.controls import CONTROLS
from edt_kernels import Patches, find_patches, offsets_from_lengths

SOURCES = ("brics", "entropy")
"""Where patches come from, in the order in which their queries stand."""

ENTROPY_SOURCES = ("next_atom", "surprisal", "node")
CUTTING = ("rule", "q", "threshold", "min_size", "max_size", "max_patches")


@dataclass(frozen=True)
class PatchOptions:
    """Which patches a connector reads, and how they are cut.

    Args:
        sources: of "brics" and "entropy", any subset; always kept in this order.
        rule: of `edt_kernels.find_patches`, as are `q`, `threshold`, `min_size`, `max_size` and
            `max_patches`; they cut by entropy.
        entropy_source: what they read: "next_atom", the entropy of the predictor's distribution
            over the next atom; "surprisal", -ln p of the atom that is there; or "node", the
            entropy of the elements within two bonds, which needs no predictor.
        tokens: patches of a molecule that entropy is to give: patches are cut on, those with most
            entropy most (`edt_former.tokens.finer`). None leaves them as the rule cuts them.
        control: "random" or "shuffled" patches in the place of those of the sources, see
            `edt_former.tokens.controls`.
        control_seed: of the control.
        connected: every patch that is no connected piece of the molecule is cut into such pieces,
            which follow their first atoms.

    Raises:
        ValueError: an unknown source or control, options that `find_patches` refuses, or that do
            not go together.

    Example:
        >>> PatchOptions(sources=("entropy", "brics")).sources
        ('brics', 'entropy')
    """

    sources: tuple[str, ...] = ("entropy",)
    rule: str = "local_max"
    q: float = 0.75
    threshold: float | None = None
    min_size: int = 1
    max_size: int | None = None
    max_patches: int | None = None
    entropy_source: str = "next_atom"
    tokens: int | None = None
    control: str | None = None
    control_seed: int = 0
    connected: bool = False

    def __post_init__(self) -> None:
        unknown = [source for source in self.sources if source not in SOURCES]
        if isinstance(self.sources, str) or unknown:
            raise ValueError(
                f"sources must be a subset of {', '.join(map(repr, SOURCES))}, got {self.sources!r}"
            )
        ordered = tuple(source for source in SOURCES if source in self.sources)
        object.__setattr__(self, "sources", ordered)
        find_patches(torch.zeros(0), torch.zeros(1, dtype=torch.int64), **self.cutting())
        _choice("entropy_source", self.entropy_source, ENTROPY_SOURCES)
        _choice("control", self.control, (None, *CONTROLS))
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if not 0 <= self.control_seed < 2**63:
            raise ValueError(f"control_seed must be from 0 to 2**63 - 1, got {self.control_seed}")
        if self.rule == "published" and self.entropy_source != "next_atom":
            raise ValueError(
                "rule 'published' reads what comes after an atom, entropy_source 'next_atom'; "
                f"got {self.entropy_source!r}"
            )

    def cutting(self) -> dict[str, object]:
        """The options that `edt_kernels.find_patches` and `entropy_patches` take."""
        return {name: getattr(self, name) for name in CUTTING}

    @property
    def needs_predictor(self) -> bool:
        """Patches come from a next-atom predictor."""
        return "entropy" in self.sources and self.entropy_source != "node"


def _choice(name: str, value: object, known: tuple) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def pack_patches(ids: Sequence[Sequence[int] | Tensor]) -> Patches:
    """Patches from one id per atom, molecule by molecule.

    Atoms of a molecule with one id are one patch, wherever they stand; patches follow ascending
    ids. The result has `order` only where some patch is no contiguous run in place.

    Args:
        ids: per molecule, the patch id of every atom: any integers, in any order, maybe none.

    Example:
        >>> patches = pack_patches([[0, 1, 1, 0], [], [7]])
        >>> patches.order.tolist(), patches.atom_offsets.tolist(), patches.patch_offsets.tolist()
        ([0, 3, 1, 2, 4], [0, 2, 4, 5], [0, 2, 2, 3])
    """
    lengths = torch.tensor([len(molecule) for molecule in ids], dtype=torch.int64)
    molecule = torch.arange(len(ids)).repeat_interleave(lengths)
    labels = torch.cat([torch.as_tensor(x, dtype=torch.int64) for x in ids] or [lengths])
    ranks = labels.unique(return_inverse=True)[1]
    pairs, patch, sizes = (molecule * len(labels) + ranks).unique(
        return_inverse=True, return_counts=True
    )
    count = torch.bincount(pairs // max(len(labels), 1), minlength=len(ids))
    patch_offsets = offsets_from_lengths(count)
    return Patches(
        ids=patch - patch_offsets[molecule],
        atom_offsets=offsets_from_lengths(sizes),
        patch_offsets=patch_offsets,
        count=patch_offsets[-1],
        order=None if bool((patch.diff() >= 0).all()) else patch.argsort(stable=True),
        threshold=torch.full((len(ids),), torch.nan),
    )


def unpack_patches(patches: Patches, offsets: Tensor) -> list[list[int]]:
    """The patch ids of every molecule's atoms, from 0 in each; `offsets` [B + 1] of the atoms.

    Example:
        >>> import torch
        >>> unpack_patches(pack_patches([[3, 5, 3], [], [7]]), torch.tensor([0, 3, 3, 4]))
        [[0, 1, 0], [], [0]]
    """
    ids, bounds = patches.ids.tolist(), offsets.tolist()
    return [ids[start:stop] for start, stop in pairwise(bounds)]
