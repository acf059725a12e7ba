"""Molecules into patches: by entropy or fragments, and what is asked for beyond that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edt_former.graph.batch import GraphBatch, owners
from edt_former.tokens.connected import split_components
from edt_former.tokens.controls import control_patches
from edt_former.tokens.finer import finer_patches
from edt_former.tokens.node_entropy import node_entropies
from edt_former.tokens.patches import PatchOptions, pack_patches
from edt_former.tokens.predictor import NextAtomPredictor
from edt_kernels import Patches, find_patches

if TYPE_CHECKING:
    from edt_former.chem import Molecule

PER_UNIT = {"nats": 1.0, "bits": 1 / math.log(2)}


def cut_molecules(
    source: str,
    molecules: Sequence[Molecule],
    graph: GraphBatch,
    options: PatchOptions,
    predictor: NextAtomPredictor | None,
    *,
    unit: str = "nats",
) -> Patches:
    """The patches of molecules by one source, exactly as many as there are.

    The source cuts first, then `options.tokens`, `options.control` and `options.connected`.

    Args:
        source: "brics" or "entropy".
        molecules: the B molecules of `graph`.
        graph: on the predictor's device.
        options: `sources` is not read.
        predictor: where `options` need one.
        unit: of `options.threshold`, "nats" or "bits".

    Raises:
        ValueError: fragments of a molecule whose SMILES is not known.

    Example:
        >>> from edt_former.chem import read_molecules
        >>> molecules = read_molecules(["OCCO", "C"])
        >>> graph, options = GraphBatch.pack(molecules), PatchOptions(entropy_source="node")
        >>> cut_molecules("entropy", molecules, graph, options, None).ids
        tensor([0, 1, 1, 1, 0])
    """
    if source == "entropy":
        found = cut_by_entropy(graph, options, predictor, unit=unit)
        return alter_entropy_patches(*found, molecules, graph, options)
    ids = _joined(map(_fragments, molecules))
    return _altered(ids, molecules, graph, options)


def alter_entropy_patches(
    entropies: Tensor,
    patches: Patches,
    molecules: Sequence[Molecule],
    graph: GraphBatch,
    options: PatchOptions,
) -> Patches:
    """What `cut_by_entropy` found, altered as `options` ask; exactly as many as there are."""
    if options.tokens is None and options.control is None and not options.connected:
        return patches.trim()
    ids = patches.ids.cpu()
    if options.tokens is not None:
        ids = _joined(
            finer_patches(*pair, options.tokens)
            for pair in zip(
                _split(ids, graph.offsets), _split(entropies.cpu(), graph.offsets), strict=True
            )
        )
    return _altered(ids, molecules, graph, options)


def cut_by_entropy(
    graph: GraphBatch,
    options: PatchOptions,
    predictor: NextAtomPredictor | None,
    *,
    unit: str = "nats",
    longest: int | None = None,
) -> tuple[Tensor, Patches]:
    """What `options.entropy_source` says of every atom [N], and the patches that the rule cuts.

    `longest` is as of `NextAtomPredictor.forward`.
    """
    atoms = graph.elements, graph.offsets
    if options.entropy_source == "next_atom":
        return predictor.patches(*atoms, longest=longest, **options.cutting(), unit=unit)
    if options.entropy_source == "surprisal":
        values = predictor.surprisals(*atoms, longest=longest)
    else:
        values = node_entropies(graph.elements, graph.bond_index)
    values = values * PER_UNIT[unit]
    return values, find_patches(values, graph.offsets, **options.cutting())


def cut_on_device(
    graph: GraphBatch,
    options: PatchOptions,
    predictor: NextAtomPredictor | None,
    *,
    longest: int | None = None,
) -> dict[str, Patches]:
    """Patches by source at their capacity, cut where the graph is and without a wait for it.

    Args:
        graph: on the predictor's device.
        options: a connector's `patch_options`, of no source or of entropies.
        predictor: where `options` need one.
        longest: at least the most atoms of a molecule; without it a batch of more atoms than the
            predictor's `positions` is looked at.

    Raises:
        ValueError: the patches are found on the host: BRICS fragments, "node" entropies, `tokens`,
            `control`, `connected`, the published cut.

    Example:
        >>> from edt_former.chem import read_molecules
        >>> graph = GraphBatch.pack(read_molecules(["OCCO", "C"]))
        >>> predictor = NextAtomPredictor({"layers": 1, "width": 16})
        >>> cut_on_device(graph, PatchOptions(), predictor)["entropy"].atom_offsets.shape
        torch.Size([5])
    """
    if not options.sources:
        return {}
    plain = replace(options, control_seed=0) == PatchOptions(
        entropy_source=options.entropy_source, **options.cutting()
    )
    if not plain or options.entropy_source == "node":
        raise ValueError(
            "patches are cut on the device by the next-atom predictor alone (sources 'entropy', "
            f"no 'node' entropies, tokens, control or connected), got {options}"
        )
    return {"entropy": cut_by_entropy(graph, options, predictor, longest=longest)[1]}


def _altered(
    ids: Tensor, molecules: Sequence[Molecule], graph: GraphBatch, options: PatchOptions
) -> Patches:
    """The patches of `ids`, after control and cut into connected pieces where that is asked."""
    if options.control is not None:
        ids = _joined(
            control_patches(
                own, options.control, seed=options.control_seed, molecule=_identity(molecule)
            )
            for own, molecule in zip(_split(ids, graph.offsets), molecules, strict=True)
        )
    if options.connected:
        molecule = owners(graph.offsets, graph.num_atoms)
        apart = ids.to(molecule) + molecule * max(graph.num_atoms, 1)
        ids = split_components(apart, graph.bond_index)
    return pack_patches(ids.cpu().split(graph.offsets.diff().tolist()))


def _split(values: Tensor, offsets: Tensor) -> list[np.ndarray]:
    """The entries of every molecule."""
    return [part.numpy() for part in values.split(offsets.diff().tolist())]


def _joined(ids: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *ids]))


def _identity(molecule: Molecule) -> bytes:
    arrays = molecule.atom_features, molecule.bond_index, molecule.bond_features
    return molecule.smiles.encode() or b"".join(array.tobytes() for array in arrays)


def _fragments(molecule: Molecule) -> np.ndarray:
    # Connectors import this package and must not need RDKit.
    from edt_former.chem import brics_fragments

    if not molecule.smiles:
        raise ValueError("BRICS patches need a molecule's SMILES, got graph data without one")
    return brics_fragments(molecule)
