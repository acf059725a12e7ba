"""Motifs: functional groups and rings, described by 73 numbers each (after ReLMole)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rdkit import Chem

from edt_former.chem.molecule import Molecule

_COUNTED = (6, 8, 7, 15, 16)
"""Elements with a count of their own: C, O, N, P, S."""
_HALOGENS = (9, 17, 35, 53)
_CARBON = 6
_DEGREE, _AROMATIC, _IN_RING = 2, 7, 8  # columns of the atom features
_SINGLE, _DOUBLE, _TRIPLE, _OTHER = 0, 1, 2, 4  # types of bonds in their first feature

_ATOM_BINS, _BOND_BINS = (11, 6, 6, 6, 6), (11, 8, 8, 8)
MOTIF_WIDTH = sum(_ATOM_BINS) + 2 + sum(_BOND_BINS) + 1
"""Numbers that describe a motif."""

_SHARED = 2
"""Rings that share more atoms than this are one motif."""


class Motifs(NamedTuple):
    """The motifs of B molecules.

    Attributes:
        atoms: int64 [K], the atoms of all M motifs, numbered over the whole batch and ascending
            within a motif. An atom may belong to several motifs, or to none.
        offsets: int64 [M + 1], cuts `atoms` into motifs.
        molecule_offsets: int64 [B + 1], cuts the motifs into molecules.
    """

    atoms: np.ndarray
    offsets: np.ndarray
    molecule_offsets: np.ndarray


class _Packed(NamedTuple):
    """Atoms and bonds of a batch; `bonds` [2, 2E] numbers atoms over the batch."""

    elements: np.ndarray
    atoms: np.ndarray
    bonds: np.ndarray
    kinds: np.ndarray
    in_ring: np.ndarray
    starts: np.ndarray
    rings: list[np.ndarray]


def find_motifs(molecules: Sequence[Molecule]) -> Motifs:
    """The functional groups of every molecule, then its rings.

    Marked are atoms other than carbon, both ends of a double or triple bond, and an sp3 carbon
    with two or more of O, N and S beside it (an acetal). Marked atoms that bonds outside rings
    connect are one group, together with the unmarked atoms that such bonds lead to; a bond outside
    rings between two unmarked atoms is a group of its own. A ring atom alone is no group. Rings
    are the symmetrized smallest set of RDKit; those that share more than two atoms are one.

    Groups are connected components, so the order of bonds does not matter. A lone carbon atom
    (methane) has no motif.

    >>> from edt_former.chem import read_molecules
    >>> motifs = find_motifs(read_molecules(["CC(=O)OC1CC1", "C"]))
    >>> motifs.atoms.tolist(), motifs.offsets.tolist(), motifs.molecule_offsets.tolist()
    ([0, 1, 2, 3, 4, 4, 5, 6], [0, 5, 8], [0, 2, 2])
    """
    return _motifs(_packed(molecules))


def motif_features(molecules: Sequence[Molecule]) -> list[np.ndarray]:
    """What the motifs of every molecule are made of, uint8 [motifs, 73] each.

    One-hot counts of the atoms C (0 to 10), O, N, P and S (0 to 5 each); whether there are
    halogens, and other elements; one-hot counts of the bonds between the motif's atoms: single (0
    to 10), double, triple and aromatic (0 to 7 each); whether one of them is in a ring. Larger
    counts share the last bin. Bonds of other types, such as dative ones, count as single.

    >>> from edt_former.chem import read_molecules
    >>> [m.shape for m in motif_features(read_molecules(["CC(=O)OC1CC1", "C"]))]
    [(2, 73), (0, 73)]
    """
    packed = _packed(molecules)
    motifs = _motifs(packed)
    count = len(motifs.offsets) - 1
    motif = np.repeat(np.arange(count), np.diff(motifs.offsets))
    atoms = _tally(motif, _atom_class(packed.elements)[motifs.atoms], count, len(_COUNTED) + 2)
    inside, bond = _inner_bonds(packed, motif, motifs.atoms)
    kinds = np.where(packed.kinds == _OTHER, _SINGLE, packed.kinds)
    bonds = _tally(inside, kinds[bond], count, len(_BOND_BINS))
    ringed = np.bincount(inside, packed.in_ring[bond], minlength=count) > 0
    features = np.concatenate(
        [
            *(_one_hot(atoms[:, i], bins) for i, bins in enumerate(_ATOM_BINS)),
            atoms[:, len(_COUNTED) :] > 0,
            *(_one_hot(bonds[:, i], bins) for i, bins in enumerate(_BOND_BINS)),
            ringed[:, None],
        ],
        1,
    ).astype(np.uint8)
    return np.split(features, motifs.molecule_offsets[1:-1]) if len(molecules) else []


def _packed(molecules: Sequence[Molecule]) -> _Packed:
    sizes = [m.num_atoms for m in molecules]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    if not molecules:
        none, pairs = np.zeros((0, 9), np.int64), np.zeros((2, 0), np.int64)
        return _Packed(none[:, 0], none, pairs, pairs[0], pairs[0] > 0, starts, [])
    atoms = np.concatenate([m.atom_features for m in molecules])
    bonds = np.concatenate([m.bond_index for m in molecules], 1)
    bonds = bonds + np.repeat(starts[:-1], [m.bond_index.shape[1] for m in molecules])
    kinds = np.concatenate([m.bond_features[:, 0] for m in molecules])
    elements = np.concatenate([m.elements for m in molecules])
    around, rings = [], []
    for first, molecule in zip(starts.tolist(), molecules, strict=False):
        bare = _rings(molecule, first)
        around += [pair for ring in bare for pair in zip(ring, ring[1:] + ring[:1], strict=True)]
        rings += [np.array(sorted(ring)) for ring in _merged(bare)]
    ring_bonds = np.array(around, dtype=np.int64).reshape(-1, 2).T
    in_ring = np.isin(_key(bonds, len(atoms)), _key(ring_bonds, len(atoms)))
    return _Packed(elements, atoms, bonds, kinds, in_ring, starts, rings)


def _motifs(packed: _Packed) -> Motifs:
    total = len(packed.atoms)
    marked = _marked(packed)
    apart = packed.bonds[:, ~packed.in_ring & (packed.bonds[0] < packed.bonds[1])]
    ends = marked[apart]
    label = _components(apart[:, ends.all(0)], total)
    half = apart[:, ends[0] != ends[1]]
    first = marked[half[0]]
    inside, outside = np.where(first, half, half[::-1])
    pairs = apart[:, ~ends.any(0)]

    # A group is called by its first marked atom, a pair and a ring by numbers beyond all atoms.
    names = total + np.arange(pairs.shape[1] + len(packed.rings))
    pair, ring = names[: pairs.shape[1]], names[pairs.shape[1] :]
    name = [label[marked], label[inside], pair, pair, ring.repeat([len(r) for r in packed.rings])]
    atom = [np.flatnonzero(marked), outside, *pairs, *packed.rings]
    members = np.unique(np.stack([np.concatenate(name), np.concatenate(atom)]), axis=1)

    name, motif, sizes = np.unique(members[0], return_inverse=True, return_counts=True)
    lone = (sizes[motif] == 1) & (packed.atoms[members[1], _IN_RING] == 1)
    members, motif = members[:, ~lone], motif[~lone]
    return _sorted_by_molecule(motif, members[1], packed.starts)


def _sorted_by_molecule(motif: np.ndarray, atom: np.ndarray, starts: np.ndarray) -> Motifs:
    molecule = np.searchsorted(starts, atom, side="right") - 1
    order = np.lexsort((atom, motif, molecule))
    motif, atom, molecule = motif[order], atom[order], molecule[order]
    opens = np.flatnonzero(np.diff(motif, prepend=-1))
    counts = np.bincount(molecule[opens], minlength=len(starts) - 1)
    return Motifs(atom, np.append(opens, len(atom)), np.concatenate([[0], counts.cumsum()]))


def _marked(packed: _Packed) -> np.ndarray:
    """bool [N], the atoms that start a functional group."""
    marked = packed.elements != _CARBON
    multiple = (packed.kinds == _DOUBLE) | (packed.kinds == _TRIPLE)
    marked[packed.bonds[0, multiple]] = True
    source, target = packed.bonds
    aliphatic = packed.atoms[:, _AROMATIC] == 0
    single = (packed.kinds == _SINGLE) & aliphatic[source]
    beside = single & np.isin(packed.elements[source], (8, 7, 16))
    count = np.bincount(target[beside], minlength=len(marked))
    # Index 4 of the degree is four neighbours, hydrogens included.
    sp3 = aliphatic & (packed.atoms[:, _DEGREE] == 4) & (packed.elements == _CARBON)
    return marked | (sp3 & (count >= 2))


def _components(bonds: np.ndarray, total: int) -> np.ndarray:
    """For every atom the smallest atom that `bonds` connect it with."""
    label = np.arange(total)
    while True:
        low = label.copy()
        np.minimum.at(low, bonds[0], label[bonds[1]])
        np.minimum.at(low, bonds[1], label[bonds[0]])
        low = low[low]
        if np.array_equal(low, label):
            return label
        label = low


def _rings(molecule: Molecule, first: int) -> list[list[int]]:
    """The smallest rings, each in the order around it, atoms numbered from `first` on."""
    ringed = np.flatnonzero(molecule.atom_features[:, _IN_RING])
    if not len(ringed):
        return []
    place = np.full(molecule.num_atoms, -1)
    place[ringed] = np.arange(len(ringed))
    source, target = place[molecule.bond_index]
    graph = Chem.RWMol()
    for _ in ringed:
        graph.AddAtom(_ATOM)
    for i, j in zip(source.tolist(), target.tolist(), strict=True):
        if 0 <= i < j:
            graph.AddBond(i, j, _BOND)
    names = (ringed + first).tolist()
    return [[names[atom] for atom in ring] for ring in Chem.GetSymmSSSR(graph)]


_ATOM, _BOND = Chem.Atom(_CARBON), Chem.BondType.SINGLE


def _merged(rings: list[list[int]]) -> list[set[int]]:
    """Rings that share more than `_SHARED` atoms as one, and again until none do."""
    whole: list[set[int]] = []
    for ring in rings:
        atoms = set(ring)
        while touching := [other for other in whole if len(other & atoms) > _SHARED]:
            whole = [other for other in whole if other not in touching]
            atoms = atoms.union(*touching)
        whole.append(atoms)
    return whole


def _inner_bonds(
    packed: _Packed, motif: np.ndarray, atom: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(motif, bond) of every bond between two atoms of a motif, every bond once."""
    total = len(packed.atoms)
    source, target = packed.bonds
    forward = np.flatnonzero(source < target)
    first = np.searchsorted(target[forward], np.arange(total + 1))
    start, count = first[atom], np.diff(first)[atom]
    own = np.repeat(np.arange(len(atom)), count)
    step = np.arange(len(own)) - np.repeat(np.cumsum(count) - count, count)
    bond = forward[start[own] + step]
    known = motif * total + atom
    inside = np.isin(motif[own] * total + source[bond], known)
    return motif[own][inside], bond[inside]


def _atom_class(elements: np.ndarray) -> np.ndarray:
    """The place of each element among `_COUNTED`; then halogens, then all others."""
    place = np.full(256, len(_COUNTED) + 1)
    place[list(_HALOGENS)] = len(_COUNTED)
    place[list(_COUNTED)] = np.arange(len(_COUNTED))
    return place[elements]


def _tally(row: np.ndarray, column: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """How often each (row, column) occurs, [rows, columns]."""
    return np.bincount(row * columns + column, minlength=rows * columns).reshape(rows, columns)


def _one_hot(counts: np.ndarray, bins: int) -> np.ndarray:
    return np.minimum(counts, bins - 1)[:, None] == np.arange(bins)


def _key(bonds: np.ndarray, total: int) -> np.ndarray:
    """A number per bond, the same in both directions."""
    return bonds.min(0) * total + bonds.max(0)
