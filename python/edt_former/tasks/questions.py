"""Questions about a molecule whose answers RDKit computes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from rdkit import Chem
from rdkit.Chem import rdMolDescriptors

from edt_former.chem import FUNCTIONAL_GROUPS, Molecule, functional_groups, rdkit_mol

Kind = Literal["count", "charge", "range", "group"]

COUNT_ANSWERS = (*map(str, range(16)), "16+")
CHARGE_ANSWERS = ("-3", "-2", "-1", "0", "+1", "+2", "+3")
GROUP_ANSWERS = ("no", "yes")

LOGP_EDGES = (0, 1, 2, 3, 4, 5)
POLAR_SURFACE_EDGES = (40, 60, 80, 100, 140)
"""Square angstrom. A value on an edge belongs to the range above it, here and for logP."""


@dataclass(frozen=True)
class Fact:
    """One thing that can be asked about every molecule.

    Attributes:
        key: what is asked, in the field's words.
        kind: "count", "charge", "range" or "group" (is there such a group).
        answers: all the answers there are, in rising order.
        phrasings: ways to ask; the first is the canonical one.
        synonyms: other words for the key.
    """

    key: str
    kind: Kind
    answers: tuple[str, ...]
    phrasings: tuple[str, ...]
    synonyms: tuple[str, ...] = ()


def _count(key: str, *synonyms: str, unasked: tuple[str, ...] = ()) -> Fact:
    asked = (key, key, key, *synonyms, key)[: 5 if synonyms else 4]
    templates = (
        "How many {} does the molecule have?",
        "What is the number of {}?",
        "Count the {} of this molecule, how many are there?",
        "How many {} are there in this compound?",
        "How many {} can you find?",
    )
    phrasings = tuple(t.format(words) for t, words in zip(templates, asked, strict=False))
    return Fact(key, "count", COUNT_ANSWERS, phrasings, synonyms + unasked)


def _range(key: str, edges: tuple[int, ...], *synonyms: str) -> Fact:
    answers = (
        f"below {edges[0]}",
        *(f"{low} to {high}" for low, high in pairwise(edges)),
        f"above {edges[-1]}",
    )
    phrasings = (
        f"In which range is the {key}?",
        f"What is the {key} of the molecule?",
        f"How large is the {key}?",
        f"Estimate the {key}, which range does it fall into?",
        *(f"What is the {words} of this compound?" for words in synonyms[:2]),
    )
    return Fact(key, "range", answers, phrasings, synonyms)


def _group(key: str, *synonyms: str) -> Fact:
    def with_article(words: str) -> str:
        return ("an " if words[0] in "aeiou" else "a ") + words

    phrasings = (
        f"Does the molecule have {with_article(key)}?",
        f"Is there {with_article(key)} in this molecule?",
        f"Does this compound contain {with_article(key)}?",
        f"Is {with_article(key)} present?",
        *(f"Can you find {with_article(words)} here?" for words in synonyms[:1]),
    )
    return Fact(key, "group", GROUP_ANSWERS, phrasings, synonyms)


FACTS = (
    _count("rings"),
    _count("aromatic rings", unasked=("rings are aromatic",)),
    _count("hydrogen-bond donors", "H-bond donors", "donors"),
    _count("hydrogen-bond acceptors", "H-bond acceptors", "acceptors"),
    _count("stereocentres", "stereocenters", "chiral centres", "chiral centers"),
    _count("rotatable bonds"),
    _count("nitrogen atoms", "nitrogens"),
    _count("oxygen atoms", "oxygens"),
    _count("sulfur atoms", "sulphur atoms", "sulfurs"),
    _count("halogen atoms", "halogens"),
    Fact(
        "formal charge",
        "charge",
        CHARGE_ANSWERS,
        (
            "What is the formal charge of the molecule?",
            "What is the total formal charge?",
            "Which formal charge does this compound carry?",
            "What is the net charge of this molecule?",
        ),
        ("net charge", "charge"),
    ),
    _range("logP", LOGP_EDGES, "octanol-water partition coefficient", "lipophilicity", "log P"),
    _range(
        "polar surface area", POLAR_SURFACE_EDGES, "topological polar surface area", "TPSA", "PSA"
    ),
    _group("carboxylic acid", "carboxyl group"),
    _group("ester", "ester group"),
    _group("amide", "amide group"),
    _group("amine", "amino group"),
    _group("hydroxyl group", "hydroxy group", "hydroxyl", "alcohol or phenol"),
    _group("ether", "ether group"),
    _group("ketone", "ketone group"),
    _group("sulfonamide", "sulphonamide"),
    _group("nitrile", "cyano group"),
    _group("nitro group"),
)
"""Every fact, in the order of `answer_ids`."""

FACT_BY_KEY = {fact.key: fact for fact in FACTS}

QUESTION_TYPES = {
    "ring count": ("rings",),
    "aromatic ring count": ("aromatic rings",),
    "functional groups": tuple(FUNCTIONAL_GROUPS),
    "donors": ("hydrogen-bond donors",),
    "acceptors": ("hydrogen-bond acceptors",),
    "stereocentres": ("stereocentres",),
    "rotatable bonds": ("rotatable bonds",),
    "hetero atoms": ("nitrogen atoms", "oxygen atoms", "sulfur atoms", "halogen atoms"),
    "formal charge": ("formal charge",),
    "logP": ("logP",),
    "polar surface area": ("polar surface area",),
}
"""The kinds of question that a report lists, and the facts each averages over."""


def answer_ids(molecule: Molecule | Chem.Mol) -> np.ndarray:
    """Index of the true answer of each fact into its `Fact.answers`, int64 [len(FACTS)].

    RDKit is the judge: its ring set, strict rotatable bonds, Lipinski-like donors and acceptors,
    stereocentres whether assigned or not, Crippen logP (doi:10.1021/ci990307l) and topological
    polar surface area (doi:10.1021/jm000942e). Counts above 15 share the last answer; charges
    are clipped to three.

    >>> answer_ids(Chem.MolFromSmiles("c1ccccc1"))[:2].tolist()
    [1, 1]
    """
    mol = rdkit_mol(molecule) if isinstance(molecule, Molecule) else molecule
    elements = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.int64)
    counts = (
        rdMolDescriptors.CalcNumRings(mol),
        rdMolDescriptors.CalcNumAromaticRings(mol),
        rdMolDescriptors.CalcNumHBD(mol),
        rdMolDescriptors.CalcNumHBA(mol),
        rdMolDescriptors.CalcNumAtomStereoCenters(mol),
        rdMolDescriptors.CalcNumRotatableBonds(mol),
        np.count_nonzero(elements == 7),
        np.count_nonzero(elements == 8),
        np.count_nonzero(elements == 16),
        np.count_nonzero(np.isin(elements, (9, 17, 35, 53))),
    )
    log_p, _ = rdMolDescriptors.CalcCrippenDescriptors(mol)
    return np.array(
        [
            *(min(count, len(COUNT_ANSWERS) - 1) for count in counts),
            min(max(Chem.GetFormalCharge(mol), -3), 3) + 3,
            np.searchsorted(LOGP_EDGES, log_p, side="right"),
            np.searchsorted(POLAR_SURFACE_EDGES, rdMolDescriptors.CalcTPSA(mol), side="right"),
            *functional_groups(mol).values(),
        ],
        dtype=np.int64,
    )


def facts(molecule: Molecule | Chem.Mol) -> dict[str, str]:
    """The true answer of each fact, by key.

    >>> answers = facts(Chem.MolFromSmiles("CC(=O)Oc1ccccc1C(=O)O"))
    >>> answers["rings"], answers["logP"], answers["ester"]
    ('1', '1 to 2', 'yes')
    """
    ids = answer_ids(molecule).tolist()
    return {fact.key: fact.answers[i] for fact, i in zip(FACTS, ids, strict=True)}


def answer_text(key: str, answer: str) -> str:
    """The statement that a model learns to make: the key, echoed, and the answer.

    Raises:
        ValueError: no such key, or no such answer to it.

    >>> answer_text("rings", "3")
    'rings: 3'
    """
    if key not in FACT_BY_KEY:
        raise ValueError(f"key must be one of {', '.join(FACT_BY_KEY)}, got {key!r}")
    if answer not in FACT_BY_KEY[key].answers:
        allowed = ", ".join(FACT_BY_KEY[key].answers)
        raise ValueError(f"answer to {key!r} must be one of {allowed}, got {answer!r}")
    return f"{key}: {answer}"


def parse_answer(text: str) -> tuple[str, str] | None:
    """The first statement "key: answer" in a text; None when there is none or its answer is none.

    >>> parse_answer("rings: 3. aromatic rings: 1")
    ('rings', '3')
    >>> parse_answer("rings: many. aromatic rings: 1") is None
    True
    """
    start = _STATEMENT.search(text)
    if start is None:
        return None
    key = _KEY_BY_LOWER[start[1].lower()]
    answer = _ANSWER[key].match(text, start.end())
    return (key, answer[1].lower()) if answer else None


def value_of(text: str, key: str) -> str | None:
    """The answer that a text gives to the question for `key`; None where it gives none.

    >>> value_of("rings: 3", "rings"), value_of("rings: 3", "amide")
    ('3', None)
    """
    said = parse_answer(text)
    return said[1] if said is not None and said[0] == key else None


def match_question(text: str) -> str | None:
    """The key that a question asks for; None when it names no fact, or more than one.

    A question is one of the phrasings, or it names a key or a synonym in words of its own. Words
    that would narrow the key ("heteroaromatic rings", "ring atoms", "rings that are saturated")
    make it another question, and so does asking for the number of what is there or not.

    >>> match_question("how many aromatic rings are there")
    'aromatic rings'
    >>> match_question("Is the molecule toxic?") is None
    True
    """
    words = _normalise(text)
    if words in _KEY_BY_PHRASING:
        return _KEY_BY_PHRASING[words]
    found = list(_STEMS.finditer(words))
    named = {_KEY_BY_STEM[m[2]] if (m[1] or "") in _BEFORE_A_KEY else None for m in found}
    key = named.pop() if len(named) == 1 else None
    if key is None or (FACT_BY_KEY[key].kind != "count" and _NUMBER.search(words)):
        return None
    rest = _THERE.sub("", words[found[-1].end() :]).split()
    narrowed = (rest and rest[0] not in _AFTER_A_KEY) or not _NARROWING.isdisjoint(rest)
    return None if narrowed else key


def _any_of(words: tuple[str, ...] | list[str]) -> str:
    """A pattern of alternatives, the longest first."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


