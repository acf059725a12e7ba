"""The words of the tiny language model: one token per key, one token per answer.

A prompt is ``<bos> <mol>...<mol> question: {question} answer:`` and the model goes on with
``{key}: {answer}<eos>``. Keys keep their colon (``"aromatic rings:"``) and answers their spaces
(``"0 to 1"``), so that a fact is two tokens long whatever its wording, and a molecule token can
name it as the sum of two embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase, digits

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from edt_former.tasks.questions import Fact

PAD, BOS, EOS, UNK, MOL = "<pad>", "<bos>", "<eos>", "<unk>", "<mol>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK, MOL)
QUESTION, ANSWER = "question:", "answer:"
PUNCTUATION = "?.,:;!'\"()[]+-/%=<>"
MAX_LENGTH = 1024


def key_token(fact: Fact) -> str:
    """The token that opens an answer: the key in lower case with its colon."""
    return f"{fact.key.lower()}:"


def answer_tokens(fact: Fact) -> tuple[str, ...]:
    """The tokens of a fact's answers, in the order of ``fact.answers``."""
    return tuple(answer.lower() for answer in fact.answers)


def question_text(question: str) -> str:
    """The prompt of a question, after the molecule tokens."""
    return f"{QUESTION} {question} {ANSWER}"


def build_vocabulary(facts: Sequence[Fact]) -> dict[str, int]:
    """Token to id: special tokens, prompt marks, keys, answers, words of the phrasings, characters.

    Ids follow that order and the order of first appearance, so equal facts give equal vocabularies.
    """
    splitter = _splitter()
    words = (
        word
        for fact in facts
        for text in (fact.key, *fact.answers, *fact.phrasings, *fact.synonyms)
        for word, _ in splitter.pre_tokenize_str(text.lower())
    )
    characters = ascii_lowercase + digits
    tokens = dict.fromkeys(
        (
            *SPECIAL_TOKENS,
            QUESTION,
            ANSWER,
            *(key_token(fact) for fact in facts),
            *(answer for fact in facts for answer in answer_tokens(fact)),
            *sorted(set(words)),
            *PUNCTUATION,
            *characters,
            *(f"##{character}" for character in characters),
        )
    )
    return {token: index for index, token in enumerate(tokens)}


def build_tokenizer(facts: Sequence[Fact]) -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer in which every key and every answer is a single token.

    Words outside the vocabulary are spelled in characters; only characters outside ASCII letters,
    digits and common punctuation become ``<unk>``. Like Llama's, it puts ``<bos>`` first.

    >>> from edt_former.tasks.questions import FACTS
    >>> build_tokenizer(FACTS).tokenize("How many rings? answer: rings: 3<eos>")
    ['how', 'many', 'rings', '?', 'answer:', 'rings:', '3', '<eos>']
    """
    vocabulary = build_vocabulary(facts)
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    phrases = dict.fromkeys(
        token
        for token in (
            QUESTION,
            ANSWER,
            *(key_token(fact) for fact in facts),
            *(answer for fact in facts for answer in answer_tokens(fact)),
        )
        if len(_splitter().pre_tokenize_str(token)) > 1
    )
    tokenizer.add_tokens(
        [AddedToken(phrase, single_word=True, normalized=True) for phrase in phrases]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens=[MOL],
        model_max_length=MAX_LENGTH,
        padding_side="left",
    )


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.BertPreTokenizer()
