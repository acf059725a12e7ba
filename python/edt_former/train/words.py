"""Texts as WordPieces, for the text branch of a Q-Former."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor

from edt_kernels import offsets_from_lengths

if TYPE_CHECKING:
    from typing import Self

FILE = "vocab.txt"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def read_pieces(file: Path | str) -> list[str]:
    """The pieces of a vocabulary, one per line; other line separators are part of a piece."""
    return Path(file).read_text(encoding="utf-8").removesuffix("\n").split("\n")


class Words:
    """Lower-cased texts as [CLS] pieces [SEP], and one more word, [DEC], which begins a caption.

    Args:
        pieces: the vocabulary in the order of its ids, the special words of BERT among them.

    Raises:
        ValueError: a special word is missing, or a piece is there twice.

    Example:
        >>> words = Words([*SPECIAL, "an", "alcohol", "##s"])
        >>> ids, offsets = words(["Alcohols", "an"])
        >>> ids.tolist(), offsets.tolist(), words.begin_id, words.size
        ([2, 6, 7, 3, 2, 5, 3], [0, 4, 7], 8, 9)
    """

    def __init__(self, pieces: Sequence[str]) -> None:
        ids = {piece: i for i, piece in enumerate(pieces)}
        missing = [word for word in SPECIAL if word not in ids]
        if missing or len(ids) < len(pieces):
            problem = f"lacks {missing[0]}" if missing else "has a piece twice"
            raise ValueError(f"a vocabulary must hold every piece once, this one {problem}")
        self.pieces = list(pieces)
        self._tokenizer = BertWordPieceTokenizer(ids, lowercase=True)

    @classmethod
    def read(cls, file: Path | str) -> Self:
        """A file with one piece per line, in the order of their ids."""
        return cls(read_pieces(file))

    @classmethod
    def learn(cls, texts: Iterable[str], size: int) -> Self:
        """The WordPieces of texts, at most `size` of them.

        >>> Words.learn(["an alcohol, a sugar alcohol"], 60).size <= 61
        True
        """
        learner = BertWordPieceTokenizer(lowercase=True)
        texts = [learner.normalizer.normalize_str(text) for text in texts]
        # The learner would number continuing letters in the order of a hash table, and break ties
        # by those numbers: what is known to it as special has its number beforehand.
        letters = sorted({c for text in texts for c in text if not c.isspace()})
        learner.train_from_iterator(
            texts,
            vocab_size=size,
            special_tokens=[*SPECIAL, *(f"##{letter}" for letter in letters)],
            show_progress=False,
        )
        return cls([*SPECIAL, *sorted(set(learner.get_vocab()) - set(SPECIAL))])

    def save(self, folder: Path) -> None:
        """Writes `vocab.txt`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text("".join(f"{piece}\n" for piece in self.pieces), "utf-8")

    @property
    def begin_id(self) -> int:
        """Of [DEC]."""
        return len(self.pieces)

    @property
    def size(self) -> int:
        """How many words there are, [DEC] included."""
        return len(self.pieces) + 1

    def __call__(
        self, texts: Sequence[str], *, max_words: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ids int64 [T] of B texts without padding, and their offsets [B + 1].

        Args:
            texts: B of them.
            max_words: what is longer loses its end, [SEP] stays.
        """
        rows = []
        for encoded in self._tokenizer.encode_batch(list(texts)):
            ids = encoded.ids
            if max_words is not None and len(ids) > max_words:
                ids = [*ids[: max_words - 1], ids[-1]]
            rows.append(ids)
        flat = torch.tensor([i for ids in rows for i in ids], dtype=torch.int64)
        return flat, offsets_from_lengths(torch.tensor([len(ids) for ids in rows]))
