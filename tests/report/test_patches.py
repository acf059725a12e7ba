"""Patches of molecules as pictures and tables need them: in whose order, opened by whom."""

from __future__ import annotations

import math

import pytest
import torch
from rdkit import Chem

from edt_former.chem import read_molecule, read_molecules
from edt_former.report import patches as module
from edt_former.report.patches import patch_molecules, patch_rows
from edt_former.tokens import NextAtomPredictor, PatchOptions
from edt_kernels import find_patches

ASPIRIN = ("CC(=O)Oc1ccccc1C(=O)O", "OC(=O)c1ccccc1OC(C)=O", "O=C(C)Oc1c(C(O)=O)cccc1")


@pytest.fixture(scope="module")
def predictor() -> NextAtomPredictor:
    torch.manual_seed(0)
    model = NextAtomPredictor({"layers": 1, "heads": 2, "width": 16, "positions": 64})
    with torch.no_grad():
        model.wte.weight.mul_(40)  # so that entropies differ
    return model.eval()


class Known:
    """A predictor with entropies that a test chooses."""

    def __init__(self, entropies):
        self.entropies = torch.tensor(entropies)

    def patches(self, elements, offsets, unit, longest=None, **cut):
        assert unit == "nats"
        return self.entropies, find_patches(self.entropies, offsets, **cut)


def cut(smiles, entropies, **options):
    (patched,) = patch_molecules([read_molecule(smiles)], Known(entropies), PatchOptions(**options))
    return patched


def test_it_is_what_the_predictor_gives(predictor):
    molecules = read_molecules(["CCOCC", "C", ASPIRIN[0]])
    found = patch_molecules(molecules, predictor)
    for molecule, patched in zip(molecules, found, strict=True):
        elements = torch.from_numpy(molecule.elements)
        offsets = torch.tensor([0, molecule.num_atoms])
        entropies, patches = predictor.patches(elements, offsets)
        assert patched.ids == patches.ids.tolist()
        assert patched.entropies == pytest.approx(entropies.tolist(), rel=1e-5)
        assert patched.num_patches == int(patches.count)
        together = sorted(a for p in range(patched.num_patches) for a in patched.atoms(p))
        assert together == list(range(molecule.num_atoms))
        assert patched.unit == "nats" and patched.threshold is None and not patched.after


def test_patches_belong_to_the_same_atoms_however_the_smiles_is_written(predictor):
    first = Chem.MolFromSmiles(ASPIRIN[0])
    seen = []
    for smiles in ASPIRIN:
        (patched,) = patch_molecules([read_molecule(smiles)], predictor)
        ids = patched.in_callers_order(patched.ids)
        # Aspirin has no symmetry: the match is the one way to lay one on the other.
        match = Chem.MolFromSmiles(smiles).GetSubstructMatch(first)
        seen.append([ids[atom] for atom in match])
    assert seen[0] == seen[1] == seen[2] and len(set(seen[0])) > 1


def test_the_callers_order_skips_hydrogens_that_were_folded():
    mol = Chem.AddHs(Chem.MolFromSmiles("OCC"))
    (patched,) = patch_molecules([read_molecule(mol)], Known([0.1, 0.3, 0.2]))
    assert patched.molecule.smiles == "CCO" and patched.ids == [0, 1, 1]
    assert patched.in_callers_order(patched.ids) == [1, 1, 0]
    assert patched.in_callers_order("abc") == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("entropies", "options", "ids", "opened_by", "threshold"),
    [
        pytest.param([1, 3, 1, 2, 1], {}, [0, 1, 1, 2, 2], [None, 1, 3], None, id="local_max"),
        pytest.param(
            [1, 3, 1, 1, 1], {"max_size": 2}, [0, 1, 1, 2, 2], [None, 1, None], None, id="max_size"
        ),
        pytest.param(
            [1, 3, 1, 2, 1], {"min_size": 3}, [0, 0, 0, 1, 1], [None, 3], None, id="min_size"
        ),
        pytest.param(
            [1, 3, 1, 2, 1], {"max_patches": 2}, [0, 1, 1, 1, 1], [None, 1], None, id="max_patches"
        ),
        pytest.param(
            [1, 3, 1, 2, 1],
            {"rule": "threshold", "threshold": 1.5},
            [0, 1, 1, 2, 2],
            [None, 1, 3],
            1.5,
            id="threshold",
        ),
        pytest.param(
            [1, 3, 1, 2, 1],
            {"rule": "monotonic", "threshold": 1.5},
            [0, 1, 1, 1, 1],
            [None, 1],
            None,
            id="monotonic",
        ),
        # The quantile 0.5 of the five is 1; the atom after the edge opens.
        pytest.param(
            [1, 3, 1, 2, 1],
            {"rule": "rising_edge", "q": 0.5},
            [0, 0, 1, 1, 2],
            [None, 1, 3],
            1.0,
            id="rising_edge",
        ),
        pytest.param(
            [1, 3, 1, 2, 1], {"rule": "published"}, [0, 0, 1, 1, 1], [None, 1], 2.0, id="published"
        ),
    ],
)
def test_who_opened_a_patch(entropies, options, ids, opened_by, threshold):
    patched = cut("CCOCC", [float(h) for h in entropies], **options)
    assert patched.ids == ids and patched.opened_by == opened_by
    assert patched.threshold == threshold
    assert patched.after == (options.get("rule") == "published")


