"""Where the atoms of a molecule lie in space, or the reason why that is not known."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import BinaryIO

import numpy as np
from rdkit import Chem
from rdkit.Chem import rdDepictor, rdDistGeom, rdForceFieldHelpers
from tqdm import tqdm

from edt_former.chem.molecule import Invalid, Molecule
from edt_former.chem.rdkit_log import quiet

_ATTEMPTS = 20
_STAGES = (
    {},
    {"useRandomCoords": True},
    # Cages (cubane's kin, fullerenes) contradict what is known of torsions and flat rings.
    {"useExpTorsionAnglePrefs": False, "useBasicKnowledge": False},
)
_GAP = 3.0  # angstrom between the fragments of a salt, before the force field draws them together
_FAR = 6.0  # angstrom to the next fragment, hydrogens included, of one that was driven off
_GRACE = 1.0  # seconds that RDKit's own clock may be late before its process is ended


@dataclass(frozen=True, eq=False)
class Conformer:
    """Coordinates of a molecule's atoms.

    Attributes:
        coordinates: float32 [n, 3] in angstrom, rows in the order of the `Molecule`.
        flat: they are those of a drawing, z = 0, because no conformer was found.
    """

    coordinates: np.ndarray
    flat: bool = False


@dataclass(frozen=True)
class ConformerOptions:
    """How conformers are made.

    Args:
        seed: of the embedding; the same SMILES and seed give the same coordinates.
        timeout: seconds for one molecule.
        flat: the coordinates of a drawing where no conformer is found, in place of the reason.

    Raises:
        ValueError: a negative seed, or a time that is not positive.
    """

    seed: int = 0
    timeout: float = 30.0
    flat: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be from 0 to 2**31 - 1, got {self.seed}")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be more than 0 seconds, got {self.timeout}")


def make_conformer(
    molecule: Molecule, options: ConformerOptions | None = None
) -> Conformer | Invalid:
    """One conformer, or an `Invalid` with the reason.

    Hydrogens are added, ETKDGv3 (doi:10.1021/acs.jcim.0c00025) embeds the molecule, MMFF94
    (200 steps) relaxes it where it knows all atoms, and the added hydrogens go again. Where ETKDGv3
    fails it starts from random coordinates, then without knowledge of torsions. The fragments of a
    salt are embedded apart, laid side by side, and relaxed together, or each alone where they would
    drive one another off.

    RDKit looks at the clock between its attempts only, so a large molecule can take longer than
    `timeout`: `ConformerPool` ends it in time.

    Example:
        >>> from edt_former.chem import read_molecule
        >>> conformer = make_conformer(read_molecule("CO"))
        >>> conformer.coordinates.shape, conformer.flat
        ((2, 3), False)
        >>> bool(1.3 < np.linalg.norm(np.diff(conformer.coordinates, axis=0)) < 1.5)
        True
    """
    options = options or ConformerOptions()
    if not molecule.smiles:
        return Invalid("", "a conformer needs a molecule's SMILES, got graph data without one")
    result = _conformer(molecule.smiles, options)
    return _flat(molecule.smiles) if isinstance(result, Invalid) and options.flat else result


def make_conformers(
    molecules: Iterable[Molecule | Invalid],
    options: ConformerOptions | None = None,
    *,
    workers: int = 1,
    progress: bool = False,
) -> list[Conformer | Invalid]:
    """A conformer of every molecule, or the reason why not; see `ConformerPool`.

    Example:
        >>> from edt_former.chem import read_molecules
        >>> found = make_conformers(read_molecules(["CCO", "C1CC", "[Na+]"]))
        >>> [item.reason if isinstance(item, Invalid) else len(item.coordinates) for item in found]
        [3, 'unclosed ring', 1]
    """
    with ConformerPool(options, workers=workers) as pool:
        return pool.make(molecules, progress=progress)


class ConformerPool:
    """Processes that make conformers, and are ended when a molecule takes too long.

    Processes start when they are first needed and stay until `close`, or until the pool is gone.
    A copy of a pool starts its own, be it pickled, forked or copied.

    Args:
        options: of all conformers.
        workers: number of processes.

    Example:
        >>> from edt_former.chem import read_molecules
        >>> with ConformerPool(workers=2) as pool:
        ...     found = pool.make(read_molecules(["CCO", "CC"]))
        >>> [len(item.coordinates) for item in found]
        [3, 2]
    """

    def __init__(self, options: ConformerOptions | None = None, *, workers: int = 1) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.options = options or ConformerOptions()
        self.workers = [_Worker() for _ in range(workers)]

    def make(
        self, molecules: Iterable[Molecule | Invalid], *, progress: bool = False
    ) -> list[Conformer | Invalid]:
        """A conformer of every molecule in the same order, or an `Invalid`; `progress` shows a bar.

        What is `Invalid` already stays as it is.
        """
        items = list(molecules)
        free: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self.workers:
            free.put(worker)

        def make(item: Molecule | Invalid) -> Conformer | Invalid:
            if isinstance(item, Invalid):
                return item
            worker = free.get()
            try:
                return worker.make(item, self.options)
            finally:
                free.put(worker)

        with ThreadPoolExecutor(len(self.workers)) as threads:
            found = threads.map(make, items)
            bar = tqdm(found, "making conformers", len(items), unit="mol", disable=not progress)
            return list(bar)

    def close(self) -> None:
        """Ends the processes; the next `make` starts new ones."""
        for worker in self.workers:
            worker.close()

    def __enter__(self) -> ConformerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, ...]:
        return _pool, (self.options, len(self.workers))


def _pool(options: ConformerOptions, workers: int) -> ConformerPool:
    return ConformerPool(options, workers=workers)


class _Worker:
    """A process of `serve`, started when there is something to do."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.owner: int | None = None  # who started it: a fork of the owner has a copy of this

    def make(self, molecule: Molecule, options: ConformerOptions) -> Conformer | Invalid:
        if not self._mine() or self.process.poll() is not None:
            self.close()
            self.process, self.owner = _start(), os.getpid()
        process, late = self.process, threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        clock = threading.Timer(options.timeout + _GRACE, end)
        clock.start()
        try:
            # The drawing is made here: it must come out where the process is ended.
            pickle.dump((molecule, replace(options, flat=False)), process.stdin)
            process.stdin.flush()
            result = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.close()
            reason = _too_long(options) if late.is_set() else "RDKit crashed"
            result = Invalid(molecule.smiles, reason)
        finally:
            clock.cancel()
        if isinstance(result, Invalid) and options.flat and molecule.smiles:
            return _flat(molecule.smiles)
        return result

    def close(self) -> None:
        if self._mine():
            self.process.kill()
            self.process.communicate()
        self.process = None

    def _mine(self) -> bool:
        return self.process is not None and self.owner == os.getpid()

    def __del__(self) -> None:
        self.close()


