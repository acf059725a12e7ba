"""Molecules drawn with their patches: coloured areas with numbers, and a legend."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from rdkit import Chem
from rdkit.Chem import rdDepictor
from rdkit.Chem.Draw import rdMolDraw2D
from rdkit.Geometry import Point2D

from edt_former.chem import Invalid, Molecule, rdkit_mol, read_molecule
from edt_former.report.patch_colours import patch_colours

SCALE, BOND, LETTER = 30, 1.5, 0.6
"""Pixels per angstrom; length of a bond and size of a symbol's font in angstrom."""

MAX_PIXELS = 4000
"""Of an SVG's width or height; what would be larger is drawn with shorter bonds."""

RADIUS, BAND, GAP = 0.42, 0.72, 1.5
"""In angstrom: radius of the area around an atom, width of that along a bond, distance of the
components of a salt."""

MARGIN, LINE, SWATCH, FONT, TEXT = 14, 26, 20, 15, 8
"""Pixels of the legend: around and between columns, a line, a coloured square, a letter's height
and the width it is given."""

BLACK = (0.0, 0.0, 0.0)
MIDDLE, START = 0, 1
"""How RDKit aligns text."""


def draw_patches(molecule: Molecule | Chem.Mol | str, ids: Sequence[int]) -> str:
    """An SVG picture of a molecule whose patches are coloured areas.

    Every connected piece of a patch carries the patch's number, and a legend tells its elements
    and how many atoms it has, so the picture can be read without colours. Colours are those of
    `patch_colours`. The picture grows with the molecule; atoms and letters keep their size.

    Args:
        molecule: a `Molecule`, an RDKit `Mol` (with its own layout if it has one in two
            dimensions), or a SMILES.
        ids: the patch of every atom, any integers, in the order of the molecule's atoms: for a
            SMILES that of `Chem.MolFromSmiles`.

    Returns:
        The text of an SVG file. Its classes `atom-i` count the atoms as `ids` does.

    Raises:
        ValueError: `ids` are not one per atom, or the SMILES cannot be read.

    Example:
        >>> from edt_former.chem import brics_fragments, read_molecule
        >>> aspirin = read_molecule("CC(=O)Oc1ccccc1C(=O)O")
        >>> svg = draw_patches(aspirin, brics_fragments(aspirin))
        >>> svg[svg.index("<title>") : svg.index("</title>")]
        '<title>4 patches: 0: C2O, 3 atoms; 1: O, 1 atom; 2: C6, 6 atoms; 3: CO2, 3 atoms'

        In a notebook, `IPython.display.SVG(svg)` shows it.
    """
    mol = as_drawn(molecule)
    text = _draw(mol, _checked(ids, mol), rdMolDraw2D.MolDraw2DSVG, 1)
    head = "<!-- END OF HEADER -->"
    return text.replace(head, f"{head}\n<title>{describe_patches(mol, ids)}</title>", 1)


def draw_patches_png(molecule: Molecule | Chem.Mol | str, ids: Sequence[int]) -> bytes:
    r"""The picture of `draw_patches` as the content of a PNG file, at double resolution.

    Example:
        >>> draw_patches_png("CCO", [0, 0, 1])[:4]
        b'\x89PNG'
    """
    mol = as_drawn(molecule)
    return _draw(mol, _checked(ids, mol), rdMolDraw2D.MolDraw2DCairo, 2)


def describe_patches(molecule: Molecule | Chem.Mol | str, ids: Sequence[int]) -> str:
    """The legend of the picture in words.

    Example:
        >>> describe_patches("CCO", [0, 0, 1])
        '2 patches: 0: C2, 2 atoms; 1: O, 1 atom'
    """
    mol = as_drawn(molecule)
    legend = _legend(mol, _checked(ids, mol))
    patches = "1 patch" if len(legend) == 1 else f"{len(legend)} patches"
    return f"{patches}: " + "; ".join(f"{patch}: {text}" for patch, text in legend.items())


def as_drawn(molecule: Molecule | Chem.Mol | str) -> Chem.Mol:
    """The RDKit molecule that is drawn, its atoms in the order of `molecule`.

    Raises:
        ValueError: the SMILES cannot be read, or is not known.
    """
    if isinstance(molecule, Molecule):
        if not molecule.smiles:
            raise ValueError("molecule must have a SMILES to be drawn, got graph data without one")
        return rdkit_mol(molecule)
    if isinstance(molecule, Chem.Mol):
        return Chem.Mol(molecule)
    read = read_molecule(molecule)
    if isinstance(read, Invalid):
        raise ValueError(f"molecule {molecule!r} cannot be read: {read.reason}")
    return Chem.MolFromSmiles(molecule)


def bonded_atoms(mol: Chem.Mol) -> list[tuple[int, int]]:
    """Pairs of atoms with a bond."""
    return [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in mol.GetBonds()]


def _checked(ids: Sequence[int], mol: Chem.Mol) -> list[int]:
    if len(ids) != mol.GetNumAtoms():
        raise ValueError(f"ids must be one per atom, {mol.GetNumAtoms()}, got {len(ids)}")
    return [int(patch) for patch in ids]


def _legend(mol: Chem.Mol, ids: list[int]) -> dict[int, str]:
    """What the legend says of every patch."""
    elements: dict[int, Counter[str]] = {patch: Counter() for patch in sorted(set(ids))}
    for atom, patch in zip(mol.GetAtoms(), ids, strict=True):
        elements[patch][atom.GetSymbol()] += 1
    return {patch: _formula(counts) for patch, counts in elements.items()}


