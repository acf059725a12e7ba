"""Molecules of a file with the model's answers; rows that cannot be read stay, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from edt_former.chem import ConformerPool, Invalid, Molecule, read_molecule
from edt_former.model import MoleculeLM
from edt_former.tasks.evaluation import LONGEST_ANSWER
from edt_former.tasks.questions import FACT_BY_KEY, facts, value_of

ROOM_TO_ASK = 64
"""Tokens kept for a question and its answer."""


@dataclass(frozen=True)
class AnsweredRow:
    """One row of a file.

    Attributes:
        name: as the file gives it, or the SMILES.
        smiles: as the file gives it.
        reason: why the row could not be answered, "" where it could.
        atoms: heavy atoms.
        tokens: in the prompt.
        patches: of these tokens, how many stand for patches.
        answers: by key; truth: by key, computed by RDKit.
    """

    name: str
    smiles: str
    reason: str = ""
    atoms: int = 0
    tokens: int = 0
    patches: int = 0
    answers: dict[str, str] | None = None
    truth: dict[str, str] | None = None


def answer_rows(
    model: MoleculeLM,
    rows: Iterable[tuple[str, str]],
    keys: tuple[str, ...],
    *,
    chunk: int = 64,
    workers: int = 1,
) -> Iterator[AnsweredRow]:
    """Ask about each (name, SMILES), in order; only `chunk` molecules are in memory at a time.

    Args:
        model: with its processor.
        rows: for instance `edt_former.chem.read_file(path)`.
        keys: of the facts to ask for, see `edt_former.tasks.questions.FACTS`.
        chunk: molecules in memory.
        workers: processes that make conformers where the graph encoder reads coordinates.

    >>> import edt_former
    >>> rows = [("ethanol", "CCO"), ("broken", "C1CC")]
    >>> for row in answer_rows(edt_former.load(), rows, ("rings",)):
    ...     print(row.name, row.truth or row.reason)
    ethanol {'rings': '0'}
    broken unclosed ring
    """
    rows = iter(rows)
    with ConformerPool(model.processor.conformers, workers=workers) as pool:
        while block := list(islice(rows, chunk)):
            read = _that_fit(model, [read_molecule(smiles) for _, smiles in block])
            if model.processor.conformers is not None:
                read = _placed(model, read, pool)
            answered = iter(_answer(model, [m for m in read if isinstance(m, Molecule)], keys))
            for (name, smiles), molecule in zip(block, read, strict=True):
                shown = name or smiles
                if isinstance(molecule, Invalid):
                    yield AnsweredRow(shown, smiles, reason=molecule.reason)
                    continue
                tokens, answers = next(answered)
                truth = facts(molecule)
                yield AnsweredRow(
                    shown,
                    smiles,
                    atoms=molecule.num_atoms,
                    tokens=tokens,
                    patches=tokens - model.connector.num_anchors,
                    answers=answers,
                    truth={key: truth[key] for key in keys},
                )


def _placed(
    model: MoleculeLM, read: list[Molecule | Invalid], pool: ConformerPool
) -> list[Molecule | Invalid]:
    """The same, with a reason in place of a molecule that has no conformer."""
    molecules = [molecule for molecule in read if isinstance(molecule, Molecule)]
    found = iter(model.processor.find_conformers(molecules, pool))
    placed = []
    for molecule in read:
        conformer = next(found) if isinstance(molecule, Molecule) else molecule
        placed.append(conformer if isinstance(conformer, Invalid) else molecule)
    return placed


def _that_fit(model: MoleculeLM, read: list[Molecule | Invalid]) -> list[Molecule | Invalid]:
    """The same, with a reason in place of a molecule that the prompt has no room for."""
    room = model.max_positions
    counts = iter(model.processor.token_counts([m for m in read if isinstance(m, Molecule)]))
    fitting = []
    for molecule in read:
        tokens = next(counts) if isinstance(molecule, Molecule) else 0
        if room is not None and tokens + ROOM_TO_ASK > room:
            reason = f"takes {tokens} tokens, the language model reads {room}"
            molecule = Invalid(molecule.smiles, reason)
        fitting.append(molecule)
    return fitting


def _answer(
    model: MoleculeLM, molecules: list[Molecule], keys: tuple[str, ...]
) -> list[tuple[int, dict[str, str]]]:
    """Tokens in the prompt, and the answers by key, of each molecule."""
    counts = model.processor.token_counts(molecules)
    texts = model.answer(
        [molecule for molecule in molecules for _ in keys],
        [FACT_BY_KEY[key].phrasings[0] for _ in molecules for key in keys],
        batch_size=256,
        max_new_tokens=LONGEST_ANSWER,
    )
    answers = []
    for i, count in enumerate(counts):
        said = texts[i * len(keys) : (i + 1) * len(keys)]
        answers.append((count, {k: value_of(t, k) or t for k, t in zip(keys, said, strict=True)}))
    return answers
