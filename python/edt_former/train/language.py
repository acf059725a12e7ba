"""A small causal language model from texts, for those who have none at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from edt_former.data import PreparedData, Row
from edt_former.data.raw import MARK
from edt_former.language.prompt import conversation
from edt_former.processor import IGNORED_LABEL, load_tokenizer
from edt_former.train.config import LanguageConfig
from edt_former.train.conversations import CHARACTERS_PER_TOKEN, messages_of
from edt_former.train.provenance import describe_run
from edt_former.train.ranks import main_first
from edt_former.train.start import begin
from edt_former.train.trainer import ConnectorTrainer

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
TOKENIZER = "tokenizer"


def train_language_model(config: LanguageConfig) -> Path:
    """Trains a small Llama on the texts of data sets, or goes on with it; its folder.

    It learns from whole conversations as the second stage writes them, less their molecules: what
    it says there without having seen any.

    Raises:
        FileNotFoundError: data are missing.
        ValueError: the folder has a run that was told something else.
    """
    out = begin(config)
    torch.manual_seed(config.seed)
    data = PreparedData(config.data.train, wants=("said",))
    with main_first():
        tokenizer = _tokenizer(config, data, out)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.positions,
            attention_dropout=config.dropout,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    validation = None
    if config.data.validation:
        validation = PreparedData(config.data.validation, wants=("said",))
    trainer = ConnectorTrainer(
        model,
        TextBatch(tokenizer, config),
        data,
        config.training,
        out,
        [name for name, _ in model.named_parameters()],
        costs=data.characters() // CHARACTERS_PER_TOKEN,
        validation=validation,
        workers=config.data.workers,
        seed=config.seed,
        tokenizer=tokenizer,
        provenance=describe_run("language", config, data),
        label="language model",
    )
    return trainer.run()


class TextBatch:
    """Rows become token ids of their conversations, padded on the right.

    Args:
        tokenizer: of the language model.
        config: of the run.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: LanguageConfig) -> None:
        self.tokenizer, self.config = tokenizer, config

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` [B, S]."""
        texts = [text_of(row, self.config, self.tokenizer) for row in rows]
        inputs = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.config.max_length,
            return_tensors="pt",
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def text_of(row: Row, config: LanguageConfig, tokenizer: PreTrainedTokenizerFast) -> str:
    """The conversation of a row without its molecules."""
    messages = [
        {**message, "content": message["content"].replace(MARK, "").strip()}
        for message in messages_of(row, config.prompt)
    ]
    return conversation(tokenizer, messages)[0]


def _tokenizer(config: LanguageConfig, data: PreparedData, out: Path) -> PreTrainedTokenizerFast:
    """The byte-pair tokenizer of the run, that of its first start where there was one."""
    folder = out / TOKENIZER
    if not folder.exists():
        tokenizer = learn_tokenizer(_texts(config, data), config.vocabulary)
        tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


def _texts(config: LanguageConfig, data: PreparedData) -> Iterator[str]:
    for i in range(len(data)):
        for message in messages_of(data[i], config.prompt):
            yield message["content"]


def learn_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer learned from texts, `<bos>` before every text.

    >>> tokenizer = learn_tokenizer(iter(["an alcohol, a sugar alcohol"] * 2), 300)
    >>> tokenizer.decode(tokenizer("a sugar").input_ids, skip_special_tokens=True)
    'a sugar'
    """
    learned = Tokenizer(models.BPE(unk_token=SPECIAL[3]))
    learned.normalizer = normalizers.NFC()
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator(texts, trainer)
    learned.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[1]} $A", special_tokens=[(SPECIAL[1], 1)]
    )
    pad, bos, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=learned, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
    )