def test_fragments_are_opened_by_nobody(predictor):
    options = PatchOptions(sources=("brics",))
    (patched,) = patch_molecules([read_molecule(ASPIRIN[0])], predictor, options)
    assert patched.ids == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3]
    assert patched.opened_by == [None] * 4 and patched.threshold is None
    assert len(patched.entropies) == 13


def test_bits(predictor):
    molecules = read_molecules(ASPIRIN[:1])
    (nats,) = patch_molecules(molecules, predictor)
    (bits,) = patch_molecules(molecules, predictor, unit="bits")
    assert bits.entropies == pytest.approx([h / math.log(2) for h in nats.entropies], rel=1e-5)
    assert bits.unit == "bits" and bits.ids == nats.ids


def test_one_source_at_a_time(predictor):
    for sources in ((), ("brics", "entropy")):
        with pytest.raises(ValueError, match="options must name one source"):
            patch_molecules([], predictor, PatchOptions(sources=sources))


def test_no_molecules(predictor):
    assert patch_molecules([], predictor) == []


def test_pictures_are_those_of_the_patches(predictor):
    patched = cut("CCOCC", [1.0, 3.0, 1.0, 1.0, 1.0], max_size=2)
    assert "0: C, 1 atom; 1: CO, 2 atoms; 2: C2, 2 atoms" in patched.svg() == patched._repr_svg_()
    assert patched.png().startswith(b"\x89PNG")
    marks = patched.curve().axes[0].lines[-1]
    assert marks.get_xydata().tolist() == [[1, 3]]


def test_rows_that_cannot_be_read_stay_in_their_place(predictor):
    rows = [("a", "CCO"), ("broken", "C1CC"), ("", "c1ccccc1"), ("nothing", ""), ("c", "CN")]
    found = list(patch_rows(rows, predictor, chunk=2))
    assert [row.smiles for row in found] == [smiles for _, smiles in rows]
    assert [row.name for row in found] == ["a", "broken", "c1ccccc1", "nothing", "c"]
    assert [row.reason for row in found] == ["", "unclosed ring", "", "empty SMILES", ""]
    assert [row.patched is None for row in found] == [bool(row.reason) for row in found]
    alone = [next(patch_rows([row], predictor)) for row in rows]
    assert [r.patched and r.patched.ids for r in alone] == [
        r.patched and r.patched.ids for r in found
    ]


def test_rows_of_which_none_can_be_read(predictor):
    assert [row.reason for row in patch_rows([("", "C1"), ("", "")], predictor)] == [
        "unclosed ring",
        "empty SMILES",
    ]
    assert list(patch_rows([], predictor)) == []


def test_a_file_is_read_chunk_by_chunk(predictor):
    taken = []

    def rows():
        for i in range(10):
            taken.append(i)
            yield "", "C"

    found = patch_rows(rows(), predictor, chunk=4)
    next(found)
    assert len(taken) == 4 and len(list(found)) == 9


def test_rules_after_an_edge_are_those_of_the_op():
    """The op's own rules, so that none is forgotten here."""
    entropies, offsets = torch.tensor([0.0, 1, 0, 0]), torch.tensor([0, 4])
    for rule in ("local_max", "rising_edge", "published"):
        (second,) = find_patches(entropies, offsets, rule=rule).trim().atom_offsets[1:2].tolist()
        assert (second == 2) == (rule in module.AFTER)
