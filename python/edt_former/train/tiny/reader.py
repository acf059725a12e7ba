"""A small causal language model that reads facts standing in its context as soft tokens.

The reader never sees a molecule. It is trained on contexts of *fact tokens*, sums of the
embeddings of a key and of an answer under noise, rescaling and clutter: asked a question, it echoes
the key and copies the answer that stands beside it; where the fact is missing it answers by
frequency. Frozen, it is the language model that connectors write such tokens for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from edt_former.tasks.questions import FACTS, Fact
from edt_former.train.tiny.fact_tokens import FactNoise, fact_tokens
from edt_former.train.tiny.loop import fit
from edt_former.train.tiny.packing import (
    QuestionBank,
    draw_questions,
    pack_questions,
    reply_logits,
)
from edt_former.train.tiny.vocabulary import build_tokenizer

CLEAN = FactNoise(
    missing=0, empty=0, redrawn=0, blend=0, leak=0, noise=0.1, shift=0, weight=1.1, scale=0.1
)
REPORTED = {
    "clean": CLEAN,
    "noise up to 0.5": replace(CLEAN, noise=0.5),
    "noise up to 1": replace(CLEAN, noise=1.0),
    "noise up to 2": replace(CLEAN, noise=2.0),
    "wrong facts": replace(CLEAN, redrawn=1.0),
    "as trained": FactNoise(),
}
"""Contexts that `train_reader` reports on; given wrong facts, answers should follow them."""


@dataclass(frozen=True)
class ReaderConfig:
    """Sizes of the reader; the defaults give 1.15 million parameters.

    Attributes:
        width: of the residual stream; a multiple of ``heads``.
        intermediate: width inside the feed-forward layers.
        layers: number of layers.
        heads: attention heads of a layer.
        rope_theta: so large that most of a head compares content wherever it stands.
        positions: longest sequence.
    """

    width: int = 192
    intermediate: int = 384
    layers: int = 3
    heads: int = 4
    rope_theta: float = 1e8
    positions: int = 1024


def build_reader(
    tokenizer: PreTrainedTokenizerBase, config: ReaderConfig | None = None
) -> LlamaForCausalLM:
    """A stock Llama with tied embeddings, untrained.

    Embeddings start at unit norm, and the first layer as a look-up by similarity: its queries equal
    its keys and its output projection transposes its value projection, so a token attends to those
    that resemble it and adds what they hold. Drawn from torch's global generator.

    >>> from edt_former.tasks.questions import FACTS
    >>> model = build_reader(build_tokenizer(FACTS), ReaderConfig(width=32, heads=2))
    >>> model.get_input_embeddings().weight.norm(dim=1).mean().item() > 0.9
    True
    """
    config = config or ReaderConfig()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.positions,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    look_up = model.model.layers[0].self_attn
    with torch.no_grad():
        nn.init.normal_(model.get_input_embeddings().weight, std=config.width**-0.5)
        nn.init.orthogonal_(look_up.q_proj.weight, gain=1.4)
        look_up.k_proj.weight.copy_(look_up.q_proj.weight)
        nn.init.orthogonal_(look_up.v_proj.weight, gain=0.7)
        look_up.o_proj.weight.copy_(look_up.v_proj.weight.T)
    return model


@torch.no_grad()
def measure_reading(
    model: LlamaForCausalLM,
    bank: QuestionBank,
    answers: Tensor,
    noise: FactNoise | None = None,
    *,
    seed: int = 0,
    norm: float = 1.0,
) -> dict[str, float]:
    """How well the reader tells what its context states: every fact, the phrasings taking turns.

    Args:
        model: the reader.
        bank: its questions.
        answers: int64 [M, num_facts], facts of molecules it was not trained on.
        noise: of the contexts, `CLEAN` if None.
        seed: of the contexts.
        norm: factor of every fact token; 0 leaves no tokens at all.

    Returns:
        ``accuracy``, the share of replies whose key, answer and ``<eos>`` are all the likeliest
        token; ``lowest``, that of the worst fact; ``nats`` of the true answer.
    """
    embedding = model.get_input_embeddings()
    generator = torch.Generator(answers.device).manual_seed(seed)
    right, nats = [], []
    for chunk in answers.split(32):
        context = fact_tokens(embedding.weight, bank, chunk, generator, noise or CLEAN)
        tokens, offsets = norm * context.tokens, context.offsets
        if norm == 0:
            tokens, offsets = tokens[:0], torch.zeros_like(offsets)
        facts = torch.arange(len(bank.keys), device=answers.device).expand(len(chunk), -1)
        turn = torch.arange(len(chunk), device=answers.device)[:, None]
        phrasings = turn % bank.num_phrasings[facts]
        packed = pack_questions(embedding, bank, tokens, offsets, facts, phrasings, context.answers)
        logits, true = reply_logits(model, packed)
        right.append((logits.argmax(-1) == true).all(-1))
        value = logits[:, :, 1].log_softmax(-1)
        nats.append(-value.gather(-1, true[:, :, 1:2]))
    by_fact = torch.cat(right).float().mean(0)
    return {
        "accuracy": by_fact.mean().item(),
        "lowest": by_fact.min().item(),
        "nats": torch.cat(nats).mean().item(),
    }


def train_reader(
    answers: np.ndarray,
    out_dir: Path,
    seed: int = 0,
    steps: int = 500,
    *,
    facts: Sequence[Fact] = FACTS,
    config: ReaderConfig | None = None,
    noise: FactNoise | None = None,
    molecules: int = 16,
    questions: int = 8,
    held_out: int = 256,
    gate: float = 0.97,
) -> LlamaForCausalLM:
    """Train the reader on the facts of molecules and save it, frozen, for `from_pretrained`.

    ``out_dir`` receives the tokenizer, the model and ``metrics.json``; a run that was killed goes
    on from ``checkpoint.pt`` there.

    Args:
        answers: int [M, num_facts], `edt_former.tasks.questions.answer_ids` of each molecule. Only
            their frequencies matter, a reader sees no molecules.
        out_dir: is made if need be.
        seed: of weights and contexts.
        steps: of AdamW.
        facts: what can be asked.
        config: sizes.
        noise: of the training contexts.
        molecules: contexts of a step.
        questions: asked of each context.
        held_out: rows at the end of ``answers`` that are kept for the measurements.
        gate: least accuracy on clean held-out contexts.

    Raises:
        ValueError: ``answers`` has another number of columns, or too few rows.
        RuntimeError: the trained reader does not pass the gate; only the checkpoint is saved.
    """
    if answers.ndim != 2 or answers.shape[1] != len(facts) or len(answers) <= held_out:
        raise ValueError(
            f"answers must have shape (more than {held_out}, {len(facts)}), got {answers.shape}"
        )
    started = time.perf_counter()
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(facts)
    bank = QuestionBank.build(tokenizer, facts)
    config, noise = config or ReaderConfig(), noise or FactNoise()
    model = build_reader(tokenizer, config)
    embedding = model.get_input_embeddings()
    known = torch.as_tensor(answers, dtype=torch.int64)

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        rows = torch.from_numpy(rng.integers(len(known) - held_out, size=molecules))
        context = fact_tokens(embedding.weight, bank, known[rows], generator, noise)
        asked, phrasings = draw_questions(bank, molecules, questions, generator)
        packed = pack_questions(
            embedding,
            bank,
            context.tokens,
            context.offsets,
            asked,
            phrasings,
            context.answers.gather(1, asked),
        )
        logits, true = reply_logits(model, packed)
        value = F.cross_entropy(logits.flatten(0, 2), true.flatten())
        right = (logits.argmax(-1) == true).all(-1).float().mean()
        return value, {"nats": value.item(), "read": right.item()}

    checkpoint = out_dir / "checkpoint.pt"
    fit(model, loss, label="reader", checkpoint=checkpoint, steps=steps, lr=3e-3, seed=seed)
    model.eval().requires_grad_(False)
    rest = known[len(known) - held_out :]
    reading = {name: measure_reading(model, bank, rest, kind) for name, kind in REPORTED.items()}
    reading["half norm"] = measure_reading(model, bank, rest, norm=0.5)
    reading["no tokens"] = measure_reading(model, bank, rest, norm=0.0)
    accuracy = reading["clean"]["accuracy"]
    if accuracy < gate:
        raise RuntimeError(
            f"the reader must read at least {gate:.3f} of clean facts, got {accuracy:.3f} after "
            f"{steps} steps; train longer in another directory than {out_dir}"
        )
    metrics = {
        "parameters": model.num_parameters(),
        "steps": steps,
        "seed": seed,
        "seconds of this run": round(time.perf_counter() - started, 1),
        "config": asdict(config),
        "noise": asdict(noise),
        "reading": reading,
    }
    tokenizer.save_pretrained(out_dir)
    model.save_pretrained(out_dir)
    (out_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return model
