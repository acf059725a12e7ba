"""Many questions about a molecule in one sequence, each as if it had been asked alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edt_former.tasks.questions import Fact
from edt_former.train.tiny.vocabulary import answer_tokens, key_token, question_text

IGNORED_LABEL = -100
REPLY_LENGTH = 3
"""Tokens of an answer: the key, the value and ``<eos>``."""


@dataclass(frozen=True)
class QuestionBank:
    """Token ids of every question and answer, padded to rectangles, on one device.

    Attributes:
        questions: int64 [num_facts, P, L], ``question: ... answer:`` without ``<bos>``.
        lengths: int64 [num_facts, P], the questions' lengths.
        num_phrasings: int64 [num_facts].
        keys: int64 [num_facts], the token that opens an answer.
        answers: int64 [num_facts, A], the token of each answer.
        num_answers: int64 [num_facts].
        bos: id of ``<bos>``.
        eos: id of ``<eos>``.
    """

    questions: Tensor
    lengths: Tensor
    num_phrasings: Tensor
    keys: Tensor
    answers: Tensor
    num_answers: Tensor
    bos: int
    eos: int

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> QuestionBank:
        """The questions and answers of ``facts`` in the tokens of ``tokenizer``.

        >>> from edt_former.tasks.questions import FACTS
        >>> from edt_former.train.tiny.vocabulary import build_tokenizer
        >>> bank = QuestionBank.build(build_tokenizer(FACTS), FACTS[:1])
        >>> bank.num_phrasings.tolist(), bank.num_answers.tolist()
        ([4], [17])
        """
        pad = tokenizer.pad_token_id
        questions = [
            tokenizer(
                [question_text(p) for p in fact.phrasings], add_special_tokens=False
            ).input_ids
            for fact in facts
        ]
        answers = [tokenizer.convert_tokens_to_ids(list(answer_tokens(fact))) for fact in facts]
        length = max(len(ids) for phrasings in questions for ids in phrasings)
        phrasings = max(len(phrasings) for phrasings in questions)
        choices = max(len(ids) for ids in answers)
        padded = [
            _padded([_padded(ids, length, pad) for ids in group], phrasings, [pad] * length)
            for group in questions
        ]
        return cls(
            questions=torch.tensor(padded),
            lengths=torch.tensor([_padded([len(q) for q in g], phrasings, 0) for g in questions]),
            num_phrasings=torch.tensor([len(group) for group in questions]),
            keys=torch.tensor(tokenizer.convert_tokens_to_ids([key_token(f) for f in facts])),
            answers=torch.tensor([_padded(ids, choices, pad) for ids in answers]),
            num_answers=torch.tensor([len(ids) for ids in answers]),
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
        )

    def to(self, device: torch.device | str) -> QuestionBank:
        """The same bank on ``device``."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return QuestionBank(**moved)


