"""Motif features in the loader against a loop over molecules, as published programs have in their
forward pass.

The 256 first known drugs of the held-out list, rows of prepared data. The loop reads every SMILES
with RDKit, matches patterns, joins groups and encodes them one by one.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from rdkit import Chem
from torch import Tensor

from bench.contest import OURS, Contender, Task, Work
from edt_former.chem import Molecule, motif_features, read_molecule
from edt_former.chem.motifs import MOTIF_WIDTH
from edt_former.graph import MotifFeatures
from edt_former.tasks.heldout import heldout_molecules

MOLECULES = 256
HETERO, MULTIPLE = Chem.MolFromSmarts("[!#6]"), Chem.MolFromSmarts("*=,#*")
ACETAL = Chem.MolFromSmarts("[CX4]([O,N,S])[O,N,S]")
ELEMENTS = {6: 0, 8: 1, 7: 2, 15: 3, 16: 4}
HALOGENS = (9, 17, 35, 53)
KINDS = {Chem.BondType.DOUBLE: 1, Chem.BondType.TRIPLE: 2, Chem.BondType.AROMATIC: 3}
ATOM_BINS, BOND_BINS = (11, 6, 6, 6, 6), (11, 8, 8, 8)


@cache
def molecules() -> list[Molecule]:
    return [read_molecule(s) for _, s in heldout_molecules()[:MOLECULES]]


def loop(smiles: str) -> list[list[int]]:
    """The 73 numbers of every motif of a molecule, one after another."""
    mol = Chem.MolFromSmiles(smiles)
    rings = [set(ring) for ring in Chem.GetSymmSSSR(mol)]
    merged = True
    while merged:
        merged = False
        for i in range(len(rings)):
            for j in range(i + 1, len(rings)):
                if len(rings[i] & rings[j]) > 2:
                    rings[i] |= rings.pop(j)
                    merged = True
                    break
            if merged:
                break
    marked = {
        atom for p in (HETERO, MULTIPLE, ACETAL) for m in mol.GetSubstructMatches(p) for atom in m
    }
    home, pairs = {atom: {atom} for atom in marked}, []
    for bond in mol.GetBonds():
        a, b = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        if bond.IsInRing():
            continue
        if a in marked and b in marked:
            joined = home[a] | home[b]
            home |= dict.fromkeys(joined & marked, joined)
        elif a in marked or b in marked:
            home[a if a in marked else b].update((a, b))
        else:
            pairs.append({a, b})
    groups = [*{id(group): group for group in home.values()}.values(), *pairs]
    kept = [g for g in groups if len(g) > 1 or not mol.GetAtomWithIdx(min(g)).IsInRing()]
    return [encoded(mol, group) for group in (*kept, *rings)]


def encoded(mol: Chem.Mol, group: set[int]) -> list[int]:
    atoms, halogens, others = [0] * 5, 0, 0
    for index in group:
        number = mol.GetAtomWithIdx(index).GetAtomicNum()
        if number in ELEMENTS:
            atoms[ELEMENTS[number]] += 1
        elif number in HALOGENS:
            halogens += 1
        else:
            others += 1
    bonds, ringed = [0] * 4, False
    for bond in mol.GetBonds():
        if bond.GetBeginAtomIdx() in group and bond.GetEndAtomIdx() in group:
            bonds[KINDS.get(bond.GetBondType(), 0)] += 1
            ringed |= bond.IsInRing()
    row = [0] * MOTIF_WIDTH
    place = 0
    for count, bins in zip(atoms, ATOM_BINS, strict=True):
        row[place + min(count, bins - 1)] = 1
        place += bins
    row[place], row[place + 1] = int(halogens > 0), int(others > 0)
    place += 2
    for count, bins in zip(bonds, BOND_BINS, strict=True):
        row[place + min(count, bins - 1)] = 1
        place += bins
    row[place] = int(ringed)
    return row


def sums(rows: Tensor, offsets: Tensor) -> Tensor:
    """Per molecule, which motifs do not depend on the order of."""
    owner = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    return torch.zeros(len(offsets) - 1, MOTIF_WIDTH).index_add(0, owner, rows.float())


def test_motifs(contest):
    torch.set_num_threads(1)

    def in_the_loader() -> Tensor:
        return sums(*MotifFeatures.pack(motif_features(molecules())))

    def by_loop() -> Tensor:
        found = [np.array(loop(m.smiles)).reshape(-1, MOTIF_WIDTH) for m in molecules()]
        return sums(*MotifFeatures.pack([rows.astype(np.uint8) for rows in found]))

    truth = (by_loop().double(),)
    contenders = [
        Contender(OURS, in_the_loader, truth),
        Contender("loop over molecules", by_loop, truth),
    ]
    size = MOTIF_WIDTH * sum(len(m) for m in motif_features(molecules()))
    contest(
        "motif features",
        f"{MOLECULES} drugs",
        Task((torch.zeros(1),), (), truth, 1),
        contenders,
        work=Work(2.0 * size),
        goals={"loop over molecules": 5.0},
        budget=3.0,
    )
