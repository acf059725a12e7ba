"""The reader: its vocabulary, the packing of questions, fact tokens, training."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edt_former.tasks.questions import FACTS, answer_text, parse_answer
from edt_former.train.tiny import reader as reader_module
from edt_former.train.tiny.fact_tokens import FactNoise, fact_embeddings, fact_tokens
from edt_former.train.tiny.packing import (
    IGNORED_LABEL,
    QuestionBank,
    draw_questions,
    pack_questions,
    reply_logits,
)
from edt_former.train.tiny.reader import (
    CLEAN,
    ReaderConfig,
    build_reader,
    measure_reading,
    train_reader,
)
from edt_former.train.tiny.vocabulary import (
    build_tokenizer,
    build_vocabulary,
    key_token,
    question_text,
)

SMALL = ReaderConfig(width=64, intermediate=96, layers=2, heads=2)
EXACT = replace(CLEAN, noise=0.0, weight=1.0, scale=0.0, min_tokens=0, max_tokens=0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(FACTS)


@pytest.fixture(scope="module")
def bank(tokenizer):
    return QuestionBank.build(tokenizer, FACTS)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return build_reader(tokenizer, SMALL).eval().requires_grad_(False)


def random_answers(rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(len(fact.answers), size=rows) for fact in FACTS], 1)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_fact_is_a_key_token_and_an_answer_token(tokenizer):
    for fact in FACTS:
        for answer in fact.answers:
            text = answer_text(fact.key, answer)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.convert_ids_to_tokens(ids) == [key_token(fact), answer.lower()]
            assert parse_answer(tokenizer.decode(ids)) == (fact.key, answer)


def test_phrasings_are_words_of_the_vocabulary(tokenizer):
    for fact in FACTS:
        for phrasing in fact.phrasings:
            tokens = tokenizer.tokenize(question_text(phrasing))
            assert tokens[0] == "question:" and tokens[-1] == "answer:"
            assert tokenizer.unk_token not in tokens
            assert not any(token.startswith("##") for token in tokens)


def test_unseen_words_are_spelled_and_foreign_characters_unknown(tokenizer):
    assert tokenizer.tokenize("Xyz 27") == ["x", "##y", "##z", "2", "##7"]
    assert tokenizer.tokenize("環") == ["<unk>"]


def test_prompt_starts_with_bos_and_keeps_molecule_marks(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("<mol><mol> question:").input_ids)
    assert tokens == ["<bos>", "<mol>", "<mol>", "question:"]


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<mol> question: How large is logP? answer: logP: 0 to 1<eos>"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.pad_token == "<pad>" and loaded.padding_side == "left"
    assert loaded.get_vocab() == build_vocabulary(FACTS)


def test_packed_questions_answer_as_if_asked_alone(model, tokenizer, bank):
    embedding = model.get_input_embeddings()
    counts = torch.tensor([5, 0, 9])
    tokens = torch.randn(int(counts.sum()), SMALL.width, generator=rng())
    offsets = torch.tensor([0, 5, 5, 14])
    facts, phrasings = draw_questions(bank, 3, 7, rng(1))
    answers = torch.from_numpy(random_answers(3)).gather(1, facts)
    packed = pack_questions(embedding, bank, tokens, offsets, facts, phrasings, answers)
    logits, true = reply_logits(model, packed)
    bos = embedding(torch.tensor([tokenizer.bos_token_id]))
    for b, q in np.ndindex(3, 7):
        fact = FACTS[facts[b, q]]
        reply = answer_text(fact.key, fact.answers[answers[b, q]])
        text = f"{question_text(fact.phrasings[phrasings[b, q]])} {reply}<eos>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        alone = torch.cat([bos, tokens[offsets[b] : offsets[b + 1]], embedding(ids)])
        expected = model(inputs_embeds=alone[None]).logits[0, -4:-1]
        torch.testing.assert_close(logits[b, q], expected, rtol=1e-4, atol=1e-4)
        assert true[b, q].tolist() == ids[-3:].tolist()


def test_packed_questions_are_arguments_of_a_causal_lm(model, bank):
    facts, phrasings = draw_questions(bank, 2, 4, rng())
    answers = torch.zeros_like(facts)
    tokens = torch.randn(6, SMALL.width, generator=rng())
    packed = pack_questions(
        model.get_input_embeddings(),
        bank,
        tokens,
        torch.tensor([0, 2, 6]),
        facts,
        phrasings,
        answers,
    )
    assert int((packed.labels != IGNORED_LABEL).sum()) == 2 * 4 * 3
    logits, true = reply_logits(model, packed)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 2), true.flatten())
    torch.testing.assert_close(model(**packed._asdict()).loss, expected)


def test_gradients_reach_only_the_asked_molecule(model, bank):
    tokens = torch.randn(6, SMALL.width, generator=rng()).requires_grad_()
    facts, phrasings = draw_questions(bank, 2, 4, rng())
    packed = pack_questions(
        model.get_input_embeddings(),
        bank,
        tokens,
        torch.tensor([0, 2, 6]),
        facts,
        phrasings,
        torch.zeros_like(facts),
    )
    logits, _ = reply_logits(model, packed)
    logits[1].square().sum().backward()
    assert tokens.grad[:2].abs().max() == 0
    assert (tokens.grad[2:].abs().amax(1) > 0).all()


def test_packing_rejects_shapes_that_do_not_fit(model, bank):
    facts, phrasings = draw_questions(bank, 2, 3, rng())
    tokens = torch.zeros(4, SMALL.width)
    embedding = model.get_input_embeddings()
    with pytest.raises(ValueError, match=r"offsets must have shape \(3,\), got \(2,\)"):
        pack_questions(embedding, bank, tokens, torch.tensor([0, 4]), facts, phrasings, facts)
    with pytest.raises(ValueError, match="facts, phrasings and answers"):
        pack_questions(
            embedding, bank, tokens, torch.tensor([0, 2, 4]), facts, phrasings, facts[:, :2]
        )
    with pytest.raises(ValueError, match="per_molecule must be in"):
        draw_questions(bank, 2, 24, rng())


def test_questions_differ_and_all_phrasings_are_drawn(bank):
    facts, phrasings = draw_questions(bank, 400, 23, rng())
    assert all(len(set(row)) == 23 for row in facts.tolist())
    asked = set(map(tuple, torch.stack([facts, phrasings], -1).flatten(0, 1).tolist()))
    assert asked == {(i, p) for i, fact in enumerate(FACTS) for p in range(len(fact.phrasings))}


def test_exact_fact_tokens_are_the_embeddings_in_some_order(model, bank):
    embedding = model.get_input_embeddings().weight
    answers = torch.from_numpy(random_answers(2))
    context = fact_tokens(embedding, bank, answers, rng(), EXACT)
    assert context.offsets.tolist() == [0, 23, 46] and bool(context.present.all())
    assert torch.equal(context.answers, answers)
    expected = fact_embeddings(embedding, bank, torch.arange(23).expand(2, -1), answers)
    for b in range(2):
        distances = torch.cdist(context.tokens[23 * b : 23 * (b + 1)], expected[b])
        assert sorted(distances.argmin(1).tolist()) == list(range(23))
        assert distances.amin(1).max() < 1e-3


def test_contexts_keep_to_their_lengths_and_repeat_with_the_seed(model, bank):
    embedding = model.get_input_embeddings().weight
    answers = torch.from_numpy(random_answers(200))
    first, again = (fact_tokens(embedding, bank, answers, rng(3)) for _ in range(2))
    lengths = first.offsets.diff()
    stated = first.present.any(1)
    assert (lengths == 0).any() and not stated[lengths == 0].any()
    lengths = lengths[lengths > 0]
    assert lengths.min() >= 24 and lengths.max() <= 64 and len(lengths.unique()) > 20
    assert len(first.tokens) == first.offsets[-1]
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.answers, again.answers)


def test_a_missing_fact_keeps_the_molecules_answer(model, bank):
    embedding = model.get_input_embeddings().weight
    answers = torch.from_numpy(random_answers(300))
    context = fact_tokens(embedding, bank, answers, rng(), FactNoise())
    missing = ~context.present
    assert 0.05 < missing.float().mean() < 0.3
    assert torch.equal(context.answers[missing], answers[missing])
    assert (context.answers != answers).float().mean() > 0.1


def test_blends_are_labelled_by_their_weights(model, bank):
    """With every token blended at random shares, half of the labels move to the second answer."""
    embedding = model.get_input_embeddings().weight
    answers = torch.zeros(2000, 23, dtype=torch.int64)
    context = fact_tokens(embedding, bank, answers, rng(), replace(EXACT, blend=1.0))
    moved = (context.answers != 0).float().mean(0)
    expected = 0.5 * (1 - 1 / bank.num_answers)
    torch.testing.assert_close(moved, expected, rtol=0, atol=0.05)


def test_an_untrained_reader_does_not_pass_the_gate(tmp_path):
    with pytest.raises(RuntimeError, match=r"must read at least 0\.970 of clean facts, got 0\.0"):
        train_reader(random_answers(20), tmp_path, steps=1, config=SMALL, held_out=4, molecules=2)
    assert not (tmp_path / "metrics.json").exists()


def test_answers_must_cover_the_facts(tmp_path):
    with pytest.raises(ValueError, match=r"answers must have shape \(more than 4, 23\)"):
        train_reader(random_answers(20)[:, :5], tmp_path, held_out=4)
    with pytest.raises(ValueError, match="answers must have shape"):
        train_reader(random_answers(4), tmp_path, held_out=4)


def test_a_killed_run_goes_on_to_the_same_reader(tmp_path, monkeypatch):
    settings = {
        "steps": 4,
        "config": SMALL,
        "held_out": 4,
        "molecules": 2,
        "questions": 3,
        "gate": 0.0,
    }
    whole = train_reader(random_answers(20), tmp_path / "whole", **settings)

    def fit_and_die(model, loss, **keywords):
        calls = iter(range(3))

        def dying(generator):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return loss(generator)

        fit(model, dying, save_every=2, **keywords)

    fit = reader_module.fit
    monkeypatch.setattr(reader_module, "fit", fit_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_reader(random_answers(20), tmp_path / "killed", **settings)
    monkeypatch.setattr(reader_module, "fit", fit)
    resumed = train_reader(random_answers(20), tmp_path / "killed", **settings)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_a_short_training_learns_to_read_and_is_saved(tmp_path):
    """A few facts and a small model, from nothing to reading what no molecule said."""
    facts = FACTS[8:11] + FACTS[-3:]
    answers = random_answers(400)[:, [8, 9, 10, 20, 21, 22]]
    noise = replace(CLEAN, min_tokens=6, max_tokens=10, missing=0.3)
    trained = train_reader(
        answers,
        tmp_path,
        steps=120,
        facts=facts,
        config=SMALL,
        noise=noise,
        questions=6,
        held_out=32,
        gate=0.9,
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["reading"]["clean"]["accuracy"] > 0.9
    assert metrics["reading"]["wrong facts"]["accuracy"] > 0.9
    assert metrics["reading"]["no tokens"]["accuracy"] < 0.6
    assert not any(p.requires_grad for p in trained.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    bank = QuestionBank.build(AutoTokenizer.from_pretrained(tmp_path), facts)
    held_out = torch.from_numpy(answers[-32:])
    again = measure_reading(loaded, bank, held_out)
    assert again == pytest.approx(metrics["reading"]["clean"], abs=1e-3)
