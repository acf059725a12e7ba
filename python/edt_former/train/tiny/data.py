"""The recipe's molecules: sampled, widened, split by scaffold and kept as packed arrays."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from rdkit import Chem, rdBase
from rdkit.Chem import BRICS, rdFingerprintGenerator, rdMolDescriptors
from rdkit.Chem.Scaffolds import MurckoScaffold
from tqdm import tqdm

import edt_kernels
from edt_former.chem import Invalid, Molecule, rdkit_mol, read_file, read_molecule
from edt_former.chem.features import ATOM_FEATURE_SIZES
from edt_former.graph.batch import GraphBatch
from edt_former.language.frozen import write_json
from edt_former.tasks.heldout import HeldOut
from edt_former.tasks.questions import FACTS, answer_ids

SOURCES = {
    "zinc250k_valid.smi": 14_000,
    "zinc250k_test.smi": 3_000,
    "zinc_qed_mols.smi.gz": 14_000,
    "zinc_drd2_mols.smi.gz": 5_000,
    "znp.50k.smi.gz": 16_000,
}
"""Files of ZINC molecules (the last: its natural products) and how many are drawn from each."""

PIECES, PAIRS, SALTS = 7_000, 8_000, 1_500
"""Molecules made of the drawn ones, for sizes and charges that ZINC's drug-like set lacks: BRICS
pieces (3 to 15 atoms), two molecules joined by a bond, and two molecules side by side."""

DESCRIPTORS = {
    "Chi0v": rdMolDescriptors.CalcChi0v,
    "Chi1v": rdMolDescriptors.CalcChi1v,
    "Chi2v": rdMolDescriptors.CalcChi2v,
    "Chi3v": rdMolDescriptors.CalcChi3v,
    "Chi4v": rdMolDescriptors.CalcChi4v,
    "Kappa1": rdMolDescriptors.CalcKappa1,
    "Kappa2": rdMolDescriptors.CalcKappa2,
    "Kappa3": rdMolDescriptors.CalcKappa3,
    "HallKierAlpha": rdMolDescriptors.CalcHallKierAlpha,
    "FractionCSP3": rdMolDescriptors.CalcFractionCSP3,
    "LabuteASA": rdMolDescriptors.CalcLabuteASA,
    "MolarRefractivity": lambda mol: rdMolDescriptors.CalcCrippenDescriptors(mol)[1],
}
FINGERPRINT_BITS = 192
SELF_SUPERVISED = (
    "masked atomic number",
    "masked number of hydrogens",
    "masked hybridisation",
    *DESCRIPTORS,
    f"Morgan counts, radius 1, {FINGERPRINT_BITS} bins",
)
"""What the graph encoder learns from; no fact that a question asks for is among them."""

HELD_OUT_SHARE = 4
"""Percent of the scaffolds that no training step sees."""


@dataclass(frozen=True)
class MoleculeTable:
    """M molecules as packed arrays.

    Attributes:
        atom_features: [N, 9], offsets: [M + 1] into the atoms.
        bond_index: [2, E2] atom indices within the molecule, bond_features: [E2, 3],
            bond_ends: [M + 1] into the bonds.
        answers: [M, len(FACTS)], see `edt_former.tasks.questions.answer_ids`.
        targets: [M, len(DESCRIPTORS) + FINGERPRINT_BITS], the graph encoder's.
        smiles: [M] canonical SMILES.
    """

    atom_features: np.ndarray
    offsets: np.ndarray
    bond_index: np.ndarray
    bond_features: np.ndarray
    bond_ends: np.ndarray
    answers: np.ndarray
    targets: np.ndarray
    smiles: np.ndarray

    def __len__(self) -> int:
        return len(self.answers)

    @classmethod
    def of(
        cls, molecules: Sequence[Molecule], answers: np.ndarray, targets: np.ndarray
    ) -> MoleculeTable:
        """A table of `molecules`, of `answers` [M, F] and `targets` [M, T]."""

        def ends(lengths: Iterator[int]) -> np.ndarray:
            return np.concatenate([[0], np.cumsum(list(lengths))]).astype(np.int64)

        return cls(
            atom_features=np.concatenate([m.atom_features for m in molecules]).astype(np.uint8),
            offsets=ends(m.num_atoms for m in molecules),
            bond_index=np.concatenate([m.bond_index for m in molecules], 1).astype(np.int16),
            bond_features=np.concatenate([m.bond_features for m in molecules]).astype(np.uint8),
            bond_ends=ends(m.bond_index.shape[1] for m in molecules),
            answers=answers,
            targets=targets,
            smiles=np.array([m.smiles for m in molecules]),
        )

    def molecules(self, rows: np.ndarray) -> list[Molecule]:
        """The molecules of `rows`, read again from their SMILES."""
        return [read_molecule(self.smiles[row]) for row in rows]

    def molecule(self, row: int) -> Molecule:
        """The molecule of `row`, from its arrays."""
        atoms = slice(*self.offsets[row : row + 2])
        bonds = slice(*self.bond_ends[row : row + 2])
        features = self.atom_features[atoms].astype(np.int64)
        return Molecule(
            smiles=str(self.smiles[row]),
            atom_features=features,
            bond_index=self.bond_index[:, bonds].astype(np.int64),
            bond_features=self.bond_features[bonds].astype(np.int64),
            order=np.arange(len(features)),
        )

    def take(self, rows: np.ndarray) -> MoleculeTable:
        """A table of the molecules of `rows`, in that order."""
        atoms, offsets = gather_ranges(self.offsets, rows)
        bonds, bond_ends = gather_ranges(self.bond_ends, rows)
        return MoleculeTable(
            atom_features=self.atom_features[atoms],
            offsets=offsets,
            bond_index=self.bond_index[:, bonds],
            bond_features=self.bond_features[bonds],
            bond_ends=bond_ends,
            answers=self.answers[rows],
            targets=self.targets[rows],
            smiles=self.smiles[rows],
        )

    def batch(self, rows: np.ndarray) -> GraphBatch:
        """The molecules of `rows`, packed in that order."""
        atoms, offsets = gather_ranges(self.offsets, rows)
        bonds, bond_offsets = gather_ranges(self.bond_ends, rows)
        shift = np.repeat(offsets[:-1], np.diff(bond_offsets))
        bond_index = torch.from_numpy(self.bond_index[:, bonds].astype(np.int64) + shift)
        atom_features = torch.from_numpy(self.atom_features[atoms].astype(np.int64))
        incoming = torch.bincount(bond_index[1], minlength=len(atoms))
        return GraphBatch(
            atom_features=atom_features,
            bond_index=bond_index,
            bond_features=torch.from_numpy(self.bond_features[bonds].astype(np.int64)),
            bond_offsets=edt_kernels.offsets_from_lengths(incoming),
            offsets=torch.from_numpy(offsets),
            elements=(atom_features[:, 0] + 1) % ATOM_FEATURE_SIZES[0],
        )

    def save(self, folder: Path) -> None:
        """One .npy file per array."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.__dataclass_fields__:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> MoleculeTable:
        """What `save` wrote."""
        return cls(*(np.load(folder / f"{name}.npy") for name in cls.__dataclass_fields__))


