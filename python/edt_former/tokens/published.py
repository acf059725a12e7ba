"""Molecules cut as the published EDT-Former cuts them (arXiv:2602.02742)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edt_former.tokens.patches import PatchOptions
from edt_former.tokens.predictor import PUBLISHED_ELEMENTS, NextAtomPredictor
from edt_kernels import offsets_from_lengths

if TYPE_CHECKING:
    from edt_former.chem import Molecule

ENCODERS = ("both", "3d")
_HYDROGEN = 1
_LONG = (
    *("Cl", "Br", "Si", "Se", "Na", "Ca", "Li", "Mg", "Al", "Zn", "Cu", "Mn", "Fe", "Co", "Ni"),
    *("Ag", "Au", "Pt", "Pd", "Hg", "Sn", "Sb", "Te", "Xe", "Kr", "He", "Ne", "Ar"),
)
_TOKEN = re.compile("|".join((*_LONG, "[cnospb]", "[BCNOFPSI]")))
_INNER, _HEAD = "transformer.", "lm_head.weight"
_LINEAR = re.compile(r"\.c_(attn|proj|fc)\.weight$")


def read_tokens(smiles: str) -> list[str]:
    """The element symbols that the published program reads in a SMILES string.

    It scans the text, so what it reads are not always the atoms: a symbol that it does not know
    vanishes or falls apart, and letters of two atoms can look like one.

    Example:
        >>> read_tokens("CC(=O)Oc1ccccc1Cl")
        ['C', 'C', 'O', 'O', 'C', 'C', 'C', 'C', 'C', 'C', 'Cl']
        >>> read_tokens("[K+].[Cs+]"), read_tokens("OCoc")
        (['C', 'S'], ['O', 'Co', 'C'])
    """
    return [symbol if len(symbol) == 2 else symbol.upper() for symbol in _TOKEN.findall(smiles)]


@dataclass(frozen=True)
class PublishedPatchOptions(PatchOptions):
    """Patches of the published program for one molecule alone.

    Its molecules are to be read with `edt_former.chem.read_as_written`. Ids are given to the rows
    between the first and the last that represent a molecule: with `encoder` "both" its n 2D
    atoms, [CLS] and its 3D atoms; with "3d" its 3D atoms. An isotopic hydrogen is no 3D atom
    unless there is nothing else. Ids that are too many are cut off, rows that are too many take
    the last id. The predictor must have `vocabulary` "published".

    Args:
        sources: BRICS and entropy patches, as in the released models.
        encoder: "both", blended, or "3d", Uni-Mol alone.

    Raises:
        ValueError: an unknown encoder, or an option that the published program does not have.

    Example:
        >>> from edt_former.chem import read_as_written
        >>> brics = PublishedPatchOptions(sources=("brics",))
        >>> brics.find([read_as_written("[Na+].[Cl-]")], None)
        {'brics': [[0, 1, 1, 1, 1]]}
    """

    sources: tuple[str, ...] = ("brics", "entropy")
    rule: str = "published"
    encoder: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in ENCODERS:
            raise ValueError(
                f"encoder must be one of {', '.join(map(repr, ENCODERS))}, got {self.encoder!r}"
            )
        plain = asdict(PatchOptions(self.sources, "published")) | {"encoder": self.encoder}
        changed = [name for name, value in asdict(self).items() if plain[name] != value]
        if changed:
            raise ValueError(
                f"the published patches have no option {changed[0]!r}, "
                f"got {getattr(self, changed[0])!r}"
            )

    def cutting(self) -> dict[str, object]:
        """As of `PatchOptions`."""
        return {"rule": self.rule}

    def find(
        self, molecules: Sequence[Molecule], predictor: NextAtomPredictor | None
    ) -> dict[str, list[list[int]]]:
        """By source and molecule, the patch id of every row that is pooled.

        Args:
            molecules: their `smiles` is what is read.
            predictor: needed where `sources` names "entropy".

        Raises:
            ValueError: a molecule has no SMILES; the predictor has another vocabulary.
        """
        if any(not molecule.smiles for molecule in molecules):
            raise ValueError("published patches need a molecule's SMILES, got graph data only")
        rows = [self._rows(molecule) for molecule in molecules]
        ids = {}
        for source in self.sources:
            if source == "entropy":
                found = entropy_ids([molecule.smiles for molecule in molecules], predictor)
            else:
                # Connectors import this module and must not need RDKit.
                from edt_former.chem import brics_fragments

                found = [brics_fragments(molecule).tolist() for molecule in molecules]
            ids[source] = [_fitted(cut, n) for cut, n in zip(found, rows, strict=True)]
        return ids

    def _rows(self, molecule: Molecule) -> int:
        heavy = int(np.count_nonzero(molecule.elements != _HYDROGEN))
        spatial = heavy or molecule.num_atoms
        return molecule.num_atoms + 1 + spatial if self.encoder == "both" else spatial


def entropy_ids(smiles: Sequence[str], predictor: NextAtomPredictor) -> list[list[int]]:
    """The published patch ids of each SMILES string, one per symbol that `read_tokens` finds.

    The id of a symbol rises after a rising edge, above the 0.75-quantile, of the uncertainty of
    what comes *after* a symbol. Nothing is asked of the chemistry. Symbols that the predictor has
    no position for get no id.

    Raises:
        ValueError: the predictor has another vocabulary than the published one.

    Example:
        >>> predictor = NextAtomPredictor({"vocabulary": "published"}).eval()
        >>> [len(ids) for ids in entropy_ids(["CCO", "[K+]"], predictor)]
        [3, 0]
    """
    if predictor.config["vocabulary"] != "published":
        raise ValueError(
            "predictor must have the vocabulary 'published', "
            f"got {predictor.config['vocabulary']!r}"
        )
    most = predictor.positions - 2
    tokens = [read_tokens(text)[:most] for text in smiles]
    numbers = [PUBLISHED_ELEMENTS[symbol] for symbols in tokens for symbol in symbols]
    lengths = [len(symbols) for symbols in tokens]
    device = predictor.wte.weight.device
    elements = torch.tensor(numbers, dtype=torch.int64, device=device)
    offsets = offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64)).to(device)
    _, patches = predictor.patches(elements, offsets, rule="published")
    return [ids.tolist() for ids in patches.ids.split(lengths)]


def _fitted(ids: list[int], rows: int) -> list[int]:
    """`ids` cut or continued with the last one to `rows`; one patch where there are none."""
    last = ids[-1] if ids else 0
    return ids[:rows] + [last] * (rows - len(ids))


def predictor_from_gpt2(weights: Mapping[str, Tensor], *, heads: int = 2) -> NextAtomPredictor:
    """A next-atom predictor from the weights of the GPT-2 that the published program trains.

    Args:
        weights: of a `transformers.GPT2LMHeadModel` with the 39 published tokens; the head is tied
            to the token embeddings.
        heads: attention heads, which weights do not tell.

    Raises:
        ValueError: weights are missing, unexpected or of another shape.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> size = {"vocab_size": 39, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
        >>> config = GPT2Config(**size, bos_token_id=1, eos_token_id=2)
        >>> predictor_from_gpt2(GPT2LMHeadModel(config).state_dict()).config["positions"]
        16
    """
    state = state_from_gpt2(weights)
    missing = [name for name in ("wte.weight", "wpe.weight") if name not in state]
    if missing:
        raise ValueError(f"weights must hold {missing[0]}, got {', '.join(state) or 'none'}")
    layers = {name.split(".")[1] for name in state if name.startswith("h.")}
    model = NextAtomPredictor(
        {
            "layers": len(layers),
            "heads": heads,
            "width": state["wte.weight"].shape[1],
            "positions": state["wpe.weight"].shape[0],
            "vocabulary": "published",
        }
    )
    mine = model.state_dict()
    wrong = [
        name
        for name in sorted({*mine, *state})
        if name not in mine or name not in state or mine[name].shape != state[name].shape
    ]
    if wrong:
        raise ValueError(f"weights do not fit a GPT-2 of this size: {', '.join(wrong)}")
    model.load_state_dict(state)
    return model


def state_from_gpt2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a GPT-2 under the names and in the layout of a `NextAtomPredictor`.

    Raises:
        ValueError: the head is not tied to the token embeddings.
    """
    named = {name.removeprefix(_INNER): value for name, value in weights.items()}
    head = named.pop(_HEAD, None)
    if head is not None and not torch.equal(head, named.get("wte.weight", head)):
        raise ValueError(f"{_HEAD} must be tied to transformer.wte.weight, it differs")
    return {
        name: value.T.contiguous() if _LINEAR.search(name) else value
        for name, value in named.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


def gpt2_from_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `state_from_gpt2`: weights of a `transformers.GPT2LMHeadModel`.

    Example:
        >>> state = NextAtomPredictor({"layers": 1, "vocabulary": "published"}).state_dict()
        >>> weights = gpt2_from_state(state)
        >>> weights["transformer.h.0.mlp.c_fc.weight"].shape, weights["lm_head.weight"].shape
        (torch.Size([128, 512]), torch.Size([39, 128]))
        >>> all(torch.equal(x, state[name]) for name, x in state_from_gpt2(weights).items())
        True
    """
    weights = {
        f"{_INNER}{name}": value.T.contiguous() if _LINEAR.search(name) else value
        for name, value in state.items()
    }
    return {**weights, _HEAD: state["wte.weight"]}
