"""What patches are like over many molecules: how many, how large, how often in one piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise

import numpy as np
import torch

from edt_former.chem import Invalid, Molecule, read_molecule
from edt_former.graph import GraphBatch
from edt_former.graph.batch import owners
from edt_former.report.agreement import adjusted_rand, mutual_information
from edt_former.tokens import NextAtomPredictor, PatchOptions, connected_patches, cut_molecules

CUTS = {
    "brics": PatchOptions(sources=("brics",)),
    "entropy, local_max": PatchOptions(),
    "entropy, rising_edge": PatchOptions(rule="rising_edge"),
}
"""The cuts that are compared unless others are given."""

MEASURES = (
    *("patches", "median", "most", "atoms per patch", "of one atom", "connected"),
    *("ARI with brics", "NMI with brics"),
)


@dataclass
class CutStats:
    """One way to cut, over the molecules so far.

    Attributes:
        sizes: atoms of every patch.
        counts: patches of every molecule.
        connected: how many patches are one piece.
        rand, information: agreement with BRICS fragments, of every molecule.
    """

    sizes: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    connected: int = 0
    rand: list[float] = field(default_factory=list)
    information: list[float] = field(default_factory=list)

    def measures(self) -> dict[str, float]:
        """The `MEASURES`: means over molecules, or over patches where they speak of patches."""
        sizes, counts = np.array(self.sizes), np.array(self.counts)
        values = (
            *(counts.mean(), np.median(counts), counts.max(), sizes.mean()),
            *((sizes == 1).mean(), self.connected / len(sizes)),
            *(np.mean(self.rand), np.mean(self.information)),
        )
        return dict(zip(MEASURES, map(float, values), strict=True))


@dataclass
class PatchStats:
    """Every way to cut, and the rows that could not be read, by reason."""

    cuts: dict[str, CutStats]
    molecules: int = 0
    atoms: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, object]:
        """Plain numbers, for a file."""
        return {
            "molecules": self.molecules,
            "atoms": self.atoms,
            "not read": dict(self.reasons),
            "cuts": {name: cut.measures() for name, cut in self.cuts.items()},
        }


def patch_stats(
    rows: Iterable[tuple[str, str]],
    predictor: NextAtomPredictor,
    cuts: Mapping[str, PatchOptions] | None = None,
    *,
    unit: str = "nats",
    chunk: int = 256,
) -> PatchStats:
    """Cut the molecule of each (name, SMILES) in every way; `chunk` of them at a time.

    Args:
        rows: for instance `edt_former.chem.read_file(path)`.
        predictor: gives the entropies.
        cuts: `PatchOptions` of one source each, by name; `CUTS` by default.
        unit: of their thresholds, "nats" or "bits".

    Raises:
        ValueError: no row has a molecule that can be read.

    Example:
        >>> from edt_former import shipped
        >>> rows = [("ether", "CCOCC"), ("broken", "C1CC")]
        >>> stats = patch_stats(rows, shipped.predictor())
        >>> stats.molecules, stats.cuts["entropy, local_max"].measures()["patches"], stats.reasons
        (1, 3.0, Counter({'unclosed ring': 1}))
    """
    cuts = dict(cuts or CUTS)
    stats = PatchStats({name: CutStats() for name in cuts})
    rows = iter(rows)
    while block := list(islice(rows, chunk)):
        read = [read_molecule(smiles) for _, smiles in block]
        stats.reasons.update(item.reason for item in read if isinstance(item, Invalid))
        molecules = [item for item in read if isinstance(item, Molecule)]
        if molecules:
            _add(stats, molecules, cuts, predictor, unit)
    if stats.molecules == 0:
        reason = next(iter(stats.reasons), "there is no row")
        raise ValueError(f"no valid molecule in {sum(stats.reasons.values())} rows: {reason}")
    return stats


@torch.no_grad()
def _add(
    stats: PatchStats,
    molecules: list[Molecule],
    cuts: Mapping[str, PatchOptions],
    predictor: NextAtomPredictor,
    unit: str,
) -> None:
    graph = GraphBatch.pack(molecules)
    stats.molecules += len(molecules)
    stats.atoms += graph.num_atoms
    molecule = owners(graph.offsets, graph.num_atoms)
    brics = CUTS["brics"]
    fragments = cut_molecules("brics", molecules, graph, brics, None)
    for name, options in cuts.items():
        cut, (source,) = stats.cuts[name], options.sources
        found = fragments
        if options != brics:
            found = cut_molecules(source, molecules, graph, options, predictor, unit=unit)
        cut.counts += found.patch_offsets.diff().tolist()
        cut.sizes += found.atom_offsets.diff().tolist()
        apart = found.ids + found.patch_offsets[molecule]
        cut.connected += int(connected_patches(apart, graph.bond_index).sum())
        for start, stop in pairwise(graph.offsets.tolist()):
            mine, theirs = (ids[start:stop].numpy() for ids in (found.ids, fragments.ids))
            cut.rand.append(adjusted_rand(mine, theirs))
            cut.information.append(mutual_information(mine, theirs))
