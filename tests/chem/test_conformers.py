"""Conformers against chemistry, and what a pool of processes promises."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdCIPLabeler
from rdkit.Geometry import Point3D
from torch.utils.data import DataLoader

from edt_former.chem import (
    Conformer,
    ConformerOptions,
    ConformerPool,
    Invalid,
    Molecule,
    conformers,
    make_conformer,
    make_conformers,
    rdkit_mol,
    read_molecule,
    read_molecules,
)

IMPOSSIBLE = "C1C[C@H]2CC[C@H]1C2"
"""Norbornane with a bridgehead turned inside out."""
ENDLESS = "C" * 400
"""Takes RDKit many seconds, and much longer than that to look at the clock."""
METALS = {"Pt", "Fe", "Na", "Zn", "Mg"}
SMILES = [
    "OC(=O)c1ccccc1OC(C)=O",
    "CN1CCC[C@H]1c1cccnc1",
    "Cc1ccc(NC(=O)c2ccc(CN3CCN(C)CC3)cc2)cc1Nc1nccc(-c2cccnc2)n1",
    "C12C3C4C1C5C2C3C45",
    "N#Cc1ccc(C(=O)C#C)cc1I",
    "O=S(=O)(N)c1cc(Cl)c(F)cc1[Si](C)(C)C",
    "OP(=O)(O)OC[C@H]1O[C@@H](n2cnc3c(N)ncnc32)[C@H](O)[C@@H]1O",
    "[2H]C([2H])([2H])O",
    "[H][H]",
    "C[N+](C)(C)CCO.[Cl-]",
    "CC(=O)[O-].CC(=O)[O-].[Zn+2]",
    "N[Pt](N)(Cl)Cl",
]


@pytest.fixture(scope="module")
def made() -> list[tuple[Molecule, np.ndarray]]:
    molecules = read_molecules(SMILES)
    found = [make_conformer(molecule) for molecule in molecules]
    assert not any(item.flat for item in found)
    return [(m, item.coordinates) for m, item in zip(molecules, found, strict=True)]


def coordinates(source: str, **options: object) -> np.ndarray:
    found = make_conformer(read_molecule(source), ConformerOptions(**options))
    assert isinstance(found, Conformer), found
    return found.coordinates


def seen_in_space(molecule: Molecule, places: np.ndarray) -> Chem.Mol:
    """The molecule with the stereochemistry that RDKit sees in the coordinates alone."""
    mol = rdkit_mol(molecule)
    Chem.RemoveStereochemistry(mol)
    conformer = Chem.Conformer(mol.GetNumAtoms())
    for i, place in enumerate(places.tolist()):
        conformer.SetAtomPosition(i, Point3D(*place))
    mol.AddConformer(conformer)
    Chem.AssignStereochemistryFrom3D(mol)
    return mol


def test_coordinates_are_one_row_per_atom_in_float32(made):
    for molecule, places in made:
        assert places.dtype == np.float32
        assert places.shape == (molecule.num_atoms, 3)
        assert np.isfinite(places).all()


@pytest.mark.parametrize("i", range(len(SMILES)), ids=SMILES)
def test_atoms_stand_in_the_order_of_the_molecule(made, i):
    """Bonded atoms are a bond apart, all others farther than the shortest bond."""
    molecule, places = made[i]
    distance = np.linalg.norm(places[:, None] - places[None], axis=-1)
    bonded = np.zeros_like(distance, dtype=bool)
    bonded[tuple(molecule.bond_index)] = True
    symbols = np.array([atom.GetSymbol() for atom in rdkit_mol(molecule).GetAtoms()])
    metal = np.isin(symbols, list(METALS))
    covalent = bonded & ~metal[:, None] & ~metal[None]
    if molecule.smiles != "[H][H]":
        assert (distance[covalent] > 0.9).all() and (distance[covalent] < 2.3).all()
    others = ~bonded & ~np.eye(len(places), dtype=bool)
    if covalent.any() and others.any():
        assert distance[others].min() > distance[covalent].min()


@pytest.mark.parametrize(
    ("smiles", "lengths"),
    [
        # Of the bond from atom 0 to atom 1, from tables of mean bond lengths.
        pytest.param("CC", 1.54, id="C-C"),
        pytest.param("C=C", 1.34, id="C=C"),
        pytest.param("C#C", 1.20, id="C#C"),
        pytest.param("CO", 1.43, id="C-O"),
        pytest.param("CBr", 1.94, id="C-Br"),
        pytest.param("CS", 1.82, id="C-S"),
        pytest.param("[H][H]", 0.74, id="H-H"),
    ],
)
def test_bonds_have_their_length(smiles, lengths):
    places = coordinates(smiles)
    assert np.linalg.norm(places[0] - places[1]) == pytest.approx(lengths, abs=0.05)


CHIRAL = [
    pytest.param("C[C@H](N)C(=O)O", "S", id="L-alanine"),
    pytest.param("N[C@@H](CS)C(=O)O", "R", id="L-cysteine"),
    pytest.param("CC(C)Cc1ccc(cc1)[C@H](C)C(=O)O", "S", id="dexibuprofen"),
    pytest.param("N[C@@H](Cc1ccc(O)c(O)c1)C(=O)O", "S", id="levodopa"),
    pytest.param("CN1CCC[C@H]1c1cccnc1", "S", id="nicotine"),
    pytest.param("C[C@H]1COc2c(N3CCN(C)CC3)c(F)cc3c(=O)c(C(=O)O)cn1c23", "S", id="levofloxacin"),
    pytest.param("CN[C@H]1CC[C@@H](c2ccc(Cl)c(Cl)c2)c2ccccc21", "SS", id="sertraline"),
    pytest.param("Fc1ccc([C@@H]2CCNC[C@H]2COc2ccc3OCOc3c2)cc1", "RS", id="paroxetine"),
    pytest.param(
        "CC1(C)S[C@@H]2[C@H](NC(=O)Cc3ccccc3)C(=O)N2[C@H]1C(=O)O", "RRS", id="penicillin G"
    ),
    pytest.param(
        "CN1CC[C@]23c4c5ccc(O)c4O[C@H]2[C@@H](O)C=C[C@H]3[C@H]1C5", "RRRSS", id="morphine"
    ),
    pytest.param("CCOC(=O)C1=C[C@@H](OC(CC)CC)[C@H](NC(C)=O)[C@@H](N)C1", "RRS", id="oseltamivir"),
    pytest.param(
        "CC(C)CCC[C@@H](C)[C@H]1CC[C@H]2[C@@H]3CC=C4C[C@@H](O)CC[C@]4(C)[C@H]3CC[C@]12C",
        "RRRRSSSS",
        id="cholesterol",
    ),
]


@pytest.mark.parametrize(("smiles", "labels"), CHIRAL)
def test_chirality_is_kept(smiles, labels):
    """The labels are those of the drugs' systematic names."""
    molecule = read_molecule(smiles)
    mol = seen_in_space(molecule, coordinates(smiles))
    assert Chem.MolToSmiles(mol) == molecule.smiles
    rdCIPLabeler.AssignCIPLabels(mol)
    found = [a.GetProp("_CIPCode") for a in mol.GetAtoms() if a.HasProp("_CIPCode")]
    assert "".join(sorted(found)) == labels


