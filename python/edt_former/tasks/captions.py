"""Scores of captions as the field reports them, each with what it depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from tokenizers import BertWordPieceTokenizer

from edt_former.extras import need
from edt_former.train.words import read_pieces

SPECIAL = ("[PAD]", "[CLS]", "[SEP]")
LONGEST = 512
"""WordPieces that MolT5's script reads of a text, [CLS] and [SEP] among them."""

ROUGE = ("rouge1", "rouge2", "rougeL")
PURPOSE = "scores of captions"


class Pieces:
    """Lower-cased WordPieces as MolT5's script cuts texts for BLEU and METEOR.

    Args:
        vocabulary: a file with one piece per line; SciBERT's is the one that papers use. BLEU
            moves by .01 with it alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks a special piece.
    """

    def __init__(self, vocabulary: Path | str) -> None:
        if not Path(vocabulary).is_file():
            raise FileNotFoundError(f"no such file: {vocabulary}")
        self.vocabulary = Path(vocabulary)
        ids = {piece: i for i, piece in enumerate(read_pieces(self.vocabulary))}
        missing = [piece for piece in SPECIAL if piece not in ids]
        if missing:
            raise ValueError(f"{vocabulary} is no vocabulary of WordPieces: it lacks {missing[0]}")
        self._tokenizer = BertWordPieceTokenizer(ids, lowercase=True)
        self._tokenizer.enable_truncation(LONGEST)

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """The pieces of every text."""
        encoded = self._tokenizer.encode_batch(list(texts))
        return [[piece for piece in one.tokens if piece not in SPECIAL] for one in encoded]


def caption_scores(
    references: Sequence[str], hypotheses: Sequence[str], pieces: Pieces
) -> dict[str, float]:
    """BLEU-2, BLEU-4, METEOR, ROUGE and sacreBLEU of hypotheses, one reference each.

    * `bleu2`, `bleu4`: corpus BLEU (nltk) on WordPieces, from 0 to 1;
    * `meteor`: the mean of nltk's METEOR on WordPieces; NaN where its WordNet data are missing;
    * `rouge1`, `rouge2`, `rougeL`: means of the F-measures (rouge-score) on the texts, no stemmer;
    * `sacrebleu`: its corpus BLEU with its own words, from 0 to 100.

    Args:
        references: true captions.
        hypotheses: as many; empty ones count as they are.
        pieces: for BLEU and METEOR.

    Raises:
        ImportError: nltk, rouge-score or sacrebleu is not installed.
        ValueError: they are not as many, or none.
    """
    if len(references) != len(hypotheses) or not references:
        raise ValueError(
            f"hypotheses must be one per reference, at least one; got {len(hypotheses)} and "
            f"{len(references)}"
        )
    bleu = need("nltk.translate.bleu_score", extra="eval", purpose=PURPOSE)
    sacrebleu = need("sacrebleu", extra="eval", purpose=PURPOSE)
    true, said = pieces(references), pieces(hypotheses)
    listed = [[tokens] for tokens in true]
    return {
        "bleu2": bleu.corpus_bleu(listed, said, weights=(0.5, 0.5)),
        "bleu4": bleu.corpus_bleu(listed, said, weights=(0.25,) * 4),
        "meteor": _meteor(true, said),
        **_rouge(references, hypotheses),
        "sacrebleu": sacrebleu.corpus_bleu(list(hypotheses), [list(references)]).score,
    }


def _meteor(true: Sequence[list[str]], said: Sequence[list[str]]) -> float:
    meteor = need("nltk.translate.meteor_score", extra="eval", purpose=PURPOSE)
    try:
        return fmean(meteor.meteor_score([t], s) for t, s in zip(true, said, strict=True))
    except LookupError:
        return math.nan


def _rouge(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    rouge = need("rouge_score.rouge_scorer", extra="eval", purpose=PURPOSE)
    scorer = rouge.RougeScorer(ROUGE)
    scores = [scorer.score(t, s) for t, s in zip(references, hypotheses, strict=True)]
    return {name: fmean(score[name].fmeasure for score in scores) for name in ROUGE}