def _normalise(text: str) -> str:
    return " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower()).split())


_KEY_BY_LOWER = {key.lower(): key for key in FACT_BY_KEY}
_STATEMENT = re.compile(rf"(?<!\w)({_any_of(list(FACT_BY_KEY))})\s*:\s*", re.IGNORECASE)
_ANSWER = {
    fact.key: re.compile(rf"({_any_of(fact.answers)})(?![\w+]|[.,-]\d)", re.IGNORECASE)
    for fact in FACTS
}

_KEY_BY_PHRASING = {_normalise(text): fact.key for fact in FACTS for text in fact.phrasings}
_KEY_BY_STEM = {
    _normalise(words).removesuffix("s"): fact.key
    for fact in FACTS
    for words in (fact.key, *fact.synonyms)
}
_STEMS = re.compile(rf"(?:\b(\w+) )??\b({_any_of(list(_KEY_BY_STEM))})s?\b")
_NUMBER = re.compile(r"\b(how many|number|count)\b")
_THERE = re.compile(r"\b(are|is) (there|present|found)\b")
_NARROWING = frozenset(["are", "is", "not", "that", "which", "whose", "with", "without", "except"])
_AFTER_A_KEY = frozenset(
    [
        "can",
        "could",
        "do",
        "does",
        "for",
        "group",
        "groups",
        "here",
        "in",
        "of",
        "on",
        "please",
        "present",
        "there",
        "within",
    ]
)
_BEFORE_A_KEY = frozenset(
    [
        "a",
        "an",
        "any",
        "and",
        "are",
        "contain",
        "count",
        "do",
        "find",
        "has",
        "have",
        "is",
        "its",
        "many",
        "no",
        "of",
        "or",
        "some",
        "the",
        "this",
        "total",
        "which",
        "what",
    ]
) | {""}