def gather_ranges(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of all entries of the ranges `rows` of `offsets`, and the offsets of the result.

    >>> gather_ranges(np.array([0, 2, 5]), np.array([1, 0]))
    (array([2, 3, 4, 0, 1]), array([0, 3, 5]))
    """
    lengths = offsets[rows + 1] - offsets[rows]
    ends = np.concatenate([[0], lengths.cumsum()])
    indices = np.repeat(offsets[rows] - ends[:-1], lengths) + np.arange(ends[-1])
    return indices, ends


def prepare(data: Path, folder: Path, *, seed: int, processes: int, scale: float = 1.0) -> None:
    """Read, widen and split the molecules of `data`; write `train`, `test` and `data.json`.

    A molecule that is on the held-out list of known drugs, or shares with one of them a Murcko
    scaffold of two rings or more, is left out of both. A salt is judged by each of its parts.

    Args:
        data: a folder with the files of `SOURCES`.
        folder: where to write.
        scale: share of the molecules to take, for a quick trial.

    Raises:
        FileNotFoundError: a file of `SOURCES` is missing; the message lists all that are.
        ValueError: too few molecules for two splits.
    """
    missing = [name for name in SOURCES if not (data / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{data} must hold {', '.join(SOURCES)}; missing: {', '.join(missing)}"
        )
    rng = random.Random(seed)
    drawn = []
    for name, count in SOURCES.items():
        smiles = [smiles for _, smiles in read_file(data / name)]
        drawn += rng.sample(smiles, min(len(smiles), int(count * scale)))
    jobs = [("drawn", text) for text in drawn]
    jobs += [("piece", rng.choice(drawn)) for _ in range(int(PIECES * scale))]
    jobs += [
        ("pair", f"{rng.choice(drawn)} {rng.choice(drawn)}") for _ in range(int(PAIRS * scale))
    ]
    jobs += [
        ("salt", f"{rng.choice(drawn)} {rng.choice(drawn)}") for _ in range(int(SALTS * scale))
    ]
    jobs = [(kind, text, rng.random()) for kind, text in jobs]

    records: dict[str, list] = {"train": [], "test": []}
    left_out: Counter[str] = Counter()
    seen = set()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for reason, record in tqdm(
            pool.imap(_record, jobs, chunksize=64), total=len(jobs), desc="molecules", unit="mol"
        ):
            if record is None:
                left_out[reason] += 1
            elif record["smiles"] in seen:
                left_out["seen before"] += 1
            else:
                seen.add(record["smiles"])
                records[record["split"]].append(record)
    sizes = {split: len(rows) for split, rows in records.items()}
    if 0 in sizes.values():
        raise ValueError(f"both splits must have molecules, got {sizes} at scale {scale}")
    for split, rows in records.items():
        random.Random(seed).shuffle(rows)
        _table(rows).save(folder / split)
    facts = {
        "files": {name: _sha256(data / name) for name in SOURCES},
        "molecules": sizes,
        "left_out": dict(left_out),
        "split": f"{HELD_OUT_SHARE} % of Murcko scaffolds, by sha256",
        "self_supervised": SELF_SUPERVISED,
        "questions": [fact.key for fact in FACTS],
    }
    write_json(folder / "data.json", facts)


@cache
def _held_out() -> HeldOut:
    return HeldOut()


def _record(job: tuple[str, str, float]) -> tuple[str, dict | None]:
    """(reason, None) for a molecule that is left out, ("", record) otherwise."""
    kind, text, draw = job
    with rdBase.BlockLogs():
        smiles = _MAKE[kind](text, random.Random(draw))
    molecule = read_molecule(smiles) if smiles else Invalid(text, "nothing left")
    if isinstance(molecule, Invalid):
        return f"invalid {kind}", None
    mol = rdkit_mol(molecule)
    parts = Chem.GetMolFrags(mol, asMols=True)
    if any(_held_out().excludes(part) for part in parts):
        return "held out", None
    split = "test" if any(_split(part) == "test" for part in parts) else "train"
    if kind != "drawn" and split == "test":
        return "scaffold of the test split", None
    fingerprint = _fingerprints().GetCountFingerprintAsNumPy(mol)
    descriptors = [describe(mol) for describe in DESCRIPTORS.values()]
    return "", {
        "smiles": molecule.smiles,
        "split": split,
        "molecule": molecule,
        "answers": answer_ids(mol).astype(np.int8),
        "targets": np.concatenate([descriptors, np.log1p(fingerprint)]).astype(np.float32),
    }


@cache
def _fingerprints() -> object:
    return rdFingerprintGenerator.GetMorganGenerator(radius=1, fpSize=FINGERPRINT_BITS)


def _split(mol: Chem.Mol) -> str:
    """The split of a scaffold; molecules without rings are for training."""
    scaffold = Chem.MolToSmiles(MurckoScaffold.GetScaffoldForMol(mol), isomericSmiles=False)
    if not scaffold:
        return "train"
    bucket = int.from_bytes(hashlib.sha256(scaffold.encode()).digest()[:4], "big") % 100
    return "test" if bucket < HELD_OUT_SHARE else "train"


def _piece(smiles: str, rng: random.Random) -> str | None:
    """One BRICS piece of 3 to 15 atoms, hydrogens where it was cut."""
    mol = Chem.MolFromSmiles(smiles)
    pieces = sorted(BRICS.BRICSDecompose(mol)) if mol is not None else []
    sized = []
    for piece in pieces:
        capped = Chem.MolFromSmiles(piece)
        for atom in capped.GetAtoms():
            if atom.GetAtomicNum() == 0:
                atom.SetIsotope(0)
                atom.SetAtomicNum(1)
        capped = Chem.RemoveHs(capped)
        if 3 <= capped.GetNumAtoms() <= 15:
            sized.append(Chem.MolToSmiles(capped))
    return rng.choice(sized) if sized else None


def _pair(smiles: str, rng: random.Random) -> str | None:
    """Two molecules joined by a single bond between atoms that carry a hydrogen."""
    first, second = (Chem.MolFromSmiles(text) for text in smiles.split())
    if first is None or second is None:
        return None
    joined = Chem.RWMol(Chem.CombineMols(first, second))
    ends = [a.GetIdx() for a in joined.GetAtoms() if a.GetTotalNumHs() and a.GetAtomicNum() == 6]
    border = first.GetNumAtoms()
    left, right = [i for i in ends if i < border], [i for i in ends if i >= border]
    if not left or not right:
        return None
    for end in (a := rng.choice(left), b := rng.choice(right)):
        atom = joined.GetAtomWithIdx(end)
        if atom.GetNumExplicitHs():
            atom.SetNumExplicitHs(atom.GetNumExplicitHs() - 1)
    joined.AddBond(a, b, Chem.BondType.SINGLE)
    return Chem.MolToSmiles(joined)


_COUNTERIONS = (
    "[Na+]",
    "[K+]",
    "[Cl-]",
    "Cl",
    "[Br-]",
    "O",
    "[Ca+2]",
    "OS(=O)(=O)O",
    "CS(=O)(=O)O",
)


def _salt(smiles: str, rng: random.Random) -> str:
    """A molecule beside a small counterion or a second molecule."""
    first, second = smiles.split()
    partner = rng.choice(_COUNTERIONS) if rng.random() < 0.8 else second
    return f"{first}.{partner}"


_MAKE = {"drawn": lambda smiles, _: smiles, "piece": _piece, "pair": _pair, "salt": _salt}


def _table(records: list[dict]) -> MoleculeTable:
    columns = ([record[name] for record in records] for name in ("molecule", "answers", "targets"))
    molecules, answers, targets = columns
    return MoleculeTable.of(molecules, np.stack(answers), np.stack(targets))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