@pytest.mark.parametrize(
    ("smiles", "ranked", "sign"),
    [
        # Atoms around atom 1, in the order of their rank; counterclockwise, S, is positive.
        pytest.param("C[C@H](N)C(=O)O", (2, 3, 0), 1, id="S-alanine"),
        pytest.param("C[C@@H](N)C(=O)O", (2, 3, 0), -1, id="R-alanine"),
        pytest.param("F[C@H](Cl)Br", (3, 2, 0), -1, id="R-CHFClBr"),
        pytest.param("F[C@@H](Cl)Br", (3, 2, 0), 1, id="S-CHFClBr"),
    ],
)
def test_the_volume_of_a_centre_has_the_sign_of_its_name(smiles, ranked, sign):
    molecule = read_molecule(smiles)
    assert molecule.order.tolist()[1] == 1
    places = np.empty((molecule.num_atoms, 3))
    places[molecule.order] = coordinates(smiles)
    a, b, c = places[list(ranked)] - places[1]
    volume = np.dot(np.cross(a, b), c)
    assert np.sign(volume) == sign and abs(volume) > 1


@pytest.mark.parametrize(
    ("smiles", "name"),
    [
        pytest.param("CC/C(=C(\\c1ccccc1)c1ccc(OCCN(C)C)cc1)c1ccccc1", "Z", id="tamoxifen"),
        pytest.param("CC/C(=C(/CC)c1ccc(O)cc1)c1ccc(O)cc1", "E", id="diethylstilbestrol"),
        pytest.param("Oc1ccc(/C=C/c2cc(O)cc(O)c2)cc1", "E", id="resveratrol"),
        pytest.param("OC(=O)/C=C\\C(=O)O", "Z", id="maleic acid"),
        pytest.param("OC(=O)/C=C/C(=O)O", "E", id="fumaric acid"),
    ],
)
def test_sides_of_double_bonds_are_kept(smiles, name):
    molecule = read_molecule(smiles)
    mol = seen_in_space(molecule, coordinates(smiles))
    assert Chem.MolToSmiles(mol) == molecule.smiles
    rdCIPLabeler.AssignCIPLabels(mol)
    assert [b.GetProp("_CIPCode") for b in mol.GetBonds() if b.HasProp("_CIPCode")] == [name]


