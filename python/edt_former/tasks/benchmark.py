"""What a trained model is worth on prepared data: every kind of model by its own scores."""

from __future__ import annotations

import csv
import gzip
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from edt_former.data import PreparedData, Row
from edt_former.language.manifest import MANIFEST, Manifest
from edt_former.model import MoleculeLM
from edt_former.tasks.captioning import describe_rows, perplexities
from edt_former.tasks.captions import LONGEST, Pieces, caption_scores
from edt_former.tasks.neighbours import baselines
from edt_former.tasks.properties import classification_scores, regression_scores
from edt_former.tasks.retrieval import embed, retrieval_scores
from edt_former.train.config import QuestionConfig, build
from edt_former.train.molecules import MoleculeBatch
from edt_former.train.parts import PREDICTOR, read_predictor
from edt_former.train.properties import CLASSIFICATION, PropertyBatch, PropertyModel
from edt_former.train.provenance import read_provenance
from edt_former.train.stage1 import Stage1Batch, Stage1Model
from edt_former.train.stage2 import stored_patches

Scores = dict[str, dict[str, float]]

STAGE1, PROPERTIES, LANGUAGE = "stage 1", "properties", "language model with molecules"
TRUTH, OUTPUT = "ground truth", "output"


@dataclass(frozen=True)
class EvalOptions:
    """How a model is asked.

    Attributes:
        batch_size: rows among which is searched, and that are asked at a time.
        candidates: that retrieval ranks again by matching, 0 for none.
        vocabulary: WordPieces of BLEU and METEOR.
        known: training rows, from which the baselines of captions come; None for no baselines.
        limit: only so many rows, drawn from the seed; None for all.
        max_new_tokens: longest caption.
        beams: of the search, 1 for greedy.
        question: instead of what the model was asked in training.
        seed: of what is drawn.
        device: of the model.
    """

    batch_size: int = 64
    candidates: int = 0
    vocabulary: Path | None = None
    known: tuple[Path, ...] = ()
    limit: int | None = None
    max_new_tokens: int = 128
    beams: int = 1
    question: str | None = None
    seed: int = 0
    device: str = "cpu"


def kind_of(folder: Path) -> str:
    """Which kind of trained model is in `folder`.

    Raises:
        ValueError: it is none.
    """
    if (folder / "heads").is_dir():
        return STAGE1
    if (folder / "head").is_dir():
        return PROPERTIES
    if (folder / MANIFEST).is_file() and (folder / "model.safetensors").is_file():
        return LANGUAGE
    raise ValueError(
        f"{folder} must be a model that edt train made, of stage1, stage2 or finetune; it has "
        "neither heads/, nor head/, nor model.safetensors with a manifest"
    )