def _start() -> subprocess.Popen:
    """A process that answers requests; it has started when this returns.

    `multiprocessing` would run the caller's script again in it, and has none to offer inside the
    worker of a data loader.
    """
    command = f"from {__name__} import serve; serve()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    if process.stdout.read(1) != b"+":
        raise RuntimeError(f"{sys.executable} could not start a process that makes conformers")
    return process


def serve(requests: BinaryIO | None = None, answers: BinaryIO | None = None) -> None:
    """Answers pickled (molecule, options) with their conformers until the input ends.

    What runs in the processes of a `ConformerPool`, on their standard input and output.
    """
    requests = requests or sys.stdin.buffer
    answers = answers or sys.stdout.buffer
    answers.write(b"+")
    answers.flush()
    while True:
        try:
            molecule, options = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(make_conformer(molecule, options), answers)
        answers.flush()


def _conformer(smiles: str, options: ConformerOptions) -> Conformer | Invalid:
    try:
        with quiet():
            mol = Chem.MolFromSmiles(smiles)
            return Conformer(_heavy(_embedded(mol, options), mol.GetNumAtoms()))
    except (ValueError, RuntimeError) as error:
        return Invalid(smiles, str(error))


def _flat(smiles: str) -> Conformer:
    mol = Chem.MolFromSmiles(smiles)
    rdDepictor.Compute2DCoords(mol)
    return Conformer(_heavy(mol, mol.GetNumAtoms()), flat=True)


def _heavy(mol: Chem.Mol, atoms: int) -> np.ndarray:
    """The coordinates of the first atoms: hydrogens that were added stand behind them."""
    coordinates = mol.GetConformer().GetPositions()[:atoms].astype(np.float32)
    if not np.isfinite(coordinates).all():
        raise ValueError("the force field drove the atoms apart")
    return coordinates


def _embedded(mol: Chem.Mol, options: ConformerOptions) -> Chem.Mol:
    """The molecule with hydrogens and one conformer."""
    deadline = time.monotonic() + options.timeout
    mol = Chem.AddHs(mol)
    for stage in _STAGES:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ValueError(_too_long(options))
        parameters = rdDistGeom.ETKDGv3()
        parameters.randomSeed = options.seed
        parameters.maxIterations = _ATTEMPTS
        parameters.timeout = math.ceil(left)
        for name, value in stage.items():
            setattr(parameters, name, value)
        if rdDistGeom.EmbedMolecule(mol, parameters) >= 0:
            break
    else:
        late = time.monotonic() >= deadline
        raise ValueError(_too_long(options) if late else "RDKit cannot embed the molecule")
    _lay_side_by_side(mol)
    if rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
        mol = _relaxed(mol)
    if time.monotonic() >= deadline:
        raise ValueError(_too_long(options))
    return mol


def _relaxed(mol: Chem.Mol) -> Chem.Mol:
    alone = Chem.Mol(mol)
    rdForceFieldHelpers.MMFFOptimizeMolecule(mol, ignoreInterfragInteractions=False)
    if _together(mol):
        return mol
    rdForceFieldHelpers.MMFFOptimizeMolecule(alone, ignoreInterfragInteractions=True)
    return alone


def _together(mol: Chem.Mol) -> bool:
    """Whether every fragment is near to another, and all are joined so."""
    positions = mol.GetConformer().GetPositions()
    joined, *others = (positions[list(fragment)] for fragment in Chem.GetMolFrags(mol))
    while others:
        gaps = [np.linalg.norm(joined[:, None] - other, axis=-1).min() for other in others]
        nearest = int(np.argmin(gaps))
        if gaps[nearest] > _FAR:
            return False
        joined = np.concatenate([joined, others.pop(nearest)])
    return True


def _too_long(options: ConformerOptions) -> str:
    return f"no conformer within {options.timeout:g} s"


def _lay_side_by_side(mol: Chem.Mol) -> None:
    """RDKit embeds every fragment around the origin; they come to stand in a row."""
    fragments = Chem.GetMolFrags(mol)
    if len(fragments) == 1:
        return
    conformer = mol.GetConformer()
    positions, edge = conformer.GetPositions(), 0.0
    for fragment in fragments:
        atoms = list(fragment)
        x = positions[atoms, 0]
        positions[atoms, 0] += edge - x.min()
        edge += x.max() - x.min() + _GAP
    conformer.SetPositions(positions)