@pytest.mark.parametrize(
    "smiles",
    [
        "[Na+].[Cl-]",
        "C[N+](C)(C)CCO.[Cl-]",
        "CC(=O)[O-].CC(=O)[O-].[Zn+2]",
        "O.O",
        "O.O.[Na+].[Cl-]",
        "O.O.O.O.O.O.[Mg+2].[Cl-].[Cl-]",
        "c1ccccc1.CCN.Cl",
    ],
)
def test_the_fragments_of_a_salt_are_apart_and_yet_together(smiles):
    """None is bonded to another, and none has left the others."""
    molecule, places = read_molecule(smiles), coordinates(smiles)
    near, *far = (places[list(part)] for part in Chem.GetMolFrags(rdkit_mol(molecule)))
    while far:
        gaps = [np.linalg.norm(near[:, None] - part, axis=-1).min() for part in far]
        assert 1.7 < min(gaps) < 7
        near = np.concatenate([near, far.pop(int(np.argmin(gaps)))])


@pytest.mark.parametrize("smiles", ["[He]", "C", "[Na+]", "[U]"])
def test_a_single_atom_is_at_the_origin(smiles):
    np.testing.assert_allclose(coordinates(smiles), np.zeros((1, 3)), atol=0.2)


def test_an_isotopic_hydrogen_is_an_atom_like_any_other():
    molecule = read_molecule("[2H]C([2H])([2H])O")
    places, elements = coordinates("[2H]C([2H])([2H])O"), molecule.elements
    carbon = places[elements == 6]
    lengths = np.linalg.norm(places[elements == 1] - carbon, axis=1)
    assert lengths.tolist() == pytest.approx([1.09] * 3, abs=0.03)


def test_the_seed_decides():
    flexible = "CCCCCCCC(=O)O"
    same = coordinates(flexible, seed=7)
    np.testing.assert_array_equal(coordinates(flexible, seed=7), same)
    assert np.abs(coordinates(flexible, seed=8) - same).max() > 0.1
    molecule = read_molecule(flexible)
    np.testing.assert_array_equal(coordinates(molecule.smiles, seed=7), same)
    np.testing.assert_array_equal(coordinates("OC(=O)CCCCCCC", seed=7), same)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_pool_gives_what_one_process_gives(made, workers):
    molecules = [molecule for molecule, _ in made]
    with ConformerPool(workers=workers) as pool:
        found = pool.make(molecules)
        assert all(worker.process is not None for worker in pool.workers)
    for (_, places), item in zip(made, found, strict=True):
        np.testing.assert_array_equal(item.coordinates, places)
        assert not item.flat
    assert all(worker.process is None for worker in pool.workers)


def test_what_cannot_be_made_stays_in_its_place():
    nameless = Molecule(
        "", *(getattr(read_molecule("C"), n) for n in list(vars(read_molecule("C")))[1:])
    )
    broken = read_molecule("C1CC")
    items = [read_molecule("CCO"), broken, read_molecule(IMPOSSIBLE), nameless, read_molecule("C")]
    first, unread, twisted, graph, last = make_conformers(items)
    assert len(first.coordinates) == 3 and len(last.coordinates) == 1
    assert unread is broken
    assert twisted == Invalid(IMPOSSIBLE, "RDKit cannot embed the molecule")
    assert graph == Invalid("", "a conformer needs a molecule's SMILES, got graph data without one")
    assert make_conformers([]) == []


def test_a_molecule_that_takes_too_long_is_said_to():
    limit = ConformerOptions(timeout=1e-3)
    found = make_conformer(read_molecule("C" * 60), limit)
    assert found == Invalid("C" * 60, "no conformer within 0.001 s")


