"""Small runs of every stage, as configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edt_former.train.config import (
    FinetuneConfig,
    LanguageConfig,
    Stage1Config,
    Stage2Config,
    build,
)

CONNECTORS = {
    "edt_former": {"name": "edt_former", "patches": {"sources": ["brics", "entropy"]}},
    "qformer": {"name": "qformer", "cross_attention_freq": 1},
}
SIZE = {
    "width": 16,
    "layers": 2,
    "heads": 2,
    "ffn": 24,
    "num_queries": 3,
    "dropout": 0.1,
    "sum_tokens": 2,
}
TRAINING = {
    **{"steps": 6, "batch_size": 6, "learning_rate": 3e-3, "warmup": 1},
    **{"log_every": 1, "save_every": 2},
}


def stage1(out: Path, rows: Path, /, kind: str = "edt_former", **changes: Any) -> Stage1Config:
    content = {
        "out": str(out),
        "data": {"train": [str(rows)]},
        "text": {"vocabulary": 64, "max_words": 12},
        "connector": {**CONNECTORS[kind], **SIZE, "text_positions": 12},
        "objective": {"embed_dim": 8},
        "training": TRAINING,
    }
    return build(Stage1Config, merged(content, changes))


def stage2(out: Path, rows: Path, language_model: Path, /, **changes: Any) -> Stage2Config:
    content = {
        "out": str(out),
        "data": {"train": [str(rows)]},
        "language_model": str(language_model),
        "training": TRAINING,
    }
    if "stage1" not in changes:
        content |= {
            "connector": {**CONNECTORS["edt_former"], **SIZE},
            "graph_encoder": "shipped",
            "predictor": "shipped",
        }
    return build(Stage2Config, merged(content, changes))


def language(out: Path, rows: Path, /, **changes: Any) -> LanguageConfig:
    content = {
        "out": str(out),
        "data": {"train": [str(rows)]},
        **{"vocabulary": 300, "width": 16, "layers": 1, "heads": 2, "ffn": 32, "positions": 128},
        "training": TRAINING,
    }
    return build(LanguageConfig, merged(content, changes))


def finetune(out: Path, rows: Path, model: Path, /, **changes: Any) -> FinetuneConfig:
    content = {
        "out": str(out),
        "data": {"train": [str(rows)]},
        "model": str(model),
        "training": TRAINING,
    }
    return build(FinetuneConfig, merged(content, changes))


def merged(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`content` with `changes`, of which mappings change what is inside."""
    result = dict(content)
    for name, value in changes.items():
        inside = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if inside else value
    return result


def losses(out: Path, name: str = "loss") -> list[float]:
    """Of every line of a run's log that has it."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]
