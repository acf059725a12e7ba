"""What a language model has forgotten of plain text, since something was trained on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edt_former.model import MoleculeLM


@dataclass(frozen=True)
class Forgetting:
    """Losses on texts without a molecule, in nats per token.

    Attributes:
        before: of the plain language model.
        after: of the same model with all that was trained.
        low, high: the 95 % interval of after - before, by a bootstrap over texts.
        equal: every logit has the same bits.
        tokens: that were predicted.
    """

    before: float
    after: float
    low: float
    high: float
    equal: bool
    tokens: int

    @property
    def change(self) -> float:
        """after - before."""
        return self.after - self.before


@torch.no_grad()
def forgetting(
    model: MoleculeLM,
    language_model: nn.Module,
    texts: Sequence[str],
    *,
    batch_size: int = 8,
    resamples: int = 1000,
    seed: int = 0,
) -> Forgetting:
    """Compares a model on plain texts with the language model that it was made from.

    Args:
        model: with its processor; its adapters, connector and rows are attached.
        language_model: the frozen part as it was, read from its own files.
        texts: longer ones than the model reads lose their end.
        batch_size: texts at a time.
        resamples: of the bootstrap.
        seed: of it.

    Raises:
        ValueError: there is no text of two tokens or more.

    Example:
        >>> import edt_former
        >>> from edt_former.language.manifest import Manifest
        >>> from transformers import AutoModelForCausalLM
        >>> model = edt_former.load("mora")
        >>> folder = model.frozen_parts["language_model"].path
        >>> plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        >>> found = forgetting(model, plain, ["question: how many rings?"])
        >>> found.equal, found.change
        (True, 0.0)
    """
    rows, equal = [], True
    for inputs in _batches(model, texts, batch_size):
        after = model(**inputs).logits
        before = language_model(**inputs).logits
        real = inputs["attention_mask"].bool()
        equal &= torch.equal(before[real], after[real])
        rows += zip(*_losses(before, inputs), *_losses(after, inputs), strict=True)
    if not rows:
        raise ValueError("texts must hold one of two tokens or more, got none")
    old, counts, new, _ = np.array(rows, dtype=np.float64).T
    weights = np.random.default_rng(seed).multinomial(
        len(rows), np.full(len(rows), 1 / len(rows)), size=resamples
    )
    low, high = np.percentile(weights @ (new - old) / (weights @ counts), [2.5, 97.5])
    tokens = int(counts.sum())
    before, after = float(old.sum() / tokens), float(new.sum() / tokens)
    return Forgetting(before, after, float(low), float(high), equal, tokens)


def _batches(
    model: MoleculeLM, texts: Sequence[str], batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Ids and masks of texts with something to predict, padded on the right."""
    tokenizer, longest = model.processor.tokenizer, model.max_positions
    cut = {"truncation": longest is not None, "max_length": longest}
    rows = [row for row in tokenizer(list(texts), **cut).input_ids if len(row) > 1]
    for start in range(0, len(rows), batch_size):
        parts = [torch.tensor(row) for row in rows[start : start + batch_size]]
        pad = nn.utils.rnn.pad_sequence
        yield {
            "input_ids": pad(parts, batch_first=True).to(model.device),
            "attention_mask": pad([torch.ones_like(row) for row in parts], batch_first=True).to(
                model.device
            ),
        }


def _losses(logits: Tensor, inputs: dict[str, Tensor]) -> tuple[list[float], list[int]]:
    """Nats and predicted tokens of every text."""
    targets, real = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:].bool()
    nats = F.cross_entropy(logits[:, :-1].float().mT, targets, reduction="none") * real
    return nats.double().sum(1).tolist(), real.sum(1).tolist()