def _formula(counts: Counter[str]) -> str:
    # Hill's order: carbon first.
    symbols = sorted(counts, key=lambda symbol: (symbol != "C", symbol))
    formula = "".join(f"{s}{counts[s] if counts[s] > 1 else ''}" for s in symbols)
    return f"{formula}, {counts.total()} atom{'s' if counts.total() > 1 else ''}"


def _draw(mol: Chem.Mol, ids: list[int], canvas: type, zoom: int) -> str | bytes:
    """The picture; `zoom` times as many pixels as an SVG has."""
    legend = _legend(mol, ids)
    colours = {p: _rgb(c) for p, c in patch_colours(ids, bonded_atoms(mol)).items()}
    _number_pieces(mol, ids)
    mol = _laid_out(mol)
    scale, width, height = _size(mol)
    column = SWATCH + TEXT * max(map(len, legend.values()), default=0) + 3 * MARGIN
    width = max(width, column + MARGIN)
    columns = (width - MARGIN) // column
    rows = -(-len(legend) // columns)

    drawer = canvas(
        width * zoom, (height + rows * LINE + MARGIN) * zoom, width * zoom, height * zoom
    )
    _style(drawer, scale * zoom, zoom)
    _draw_molecule(drawer, mol, ids, colours)
    drawer.SetFontSize(FONT * zoom)
    for index, (patch, text) in enumerate(legend.items()):
        left, top = MARGIN + index // rows * column, height + index % rows * LINE
        corner, middle = Point2D(left * zoom, top * zoom), (top + SWATCH / 2) * zoom
        drawer.SetColour(colours[patch])
        drawer.DrawRect(corner, corner + Point2D(SWATCH * zoom, SWATCH * zoom), True)
        drawer.SetColour(BLACK)
        drawer.DrawString(str(patch), Point2D((left + SWATCH / 2) * zoom, middle), MIDDLE, True)
        text_left = (left + SWATCH + MARGIN) * zoom
        drawer.DrawString(text, Point2D(text_left, middle), START, True)
    drawer.FinishDrawing()
    return drawer.GetDrawingText()


def _number_pieces(mol: Chem.Mol, ids: list[int]) -> None:
    """Notes the number of its patch at the first atom of every connected piece of a patch."""
    pieces = Chem.RWMol(mol)
    for a, b in bonded_atoms(mol):
        if ids[a] != ids[b]:
            pieces.RemoveBond(a, b)
    for piece in Chem.GetMolFrags(pieces):
        atom = min(piece)
        mol.GetAtomWithIdx(atom).SetProp("atomNote", str(ids[atom]))


def _laid_out(mol: Chem.Mol) -> Chem.Mol:
    """Ready to be drawn: in two dimensions, wide rather than high, Kekule's double bonds."""
    if not mol.GetNumConformers() or mol.GetConformer().Is3D():
        rdDepictor.Compute2DCoords(mol, canonOrient=True)
        _spread(mol)
    return rdMolDraw2D.PrepareMolForDrawing(mol)


def _spread(mol: Chem.Mol) -> None:
    """Puts the components of a salt side by side, so that their numbers are told apart."""
    conformer = mol.GetConformer()
    places = conformer.GetPositions()
    left = 0.0
    for component in map(list, Chem.GetMolFrags(mol)):
        low, high = places[component].min(0), places[component].max(0)
        places[component] += [left - low[0], -(low[1] + high[1]) / 2, 0]
        left += high[0] - low[0] + GAP
    conformer.SetPositions(places)


def _size(mol: Chem.Mol) -> tuple[float, int, int]:
    """Pixels per angstrom, and the width and height that the molecule takes."""
    scale = float(SCALE)
    while True:
        drawer = rdMolDraw2D.MolDraw2DSVG(-1, -1)
        _style(drawer, scale, 1)
        size = [math.ceil(side + 2 * RADIUS * scale) + MARGIN for side in drawer.GetMolSize(mol)]
        if max(size) <= MAX_PIXELS:
            return scale, *size
        scale *= 0.99 * MAX_PIXELS / max(size)


def _style(drawer: rdMolDraw2D.MolDraw2D, scale: float, zoom: int) -> None:
    options = drawer.drawOptions()
    options.prepareMolsBeforeDrawing = False
    options.scalingFactor = scale
    options.fixedBondLength = BOND * scale
    # A molecule of one atom has no bond that fixes its scale.
    options.maxFontSize = max(round(LETTER * scale), FONT * zoom)
    options.minFontSize = -1
    options.bondLineWidth = 2 * zoom
    options.highlightRadius = RADIUS
    # RDKit's unit of this multiplier is 0.02 angstrom per pixel of a bond's width.
    options.highlightBondWidthMultiplier = round(BAND / 0.02 / options.bondLineWidth)
    options.annotationFontScale = 0.75
    options.setAtomNoteColour(BLACK)
    # Coloured symbols would vanish on areas of their own colour.
    options.useBWAtomPalette()


def _draw_molecule(
    drawer: rdMolDraw2D.MolDraw2D,
    mol: Chem.Mol,
    ids: list[int],
    colours: Mapping[int, tuple[float, ...]],
) -> None:
    atoms = {atom: colours[patch] for atom, patch in enumerate(ids)}
    # Bonds to hydrogens that the layout added at stereocentres belong to no patch.
    bonds = {
        index: atoms[a]
        for index, (a, b) in enumerate(bonded_atoms(mol))
        if max(a, b) < len(ids) and ids[a] == ids[b]
    }
    drawer.DrawMolecule(
        mol,
        highlightAtoms=list(atoms),
        highlightAtomColors=atoms,
        highlightBonds=list(bonds),
        highlightBondColors=bonds,
    )


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
