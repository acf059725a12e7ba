from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edt_former import shipped
from edt_former.connectors import make_connector
from edt_former.graph import make_encoder
from edt_former.model import MoleculeLM
from edt_former.tasks.accuracy import Guesses
from edt_former.tasks.questions import FACTS
from edt_former.tokens import NextAtomPredictor
from edt_former.train.tiny.reader import ReaderConfig, build_reader
from edt_former.train.tiny.vocabulary import build_tokenizer

READER = ReaderConfig(width=16, intermediate=16, layers=1, heads=2, positions=640)
SPATIAL = {"layers": 1, "width": 8, "heads": 2, "ffn": 8, "gaussians": 4}
CONNECTOR = {"encoder_width": 8, "llm_width": 16, "width": 16, "layers": 1, "heads": 2, "ffn": 16}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], dict[str, torch.Tensor]]:
    """Reads what the published programs computed: `recorded(name)` gives tensors by name."""
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of the recorded published numbers) is not set")
    folder = Path(os.environ["EDT_SHARED"], "oracles")
    return cache(lambda name: load_file(folder / f"{name}.safetensors"))


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the shipped one, of parts that are tiny and know nothing."""
    folder = tmp_path_factory.mktemp("shipped")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(FACTS)
    reader = build_reader(tokenizer, READER).eval()
    encoder = make_encoder({"name": "gin", "layers": 1, "width": 8})
    predictor = NextAtomPredictor({"layers": 1, "heads": 2, "width": 16, "positions": 64})
    spatial = make_encoder({"name": "unimol", **SPATIAL})
    both = make_encoder(
        {
            **{"name": "blended", "layers": 1, "width": 8, "heads": 2},
            "flat": encoder.config,
            "spatial": spatial.config,
        }
    )
    for name, kind, graph_encoder, frozen in (
        ("edt_former", "edt_former", encoder, "graph_encoder"),
        ("edt_former_3d", "edt_former", spatial, "graph_encoder_3d"),
        ("edt_former_both", "edt_former", both, "graph_encoder_both"),
        ("qformer_32", "qformer", encoder, "graph_encoder"),
    ):
        connector = make_connector({"name": kind, **CONNECTOR, "num_queries": 4})
        parts = (reader, graph_encoder, connector, predictor)
        model = MoleculeLM.from_parts(*parts, tokenizer=tokenizer)
        names = {"graph_encoder": frozen}
        model.save_pretrained(
            folder / name, save_frozen=True, frozen_folder=folder, frozen_names=names
        )
    guesses = Guesses.count(
        np.zeros((2, len(FACTS)), dtype=int), np.array([3, 9]), np.array([5, 6])
    )
    (folder / "manifest.json").write_text(json.dumps({"guesses": guesses.to_json()}))
    return folder


@pytest.fixture
def as_shipped(miniature: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the miniature what `edt_former.load` and the commands read."""
    monkeypatch.setattr(shipped, "folder", lambda: miniature)
    return miniature


ENDS = ("C", "O", "N", "S", "CO", "CN", "CS", "NC")
WRITTEN = list(dict.fromkeys("C" * n + end for n in range(1, 12) for end in ENDS))[:48]
"""Chains, as SMILES."""

WORDS = {"C": "carbon", "O": "oxygen", "N": "nitrogen", "S": "sulphur"}


def described(chain: str) -> str:
    """A text that the elements of a chain decide."""
    return f"a chain of {' '.join(WORDS[symbol] for symbol in chain)} ."


@pytest.fixture(scope="session")
def caption_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table as ChEBI-20 is: 48 chains with their texts, one broken row, one literal quote."""
    rows = [f"{i}\t{chain}\t{described(chain)}" for i, chain in enumerate(WRITTEN)]
    rows.insert(3, "900\tC1CC\tbroken")
    rows.append('901\tC/C=C\\\\C\ta "chain" of carbon')
    file = tmp_path_factory.mktemp("captions") / "captions.txt"
    file.write_text("\n".join(["CID\tSMILES\tdescription", *rows]) + "\n")
    return file


@pytest.fixture(scope="session")
def prepared_data(caption_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` makes of it, in parts of 16 rows, without patches."""
    pytest.importorskip("pyarrow", reason="prepared data need pyarrow")
    from edt_former.data import PrepareOptions, prepare

    out = tmp_path_factory.mktemp("prepared") / "captions"
    prepare([caption_file], out, PrepareOptions(rows_per_part=16), progress=False)
    return out
