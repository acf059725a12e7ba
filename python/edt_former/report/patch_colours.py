"""A colour for every patch of a molecule, another one for each of its neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise

# Of Paul Tol's qualitative scheme "light" (SRON/EPS/TN/09-002), made for areas behind black text;
# its olive and its grey are left out, which are close to pear and to white.
PALETTE = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33")


def patch_colours(ids: Sequence[int], bonds: Iterable[tuple[int, int]]) -> dict[int, str]:
    """The colour of every patch, from `PALETTE`, by ascending id.

    Patches that a bond joins or that hold consecutive atoms differ, unless one has neighbours in
    all colours of the palette (none of the molecules of `edt_former.tasks.heldout` comes to that).
    While there are as many colours as patches, every patch has its own.

    Args:
        ids: the patch of every atom.
        bonds: pairs of atoms.

    Example:
        >>> patch_colours([0, 0, 1, 4], [(0, 1), (1, 2), (2, 3)])
        {0: '#77AADD', 1: '#EE8866', 4: '#EEDD88'}
    """
    neighbours: dict[int, set[int]] = {patch: set() for patch in sorted(set(ids))}
    if len(neighbours) <= len(PALETTE):
        return dict(zip(neighbours, PALETTE, strict=False))
    for a, b in chain(bonds, pairwise(range(len(ids)))):
        if ids[a] != ids[b]:
            neighbours[ids[a]].add(ids[b])
            neighbours[ids[b]].add(ids[a])

    # Brelaz' order (doi:10.1145/359094.359101): next the patch whose neighbours have most colours.
    taken: dict[int, set[str]] = {patch: set() for patch in neighbours}
    uses = dict.fromkeys(PALETTE, 0)
    colours: dict[int, str] = {}
    left = dict.fromkeys(neighbours)
    while left:
        patch = max(left, key=lambda p: (len(taken[p]), len(neighbours[p])))
        free = [colour for colour in PALETTE if colour not in taken[patch]]
        colour = min(free or PALETTE, key=uses.__getitem__)
        colours[patch] = colour
        uses[colour] += 1
        del left[patch]
        for neighbour in neighbours[patch]:
            taken[neighbour].add(colour)
    return {patch: colours[patch] for patch in neighbours}
