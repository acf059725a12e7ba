"""Facts as soft tokens: what a reader learns to read and a connector learns to write."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from edt_former.train.tiny.packing import QuestionBank

REPEATS, BARE_KEYS, HEAPS = 0.15, 0.1, 0.2
"""Shares of the distractors that say a fact again, name a key without an answer, or add three
words at random; the others are noise."""


@dataclass(frozen=True)
class FactNoise:
    """How far a context is from one clean token per fact.

    Norms are relative to that of a token's embedding, which starts at 1.

    Attributes:
        missing: largest share of facts left out of a context.
        empty: probability that a context states no fact; half of these have no tokens at all.
        redrawn: probability that a context's answers are drawn uniformly, not a molecule's. It then
            states every fact, so the answers given without facts keep their true frequencies.
        blend: probability that a token blends two answers; its label follows their weights.
        leak: probability that up to three other words shine through a token.
        noise: largest norm of a token's noise.
        shift: largest norm of a vector added to every token of a context.
        weight: largest factor, either way, between the weights of key and answer and 1.
        scale: standard deviation of the log of a token's norm.
        min_tokens: fewest tokens of a context.
        max_tokens: most tokens of a context.
    """

    missing: float = 0.5
    empty: float = 0.08
    redrawn: float = 0.3
    blend: float = 0.12
    leak: float = 0.3
    noise: float = 1.0
    shift: float = 1.0
    weight: float = 1.6
    scale: float = 0.7
    min_tokens: int = 24
    max_tokens: int = 64


class FactContext(NamedTuple):
    """Soft tokens that state facts of B molecules.

    Attributes:
        tokens: [T, D], the tokens of all molecules.
        offsets: int64 [B+1], whose they are.
        answers: int64 [B, num_facts], what they say; a molecule's own answer to a missing fact.
        present: bool [B, num_facts], False where the fact is missing.
    """

    tokens: Tensor
    offsets: Tensor
    answers: Tensor
    present: Tensor


def fact_embeddings(
    embedding: Tensor, bank: QuestionBank, facts: Tensor, answers: Tensor
) -> Tensor:
    """``embedding[key] + embedding[answer]``: the clean soft tokens of facts, [..., D].

    Args:
        embedding: [V, D], the language model's input embeddings.
        bank: names the tokens of keys and answers.
        facts: int64 [...].
        answers: int64 [...], indices into each fact's answers.
    """
    return embedding[bank.keys[facts]] + embedding[bank.answers[facts, answers]]


def fact_tokens(
    embedding: Tensor,
    bank: QuestionBank,
    answers: Tensor,
    generator: torch.Generator,
    noise: FactNoise | None = None,
) -> FactContext:
    """Contexts that state ``answers`` [B, num_facts] in random order amid distractors.

    A token is ``scale * (w_key embedding[key] + w_answer embedding[answer] + clutter)`` with what
    `FactNoise` draws. Every random number comes from ``generator``.
    """
    noise = noise or FactNoise()
    device, width = embedding.device, embedding.shape[1]
    batch, num_facts = answers.shape
    slots = num_facts + noise.max_tokens

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def vectors(*shape: int) -> Tensor:
        """Of a norm near 1."""
        return torch.randn(*shape, width, generator=generator, device=device) * width**-0.5

    redrawn = uniform(batch, 1) < noise.redrawn
    guesses = (uniform(2, batch, num_facts) * bank.num_answers).long()
    answers = torch.where(redrawn, guesses[0], answers)
    share = uniform(batch, num_facts) * (uniform(batch, num_facts) < noise.blend)
    missing = uniform(batch, 1) * noise.missing * (uniform(batch, 1) < 0.5)
    missing = torch.where(uniform(batch, 1) < noise.empty, 1.0, missing)
    present = redrawn | (uniform(batch, num_facts) >= missing)

    # The first num_facts slots state the facts, the others are distractors.
    own = torch.arange(num_facts, device=device).expand(batch, -1)
    again = (uniform(batch, noise.max_tokens) * num_facts).long()
    fact = torch.cat([own, again], 1)
    kind = uniform(batch, slots)
    distractor = torch.arange(slots, device=device) >= num_facts
    stated = present.gather(1, fact)
    with_answer = stated & (~distractor | (kind < REPEATS))
    with_key = stated & (~distractor | (kind < REPEATS + BARE_KEYS))
    heap = distractor & (kind > 1 - HEAPS)

    spread = math.log(noise.weight)
    weights = ((2 * uniform(2, batch, slots) - 1) * spread).exp()
    weights = weights * torch.stack([with_key, with_answer])
    says, hints = (bank.answers[fact, ids.gather(1, fact)] for ids in (answers, guesses[1]))
    answer = torch.lerp(embedding[says], embedding[hints], share.gather(1, fact)[..., None])
    words = (uniform(batch, slots, 3) * len(embedding)).long()
    leaks = uniform(batch, slots, 3) * torch.where(
        heap, 1.0, 0.4 * (uniform(batch, slots) < noise.leak)
    ).unsqueeze(-1)
    strength = noise.noise * uniform(batch, slots, 1)
    strength = torch.where(
        (distractor & ~with_key)[..., None], 1.5 * uniform(batch, slots, 1), strength
    )
    tokens = (
        weights[0, ..., None] * embedding[bank.keys[fact]]
        + weights[1, ..., None] * answer
        + (leaks[..., None] * embedding[words]).sum(2)
        + strength * vectors(batch, slots)
        + noise.shift * uniform(batch, 1, 1) * vectors(batch, 1)
    )
    log_scale = torch.randn(batch, slots, 1, generator=generator, device=device) * noise.scale
    tokens = tokens * log_scale.exp()

    total = (
        noise.min_tokens + (uniform(batch, 1) * (noise.max_tokens + 1 - noise.min_tokens)).long()
    )
    total = total * (present.any(1, keepdim=True) | (uniform(batch, 1) < 0.5))
    spare = total - present.sum(1, keepdim=True)
    kept = torch.cat([present, torch.arange(noise.max_tokens, device=device) < spare], 1)
    order = (uniform(batch, slots) + ~kept).argsort(1)
    tokens = tokens.gather(1, order[..., None].expand_as(tokens))[kept.gather(1, order)]
    said = torch.where(present & (uniform(batch, num_facts) < share), guesses[1], answers)
    return FactContext(tokens, F.pad(kept.sum(1).cumsum(0), (1, 0)), said, present)