class PackedQuestions(NamedTuple):
    """One sequence per molecule with all its questions: keyword arguments of a causal LM.

    Attributes:
        inputs_embeds: [B, S, D].
        position_ids: int64 [B, S].
        attention_mask: bool [B, 1, S, S], True where a row's token attends to a column's.
        labels: int64 [B, S], -100 outside the answers.
    """

    inputs_embeds: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def draw_questions(
    bank: QuestionBank, num_molecules: int, per_molecule: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Different facts to ask each molecule about and a phrasing for each, int64 [B, Q] both.

    >>> from edt_former.tasks.questions import FACTS
    >>> from edt_former.train.tiny.vocabulary import build_tokenizer
    >>> bank = QuestionBank.build(build_tokenizer(FACTS), FACTS)
    >>> facts, phrasings = draw_questions(bank, 2, 6, torch.Generator().manual_seed(0))
    >>> facts.shape, len(set(facts[0].tolist()))
    (torch.Size([2, 6]), 6)
    """
    device = bank.keys.device
    if not 0 <= per_molecule <= len(bank.keys):
        raise ValueError(f"per_molecule must be in [0, {len(bank.keys)}], got {per_molecule}")
    lots = torch.rand(num_molecules, len(bank.keys), generator=generator, device=device)
    facts = lots.argsort(1)[:, :per_molecule]
    chance = torch.rand(facts.shape, generator=generator, device=device)
    return facts, (chance * bank.num_phrasings[facts]).long()


def pack_questions(
    embedding: nn.Module,
    bank: QuestionBank,
    tokens: Tensor,
    offsets: Tensor,
    facts: Tensor,
    phrasings: Tensor,
    answers: Tensor,
) -> PackedQuestions:
    """Lay Q questions about each of B molecules out in one sequence per molecule.

    A sequence is ``<bos>``, the molecule tokens padded to the longest molecule, then Q equally
    long blocks ``question: ... answer: key: value<eos>``. A block attends to ``<bos>``, to its
    molecule's tokens and causally to itself, and its positions go on from the molecule's last
    token: its logits equal those of the prompt with this question alone.

    Args:
        embedding: the language model's input embedding, ids to [..., D].
        bank: the questions, on the device of ``tokens``.
        tokens: [T, D], the molecule tokens of all molecules; gradients flow.
        offsets: int64 [B+1]; molecule b owns rows ``offsets[b]`` to ``offsets[b+1]``, maybe none.
        facts: int64 [B, Q], what is asked.
        phrasings: int64 [B, Q], how.
        answers: int64 [B, Q], index of the true answer into the fact's answers.

    Raises:
        ValueError: the shapes do not fit together.
    """
    batch, per_molecule = facts.shape
    if offsets.shape != (batch + 1,):
        raise ValueError(f"offsets must have shape ({batch + 1},), got {tuple(offsets.shape)}")
    if not facts.shape == phrasings.shape == answers.shape:
        raise ValueError(
            "facts, phrasings and answers must have equal shapes, got "
            f"{tuple(facts.shape)}, {tuple(phrasings.shape)} and {tuple(answers.shape)}"
        )
    device = tokens.device
    counts = offsets.diff()
    slots = torch.arange(int(counts.max()), device=device)
    filled = slots < counts[:, None]
    molecules = tokens.new_zeros(*filled.shape, tokens.shape[1])
    molecules = molecules.masked_scatter(filled[..., None], tokens)
    ids, labels = _question_blocks(bank, facts, phrasings, answers)
    start = embedding(facts.new_full((batch, 1), bank.bos)).to(tokens.dtype)
    asked = embedding(ids.flatten(1)).to(tokens.dtype)

    prefix, length = 1 + len(slots), ids.shape[-1]
    block = torch.arange(per_molecule, device=device).repeat_interleave(length) + 1
    block = F.pad(block, (prefix, 0))
    column = torch.arange(len(block), device=device)
    causal = column <= column[:, None]
    own = causal & (block == block[:, None])
    real = F.pad(filled, (1, 0), value=True)
    real = F.pad(real, (0, per_molecule * length), value=False)
    step = torch.arange(length, device=device).repeat(per_molecule)
    return PackedQuestions(
        inputs_embeds=torch.cat([start, molecules, asked], 1),
        position_ids=torch.cat([column[:prefix].expand(batch, -1), 1 + counts[:, None] + step], 1),
        attention_mask=(own | (causal & real[:, None]))[:, None],
        labels=F.pad(labels.flatten(1), (prefix, 0), value=IGNORED_LABEL),
    )


def reply_logits(model: PreTrainedModel, packed: PackedQuestions) -> tuple[Tensor, Tensor]:
    """Logits [B, Q, 3, V] of key, value and ``<eos>`` of every answer, and the true ids [B, Q, 3].

    The language model's head runs on these positions alone.
    """
    inputs = packed._asdict()
    labels = inputs.pop("labels")[:, 1:]
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    rows = labels != IGNORED_LABEL
    logits = model.get_output_embeddings()(hidden[rows])
    shape = (len(labels), -1, REPLY_LENGTH)
    return logits.unflatten(0, shape), labels[rows].unflatten(0, shape)


def _question_blocks(
    bank: QuestionBank, facts: Tensor, phrasings: Tensor, answers: Tensor
) -> tuple[Tensor, Tensor]:
    """Token ids and labels [B, Q, longest] of the question blocks."""
    end = bank.lengths[facts, phrasings][..., None]
    longest = int(end.max()) + REPLY_LENGTH
    place = end + torch.arange(REPLY_LENGTH, device=end.device)
    eos = torch.full_like(facts, bank.eos)
    reply = torch.stack([bank.keys[facts], bank.answers[facts, answers], eos], -1)
    ids = F.pad(bank.questions[facts, phrasings], (0, REPLY_LENGTH), value=bank.eos)
    labels = torch.full_like(ids, IGNORED_LABEL).scatter(-1, place, reply)
    return ids.scatter(-1, place, reply)[..., :longest], labels[..., :longest]


def _padded(row: list, length: int, value: object) -> list:
    return row + [value] * (length - len(row))
