"""A query transformer that starts from a trained BERT, as BLIP-2's and MolCA's do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edt_former.connectors.qformer import LAYER_NORM_EPS, QueryTransformer
from edt_former.weights import StoredTensor, open_weights

_WORDS = "embeddings.word_embeddings.weight"
_POSITIONS = "embeddings.position_embeddings.weight"
_TYPES = "embeddings.token_type_embeddings.weight"
_BIAS = "cls.predictions.bias"
_COPIES = {"cls.predictions.decoder.weight": _WORDS, "cls.predictions.decoder.bias": _BIAS}
_UNUSED = ("pooler.", "cls.", "embeddings.position_ids", "embeddings.token_type_ids")
_OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}


@torch.no_grad()
def load_bert(
    transformer: QueryTransformer, folder: Path | str, *, word_head: nn.Module | None = None
) -> None:
    """Copies a BERT into a query transformer, in place; a text alone is then read as BERT does.

    Attention, LayerNorms and, where there is a text branch, words, positions and the feed-forward
    of the text are BERT's; the feed-forward of the queries starts as a copy of the text's.
    Cross-attention has no counterpart and stays as it is, as do words beyond BERT's vocabulary
    ([DEC]) and positions beyond its longest text.

    A query transformer has no token types. BERT adds the embedding of type 0 to every word of a
    single text, so it is added to all positions here: the sum of word, position and type is the
    same, and the words, which the word head shares, stay BERT's.

    Args:
        transformer: of BERT's width, layers, heads and feed-forward.
        folder: `config.json`, and `model.safetensors` or `pytorch_model.bin` (read as weights
            only).
        word_head: `RepresentationLearning.cls`, which then gets BERT's head over words.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the BERT is of another size or kind, or lacks the head; it names what differs.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> bert = BertModel(BertConfig(vocab_size=10, intermediate_size=16, **size))
        >>> sizes = {"width": 8, "layers": 1, "heads": 2, "ffn": 16, "key_width": 4}
        >>> model = QueryTransformer(text_vocab_size=11, **sizes)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bert.save_pretrained(folder)
        ...     load_bert(model, folder)
        >>> words = model.bert.embeddings.word_embeddings.weight
        >>> torch.equal(words[:10], bert.get_input_embeddings().weight)
        True
    """
    folder = Path(folder)
    _check_config(transformer, json.loads((folder / "config.json").read_text()), folder)
    weights = {_name(name): stored for name, stored in open_weights(folder).items()}
    targets = [(_source(n), x) for n, x in transformer.bert.state_dict().items()]
    if word_head is not None:
        targets += [(f"cls.{name}", x) for name, x in word_head.state_dict().items()]
    targets = [(name, target) for name, target in targets if name is not None]
    _check_weights(weights, targets, folder)
    for name, target in targets:
        value = weights[name].read()
        rows = min(len(value), len(target))
        target[:rows] = value[:rows]
        if name == _POSITIONS and _TYPES in weights:
            target += weights[_TYPES].read()[0]


def _name(name: str) -> str:
    """A name of BERT's weights as `BertModel` has it, the head's as `BertForMaskedLM` has it."""
    for old, new in _OLD_NAMES.items():
        if name.endswith(f"LayerNorm{old}"):
            name = name.removesuffix(old) + new
    return name.removeprefix("bert.")


def _source(name: str) -> str | None:
    """BERT's weight that becomes the transformer's `name`; None for none."""
    if ".crossattention." in name:
        return None
    return re.sub(r"\.(intermediate|output)_query\.", r".\1.", name)


def _check_config(transformer: QueryTransformer, config: Mapping[str, Any], folder: Path) -> None:
    layers = transformer.bert.encoder.layer
    wanted = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "layer_norm_eps": LAYER_NORM_EPS,
        "hidden_size": layers[0].attention.output.dense.out_features,
        "num_hidden_layers": len(layers),
        "num_attention_heads": layers[0].attention.heads,
        "intermediate_size": layers[0].intermediate_query.dense.out_features,
    }
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{name} of the BERT in {folder} must be {value!r}, got {config[name]!r}"
            )


def _check_weights(
    weights: Mapping[str, StoredTensor], targets: Iterable[tuple[str, Tensor]], folder: Path
) -> None:
    problems, used = [], {_TYPES, _WORDS, _POSITIONS}
    for name, target in targets:
        used.add(name)
        if name not in weights:
            problems.append(f"{name} is missing")
            continue
        shape = weights[name].shape
        # Of these there may be more or fewer rows; but every word must have a place.
        table = name in (_WORDS, _POSITIONS, _BIAS)
        fits = shape[1:] == target.shape[1:] and (
            shape[0] <= target.shape[0] or name == _POSITIONS if table else shape == target.shape
        )
        if not fits:
            problems.append(f"{name} is {list(shape)}, which does not fit {list(target.shape)}")
    for copy, original in _COPIES.items():
        if copy in weights and original in weights:
            one, other = weights[copy].read(), weights[original].read()
            if not torch.equal(one, other):
                problems.append(f"{copy} is not tied to {original}")
    problems += [
        f"{name} is unexpected"
        for name in weights
        if name not in used and not name.startswith(_UNUSED)
    ]
    if problems:
        raise ValueError(f"the BERT in {folder} does not fit: {'; '.join(problems)}")