def evaluate(
    folder: Path, data: Sequence[Path], options: EvalOptions
) -> tuple[Scores, dict[str, Any], list[tuple[str, ...]]]:
    """Scores of the model in `folder` on prepared data.

    Returns:
        Scores by setting; what they depend on; and a table of what was said: of captions (id, true,
        said) of every row, of properties (id, true, predicted) with a column per target.

    Raises:
        ValueError: `folder` has no model; the model needs what is not given.
    """
    for name in ("batch_size", "limit", "max_new_tokens", "beams"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    pieces = None if options.vocabulary is None else Pieces(options.vocabulary)
    kind = kind_of(folder)
    texts: list[tuple[str, ...]] = []
    if kind == STAGE1:
        scores, settings = _stage1(folder, data, options)
    elif kind == PROPERTIES:
        scores, settings, texts = _properties(folder, data, options)
    else:
        scores, settings, texts = _language(folder, data, options, pieces)
    packages = ("edt-kernels", "torch", "transformers", "rdkit")
    settings = {
        "kind": kind,
        "model": folder.name,
        **settings,
        "data": PreparedData(data).provenance(),
        "seed": options.seed,
        "versions": {**{p: version(p) for p in packages}, "python": platform.python_version()},
    }
    return scores, settings, texts


def _limited(data: PreparedData, options: EvalOptions) -> PreparedData | Subset[Row]:
    if options.limit is None or options.limit >= len(data):
        return data
    drawn = np.random.default_rng(options.seed).permutation(len(data))[: options.limit]
    return Subset(data, sorted(drawn.tolist()))


def _stage1(
    folder: Path, data: Sequence[Path], options: EvalOptions
) -> tuple[Scores, dict[str, Any]]:
    model = Stage1Model.from_pretrained(folder).to(options.device)
    connector, predictor = model.objective.connector, None
    if connector.patch_options.needs_predictor:
        predictor = read_predictor(Manifest.read(folder).folder(PREDICTOR))
    rows = PreparedData(data, wants=("text", "molecule"))
    molecules = MoleculeBatch(model.graph_encoder, connector, predictor, rows)
    told = read_provenance(folder)
    longest = told["config"]["text"]["max_words"] if told else None
    collate = Stage1Batch(molecules, model.words, max_words=longest)
    found = embed(model, _limited(rows, options), collate, batch_size=options.batch_size)
    scores = retrieval_scores(
        model,
        found,
        batch_size=options.batch_size,
        candidates=options.candidates,
        seed=options.seed,
    )
    return scores, {"rows": len(found.texts), "max_words": longest}


def _properties(
    folder: Path, data: Sequence[Path], options: EvalOptions
) -> tuple[Scores, dict[str, Any], list[tuple[str, ...]]]:
    model = PropertyModel.from_pretrained(folder).to(options.device)
    rows = PreparedData(data, wants=("targets", "molecule"))
    if rows.target_names() != model.options.targets:
        raise ValueError(
            f"the data must have the targets {', '.join(model.options.targets)}, they have "
            f"{', '.join(rows.target_names()) or 'none'}"
        )
    molecules = MoleculeBatch(model.graph_encoder, model.connector, model.predictor, rows)
    collate = PropertyBatch(molecules)
    chosen = _limited(rows, options)
    ids, predicted, true = [], [], []
    for read in DataLoader(chosen, options.batch_size, collate_fn=list):
        ids += [row.id for row in read]
        batch = collate(read)
        predicted.append(model.predict(batch["graph"], batch["patches"]).cpu())
        true.append(batch["targets"])
    predicted, true = (torch.cat(x).double().numpy() for x in (predicted, true))
    score = regression_scores
    if model.options.kind == CLASSIFICATION:
        score = classification_scores
    scores = {}
    for i, name in enumerate(model.options.targets):
        scores[name] = score(true[:, i], predicted[:, i])
        if model.options.kind != CLASSIFICATION:
            constant = np.full(len(true), model.options.mean[i])
            scores[f"{name}, training mean"] = score(true[:, i], constant)
    names = model.options.targets
    texts = [("id", *(f"true {n}" for n in names), *(f"predicted {n}" for n in names))]
    for name, numbers in zip(ids, np.hstack([true, predicted]).tolist(), strict=True):
        texts.append((name, *("" if np.isnan(x) else repr(x) for x in numbers)))
    return scores, {"rows": len(chosen), "head": model.options.kind}, texts


def _language(
    folder: Path, data: Sequence[Path], options: EvalOptions, pieces: Pieces | None
) -> tuple[Scores, dict[str, Any], list[tuple[str, ...]]]:
    model = MoleculeLM.from_pretrained(folder).to(options.device)
    rows = PreparedData(data, wants=("said", "molecules"))
    stored = stored_patches(model, rows)
    prompt = _prompt(folder, options)
    chosen = _limited(rows, options)
    asked = {"stored": stored, "batch_size": options.batch_size}
    perplexity = perplexities(model, chosen, prompt, seed=options.seed, **asked)
    scores: Scores = {f"perplexity, {name}": {"": value} for name, value in perplexity.items()}
    settings = {"rows": len(chosen), "questions": list(prompt.questions)}
    captioned = [row for row in (chosen[i] for i in range(len(chosen))) if row.text is not None]
    texts = [("id", "true", "said")]
    if captioned and pieces is not None:
        decoding = {"max_new_tokens": options.max_new_tokens, "num_beams": options.beams}
        said = describe_rows(model, captioned, prompt, **asked, **decoding)
        true = [row.text for row in captioned]
        scores["captions"] = caption_scores(true, said, pieces)
        scores |= _baselines(captioned, true, pieces, options)
        settings |= {"decoding": decoding, "bleu": _bleu_settings(pieces)}
        texts += [(row.id, t, s) for row, t, s in zip(captioned, true, said, strict=True)]
    return scores, settings, texts


def _prompt(folder: Path, options: EvalOptions) -> QuestionConfig:
    """What the model was asked in training, or is to be asked now."""
    if options.question is not None:
        return QuestionConfig(questions=(options.question,))
    told = read_provenance(folder)
    return build(QuestionConfig, told["config"]["prompt"]) if told else QuestionConfig()


def _bleu_settings(pieces: Pieces) -> dict[str, Any]:
    return {
        "tokens": f"lower-cased WordPieces of {pieces.vocabulary.name}, at most {LONGEST}",
        "bleu": "corpus, nltk",
        "rouge": "mean F-measure, rouge-score, no stemmer",
        "meteor": "mean, nltk, on the same tokens",
        "versions": {name: version(name) for name in ("nltk", "sacrebleu", "rouge-score")},
    }


def _baselines(
    rows: Sequence[Row], true: Sequence[str], pieces: Pieces, options: EvalOptions
) -> Scores:
    if not options.known:
        return {}
    known = PreparedData(options.known, wants=("text", "molecule"))
    known = [known[i] for i in range(len(known))]
    said = baselines(
        [row.molecules[0].molecule for row in rows],
        [row.molecules[0].molecule for row in known],
        [row.text for row in known],
        seed=options.seed,
        progress=True,
    )
    return {
        f"captions, {name}": caption_scores(true, texts, pieces) for name, texts in said.items()
    }


def score_file(path: Path, vocabulary: Path) -> tuple[Scores, dict[str, Any]]:
    """Scores of captions in a table with tabs, columns "ground truth" and "output" as MolT5's.

    Raises:
        ValueError: a column is missing.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    missing = [name for name in (TRUTH, OUTPUT) if name not in header]
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(header)}")
    true, said = ([row[header.index(name)] for row in rows] for name in (TRUTH, OUTPUT))
    pieces = Pieces(vocabulary)
    settings = {"kind": "captions", "rows": len(rows), "bleu": _bleu_settings(pieces)}
    return {"captions": caption_scores(true, said, pieces)}, settings


def rows_of(scores: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """Scores as rows of a table, a column per measure.

    >>> rows_of({"all": {"recall@1": 0.5}})
    [('', 'recall@1'), ('all', '0.5000')]
    """
    names = list(dict.fromkeys(name for row in scores.values() for name in row))
    header = ("", *names)
    body = [
        (setting, *(_shown(row[name]) if name in row else "" for name in names))
        for setting, row in scores.items()
    ]
    return [header, *body]


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
