"""The published next-atom predictor, a GPT-2, as ours and back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edt_former.language.frozen import CONFIG
from edt_former.released.plan import Plan
from edt_former.tokens.predictor import EOS, PUBLISHED_ELEMENTS, NextAtomPredictor
from edt_former.tokens.published import gpt2_from_state, predictor_from_gpt2, state_from_gpt2
from edt_former.weights import WEIGHTS, StoredTensor, open_weights

VOCABULARY = "vocab.txt"
TOKENS = ("<pad>", "<bos>", "<eos>", *PUBLISHED_ELEMENTS)
HEADS = 2


def is_gpt2(names: Iterable[str]) -> bool:
    """Whether weights of these names are a GPT-2's."""
    return any(name.removeprefix("transformer.") == "wte.weight" for name in names)


def is_predictor(folder: Path) -> bool:
    """Whether a folder holds a predictor of ours."""
    file = folder / CONFIG
    return file.is_file() and "vocabulary" in json.loads(file.read_text())


def from_gpt2(source: Path, *, heads: int | None = None) -> Plan:
    """Plans a predictor from a GPT-2 in a file or folder.

    Args:
        source: its `config.json` tells the heads and its `vocab.txt` the tokens, where they are.
        heads: attention heads; None takes those of the config, or the published 2.

    Raises:
        ValueError: the weights are not such a GPT-2's, or the tokens are others.
    """
    folder = source if source.is_dir() else source.parent
    told = folder / CONFIG
    config = json.loads(told.read_text()) if told.is_file() else {}
    if heads is None:
        heads = config.get("n_head", HEADS)
    _check_tokens(folder / VOCABULARY)
    weights = {name: stored.read() for name, stored in open_weights(source).items()}
    try:
        model = predictor_from_gpt2(weights, heads=heads)
    except ValueError as error:
        raise ValueError(f"the predictor in {source} does not fit: {error}") from error
    state = {name: StoredTensor.of(x) for name, x in state_from_gpt2(weights).items()}
    return Plan(
        f"next-atom predictor: GPT-2 of {_size(model.config)}",
        files={WEIGHTS: state},
        json={CONFIG: model.config},
    )


def to_gpt2(source: Path) -> Plan:
    """Plans the GPT-2 of a predictor's folder.

    Raises:
        ValueError: its vocabulary is not the published one.
    """
    config = json.loads((source / CONFIG).read_text())
    if config["vocabulary"] != "published":
        raise ValueError(
            f"the predictor in {source} must have the vocabulary 'published', "
            f"got {config['vocabulary']!r}"
        )
    model = NextAtomPredictor(config)
    stored = open_weights(source)
    weights = gpt2_from_state({name: found.read() for name, found in stored.items()})
    predictor_from_gpt2(weights, heads=config["heads"])
    size = {
        "vocab_size": len(TOKENS),
        "n_positions": config["positions"],
        "n_embd": config["width"],
        "n_layer": config["layers"],
        "n_head": config["heads"],
    }
    ends = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    kind = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    return Plan(
        f"next-atom predictor of {_size(model.config)}",
        files={WEIGHTS: {name: StoredTensor.of(x) for name, x in weights.items()}},
        json={CONFIG: {**kind, **size, **ends}},
        finish=[_write_tokens],
    )


def _write_tokens(folder: Path) -> None:
    (folder / VOCABULARY).write_text("\n".join(TOKENS))


def _check_tokens(file: Path) -> None:
    if not file.is_file():
        return
    tokens = file.read_text().splitlines()
    pairs = zip(tokens, TOKENS, strict=False)
    differing = [f"{t!r} instead of {o!r}" for t, o in pairs if t != o]
    if len(tokens) != len(TOKENS):
        differing.append(f"{len(tokens)} tokens instead of {len(TOKENS)}")
    if differing:
        raise ValueError(f"{file} must hold the published tokens, it has {differing[0]}")


def _size(config: dict[str, Any]) -> str:
    return (
        f"{config['layers']} layers, width {config['width']}, {config['heads']} heads, "
        f"{config['positions']} positions"
    )