@pytest.mark.parametrize("flat", [False, True])
def test_a_process_that_does_not_look_at_the_clock_is_ended(monkeypatch, flat):
    monkeypatch.setattr(conformers, "_GRACE", 0.1)
    options = ConformerOptions(timeout=0.3, flat=flat)
    with ConformerPool(options) as pool:
        endless, short = pool.make(read_molecules([ENDLESS, "C"]))
    if flat:
        assert endless.flat and len(endless.coordinates) == 400
    else:
        assert endless == Invalid(ENDLESS, "no conformer within 0.3 s")
    assert len(short.coordinates) == 1 and not short.flat


@pytest.mark.parametrize("pooled", [False, True], ids=["alone", "pool"])
def test_a_drawing_where_there_is_no_conformer(pooled):
    options, molecule = ConformerOptions(flat=True), read_molecule(IMPOSSIBLE)
    if pooled:
        (found,) = make_conformers([molecule], options)
    else:
        found = make_conformer(molecule, options)
    assert found.flat and found.coordinates.dtype == np.float32
    assert (found.coordinates[:, 2] == 0).all()
    source, target = found.coordinates[molecule.bond_index]
    lengths = np.linalg.norm(source - target, axis=1)
    assert (lengths > 0.9).all() and (lengths < 2.3).all()
    assert not make_conformer(read_molecule("CCO"), options).flat


def test_a_process_that_dies_gives_a_reason_and_the_pool_goes_on():
    def kill_when_busy() -> None:
        while pool.workers[0].process is None:
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(pool.workers[0].process.pid, signal.SIGKILL)

    with ConformerPool() as pool:
        killer = threading.Thread(target=kill_when_busy)
        killer.start()
        endless, short = pool.make(read_molecules([ENDLESS, "CCO"]))
        killer.join()
        assert endless == Invalid(ENDLESS, "RDKit crashed")
        assert len(short.coordinates) == 3


def test_a_process_that_died_between_two_calls_is_replaced():
    with ConformerPool() as pool:
        pool.make(read_molecules(["C"]))
        pool.workers[0].process.kill()
        pool.workers[0].process.wait()
        assert len(pool.make(read_molecules(["CCO"]))[0].coordinates) == 3


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_pool_has_processes_of_its_own(copied):
    with ConformerPool(ConformerOptions(seed=4), workers=2) as pool:
        pool.make(read_molecules(["C"]))
        again = copied(pool)
        assert again.options == pool.options and len(again.workers) == 2
        assert not any(worker.process for worker in again.workers)
        again.close()
        assert len(pool.make(read_molecules(["CC"]))[0].coordinates) == 2


def test_a_pool_closes_and_starts_again():
    pool = ConformerPool()
    (first,) = pool.make(read_molecules(["CCO"]))
    process = pool.workers[0].process
    pool.close()
    assert process.poll() is not None
    (second,) = pool.make(read_molecules(["CCO"]))
    np.testing.assert_array_equal(first.coordinates, second.coordinates)
    process = pool.workers[0].process
    del pool
    assert process.poll() is not None


class _Molecules:
    """A data set that makes conformers where its items are asked for."""

    def __init__(self, smiles: list[str], pool: ConformerPool) -> None:
        self.molecules, self.pool = read_molecules(smiles), pool

    def __len__(self) -> int:
        return len(self.molecules)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        (found,) = self.pool.make([self.molecules[index]])
        return found.coordinates, self.pool.workers[0].process.pid


def _as_it_is(item: object) -> object:
    return item


def test_the_workers_of_a_data_loader_have_processes_of_their_own():
    """They are forks of a process whose pool has been at work already."""
    smiles = ["CCO", "c1ccccc1", "C", "CC(=O)O", "CN", "CCC", "C1CC1", "CCCl"]
    with ConformerPool() as pool:
        pool.make(read_molecules(["CCCC"]))
        own = pool.workers[0].process.pid
        loader = DataLoader(
            _Molecules(smiles, pool),
            batch_size=None,
            num_workers=2,
            collate_fn=_as_it_is,
            multiprocessing_context="fork",
            timeout=60,
        )
        items = list(loader)
        assert len({pid for _, pid in items}) == 2
        assert own not in {pid for _, pid in items}
        for source, (places, _) in zip(smiles, items, strict=True):
            np.testing.assert_array_equal(np.asarray(places), coordinates(source))
        assert len(pool.make(read_molecules(["CC"]))[0].coordinates) == 2
        assert pool.workers[0].process.pid == own


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ConformerOptions(seed=-1), r"seed must be from 0 to 2\*\*31 - 1, got -1"),
        (lambda: ConformerOptions(timeout=0), "timeout must be more than 0 seconds, got 0"),
        (lambda: ConformerPool(workers=0), "workers must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be(make, match):
    with pytest.raises(ValueError, match=match):
        make()
