"""The next-atom predictor: how surprising is an atom, given the atoms before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edt_kernels
from edt_former.tokens.rows import molecule_of_rows

PAD, BOS, EOS, UNKNOWN = range(4)
NUM_ELEMENTS = 118
VOCABULARY_SIZE = 4 + NUM_ELEMENTS
PUBLISHED_ELEMENTS = {
    **{"Ag": 47, "Al": 13, "Ar": 18, "Au": 79, "B": 5, "Br": 35, "C": 6, "Ca": 20, "Cl": 17},
    **{"Co": 27, "Cu": 29, "F": 9, "Fe": 26, "He": 2, "Hg": 80, "I": 53, "Kr": 36, "Li": 3},
    **{"Mg": 12, "Mn": 25, "N": 7, "Na": 11, "Ne": 10, "Ni": 28, "O": 8, "P": 15, "Pd": 46},
    **{"Pt": 78, "S": 16, "Sb": 51, "Se": 34, "Si": 14, "Sn": 50, "Te": 52, "Xe": 54, "Zn": 30},
}
"""The elements of the published predictor in the order of its tokens, which start at 3."""

VOCABULARIES = ("elements", "published")


def atom_tokens(elements: Tensor) -> Tensor:
    """Token of every atom: 3 + its atomic number; `UNKNOWN` outside 1..118.

    Example:
        >>> import torch
        >>> atom_tokens(torch.tensor([1, 6, 0])).tolist()
        [4, 9, 3]
    """
    known = (elements >= 1) & (elements <= NUM_ELEMENTS)
    return torch.where(known, elements + UNKNOWN, UNKNOWN)


@dataclass(frozen=True)
class PredictorConfig:
    """Options of a next-atom predictor.

    Args:
        layers, heads, width: of the transformer.
        positions: the longest sequence it is trained on.
        vocabulary: "elements", all 118 and an unknown; or "published", the 36 elements of
            `PUBLISHED_ELEMENTS` without an unknown: any other reads as `<eos>`.
    """

    layers: int = 2
    heads: int = 2
    width: int = 128
    positions: int = 512
    vocabulary: str = "elements"

    def __post_init__(self) -> None:
        if self.vocabulary not in VOCABULARIES:
            raise ValueError(
                f"vocabulary must be one of {', '.join(map(repr, VOCABULARIES))}, "
                f"got {self.vocabulary!r}"
            )
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads {self.heads}, got {self.width}")
        if self.positions < 2:
            raise ValueError(f"positions must be at least 2, got {self.positions}")


class NextAtomPredictor(nn.Module):
    """A small GPT-2 over the atoms of molecules, one token per heavy atom (arXiv:2602.02742).

    The vocabulary is `<pad> <bos> <eos> <unk>` and the 118 elements by atomic number, unless
    `PredictorConfig` says otherwise. A molecule
    reads `<bos> a_1 .. a_n` and is trained to say `a_1 .. a_n <eos>`. Parameters have GPT-2's
    names (linear weights as [out, in]); the head is tied to `wte`.

    A molecule with more rows than `positions` is scored in windows that start half a window
    apart, each read as a molecule of its own; an atom's row is that of the window which sees
    most atoms before it.

    Args:
        config: fields of `PredictorConfig`.

    Example:
        >>> import torch
        >>> model = NextAtomPredictor({"layers": 1, "width": 16})
        >>> model(torch.tensor([6, 8, 6]), torch.tensor([0, 2, 3])).shape
        torch.Size([3, 122])
    """

    def __init__(self, config: Mapping[str, int] | None = None) -> None:
        super().__init__()
        options = PredictorConfig(**(config or {}))
        self.config = asdict(options)
        self.positions = options.positions
        published = options.vocabulary == "published"
        every = torch.arange(NUM_ELEMENTS + 1)
        tokens = _published_tokens() if published else atom_tokens(every)
        self.register_buffer("token_of_element", tokens, persistent=False)
        size = EOS + 1 + len(PUBLISHED_ELEMENTS) if published else VOCABULARY_SIZE
        self.wte = nn.Embedding(size, options.width)
        self.wpe = nn.Embedding(options.positions, options.width)
        self.h = nn.ModuleList(_Block(options.width, options.heads) for _ in range(options.layers))
        self.ln_f = nn.LayerNorm(options.width)
        self._initialise()

    def forward(
        self, elements: Tensor, offsets: Tensor, *, end: bool = False, longest: int | None = None
    ) -> Tensor:
        """Logits of the next atom.

        Args:
            elements: int64 [N], atomic numbers.
            offsets: [B + 1], the atoms of each molecule.
            end: also the row that predicts the end of each molecule.
            longest: at least the most atoms of a molecule. Without it a batch of more than
                `positions` atoms is looked at, for which a GPU is waited for; so are molecules
                that need windows.

        Returns:
            [N, V]: row i predicts atom i from the atoms before it, the first from `<bos>`. With
            `end`, [N + B, V]: molecule m has one more row, so its rows start at `offsets[m] + m`.
            Rows of atoms from offsets[-1] on hold anything.

        Raises:
            ValueError: offsets that decrease, do not start at 0 or end beyond the atoms.
        """
        rows = offsets + torch.arange(len(offsets), device=offsets.device) if end else offsets
        num_rows = elements.shape[0] + (len(offsets) - 1 if end else 0)
        tokens = self.tokens(elements)
        most = elements.shape[0] if longest is None else longest
        if most + end <= self.positions or rows.diff().max() <= self.positions:
            hidden = self._hidden(tokens, offsets[:-1], rows, num_rows)
        else:
            hidden = self._windowed(tokens, offsets, rows, num_rows)
        return F.linear(hidden, self.wte.weight)

    def loss(self, elements: Tensor, offsets: Tensor) -> Tensor:
        """Mean negative log-likelihood in nats of all atoms and ends; N must be offsets[-1]."""
        logits = self(elements, offsets, end=True)
        targets = torch.full(logits.shape[:1], EOS, device=logits.device)
        targets[self._rows_with_end(elements, offsets)] = self.tokens(elements)
        return F.cross_entropy(logits, targets)

    def tokens(self, elements: Tensor) -> Tensor:
        """The token [N] of atomic numbers [N]."""
        known = (elements >= 1) & (elements <= NUM_ELEMENTS)
        return self.token_of_element[torch.where(known, elements, 0)]

    def entropies(self, elements: Tensor, offsets: Tensor, *, unit: str = "nats") -> Tensor:
        """Uncertainty [N] of every atom given the atoms before it, in nats or bits."""
        return edt_kernels.entropy(self(elements, offsets), unit=unit)

    def surprisals(
        self, elements: Tensor, offsets: Tensor, *, longest: int | None = None
    ) -> Tensor:
        """-ln p [N] of every atom given the atoms before it, in nats; N must be offsets[-1]."""
        logits = self(elements, offsets, longest=longest)
        return F.cross_entropy(logits, self.tokens(elements), reduction="none")

    @torch.no_grad()
    def patches(
        self,
        elements: Tensor,
        offsets: Tensor,
        *,
        longest: int | None = None,
        rule: str = "local_max",
        **cut: object,
    ) -> tuple[Tensor, edt_kernels.Patches]:
        """Entropies [N] in nats, and the patches that they cut.

        With rule "published" an atom's entropy is the uncertainty *after* it, as in the published
        EDT-Former; otherwise the uncertainty of the atom itself.

        Args:
            elements: int64 [N], atomic numbers.
            offsets: [B + 1], the atoms of each molecule.
            longest: as of `forward`.
            rule: of `edt_kernels.find_patches`.
            cut: further options of `edt_kernels.entropy_patches`: `q`, `threshold`, `min_size`,
                `max_size`, `max_patches`, `unit`.
        """
        after = rule == "published"
        logits = self(elements, offsets, end=after, longest=longest)
        if after:
            logits = logits[self._rows_with_end(elements, offsets) + 1]
        return edt_kernels.entropy_patches(logits, offsets, rule=rule, **cut)

    @staticmethod
    def _rows_with_end(elements: Tensor, offsets: Tensor) -> Tensor:
        """Where each atom's row [N] lies when every molecule has an end row."""
        molecule = molecule_of_rows(offsets, elements.shape[0])
        return torch.arange(elements.shape[0], device=elements.device) + molecule

    def _hidden(self, tokens: Tensor, first: Tensor, offsets: Tensor, rows: int) -> Tensor:
        """Hidden states [rows, width] of sequences `<bos> tokens[first:]` cut by `offsets`."""
        sequence = molecule_of_rows(offsets, rows)
        position = torch.arange(rows, device=tokens.device) - offsets[sequence]
        before = first[sequence] + position - 1
        inputs = tokens.new_full((rows,), BOS)
        if tokens.shape[0]:
            inputs = torch.where(position == 0, BOS, tokens[before.clamp(min=0)])
        x = self.wte(inputs) + self.wpe(position.clamp(max=self.positions - 1))
        for block in self.h:
            x = block(x, offsets)
        return self.ln_f(x)

    def _windowed(self, tokens: Tensor, offsets: Tensor, rows: Tensor, num_rows: int) -> Tensor:
        """`_hidden` of the molecules in overlapping windows, each row from its best window."""
        size, stride = self.positions, self.positions // 2
        lengths = rows.diff()
        count = 1 + ((lengths - size).clamp(min=0) + stride - 1) // stride
        window_of = F.pad(count.cumsum(0), (1, 0))
        total = int(window_of[-1])

        molecule = molecule_of_rows(window_of, total)
        start = (torch.arange(total, device=offsets.device) - window_of[molecule]) * stride
        window_offsets = F.pad((lengths[molecule] - start).clamp(max=size).cumsum(0), (1, 0))
        first = offsets[molecule] + start
        hidden = self._hidden(tokens, first, window_offsets, int(window_offsets[-1]))

        molecule = molecule_of_rows(rows, num_rows)
        position = torch.arange(num_rows, device=offsets.device) - rows[molecule]
        window = (position - size + stride).clamp(min=0) // stride
        # A row of the tail, of which nothing is asked, counts to the last molecule.
        window = window.minimum(count[molecule] - 1)
        place = window_offsets[window_of[molecule] + window] + position - window * stride
        return hidden[place.clamp(max=len(hidden) - 1)]

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for block in self.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * len(self.h)))


def _published_tokens() -> Tensor:
    """The published token of every atomic number from 0 to 118."""
    tokens = torch.full((NUM_ELEMENTS + 1,), EOS)
    numbers = torch.tensor(list(PUBLISHED_ELEMENTS.values()))
    tokens[numbers] = torch.arange(len(numbers)) + EOS + 1
    return tokens


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = _CausalAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = _MLP(width)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), offsets)
        return x + self.mlp(self.ln_2(x))


class _CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        return self.c_proj(
            edt_kernels.ragged_attention(q, k, v, offsets, offsets, causal=True).flatten(1)
        )


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
