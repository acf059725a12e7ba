"""Connectors and ordinary LoRA on measured properties, at one training budget, answering in text.

Every contender begins with the same small language model, frozen, and the same frozen graph encoder
and sees the same molecules in the same order. The language model has learned the form of the
answers before, from answers drawn at random: it knows what is common, and no molecule.
"""

from __future__ import annotations

import copy
import csv
import gzip
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rdkit.Chem.Scaffolds import MurckoScaffold
from torch import Tensor

from edt_former import shipped
from edt_former.chem import Invalid, Molecule, rdkit_mol, read_molecule
from edt_former.connectors import make_connector
from edt_former.language.adapters import is_adapter
from edt_former.language.frozen import write_json
from edt_former.model import MoleculeLM
from edt_former.tasks.forgetting import Forgetting, forgetting
from edt_former.train.tiny.connector import ADAPTERS, adapter_config, connector_configs
from edt_former.train.tiny.loop import fit

MORA, EDT, STATIC, LORA = "MoRA", "EDT-Former", "static Q-Former", "ordinary LoRA"
CONTENDERS = (MORA, EDT, STATIC, LORA)
CONSTANT = "constant answer"
RANK = ADAPTERS["rank"]
BATCH, RATE = 32, 2e-3
FORM_STEPS, FORM_RATE = 150, 1e-3
PLAIN = 100
SHARES = 0.8, 0.9
"""Of the molecules: train up to the first, validation up to the second, test from there."""

_NUMBER = re.compile(r"-?\d+(\.\d+)?")


@dataclass(frozen=True)
class Property:
    """A measured property that is asked for in words.

    Attributes:
        file: of MoleculeNet, with columns "smiles" and `column`.
        column: the value.
        question: about a molecule.
        numeric: the answer is a number with one decimal, otherwise yes or no.
    """

    file: str
    column: str
    question: str
    numeric: bool

    def text(self, value: float) -> str:
        """The answer.

        >>> PROPERTIES["ESOL"].text(-3.25), PROPERTIES["BBBP"].text(1)
        ('-3.2', 'yes')
        """
        if self.numeric:
            return f"{value:.1f}"
        return "yes" if value else "no"

    def metric(self, said: np.ndarray, true: np.ndarray) -> np.ndarray | float:
        """Mean absolute error of numbers, area under the ROC curve of scores."""
        if self.numeric:
            return float(np.abs(said - true).mean())
        return auroc(said, true)


PROPERTIES = {
    "ESOL": Property(
        "ESOL.csv.gz",
        "measured log solubility in mols per litre",
        "what is the log of the solubility ?",
        numeric=True,
    ),
    "BBBP": Property("BBBP.csv.gz", "p_np", "is it in the brain ?", numeric=False),
}


@dataclass(frozen=True)
class Split:
    """Molecules with values, by scaffold.

    Attributes:
        molecules, values: of each part, "train", "valid" and "test".
        left_out: rows that are no molecule.
    """

    molecules: dict[str, list[Molecule]]
    values: dict[str, np.ndarray]
    left_out: int


def read_split(folder: Path, of: Property) -> Split:
    """The rows of a property's file, split by Murcko scaffold as MoleculeNet does.

    Scaffolds go to the training part from the most frequent on until it is full, then to the
    validation part, the rest to the test part; of those as frequent, the last of the file first.
    """
    with gzip.open(folder / of.file, "rt", newline="") as file:
        rows = [(row["smiles"], float(row[of.column])) for row in csv.DictReader(file)]
    read = [(read_molecule(smiles), value) for smiles, value in rows]
    good = [(molecule, value) for molecule, value in read if not isinstance(molecule, Invalid)]
    groups: dict[str, list[int]] = {}
    for index, (molecule, _) in enumerate(good):
        mol = rdkit_mol(molecule)
        scaffold = MurckoScaffold.MurckoScaffoldSmiles(mol=mol, includeChirality=False)
        groups.setdefault(scaffold, []).append(index)
    parts: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    ends = [share * len(good) for share in SHARES]
    for group in sorted(groups.values(), key=lambda g: (len(g), g[0]), reverse=True):
        if len(parts["train"]) + len(group) <= ends[0]:
            parts["train"] += group
        elif len(parts["train"]) + len(parts["valid"]) + len(group) <= ends[1]:
            parts["valid"] += group
        else:
            parts["test"] += group
    molecules = {name: [good[i][0] for i in rows] for name, rows in parts.items()}
    values = {name: np.array([good[i][1] for i in rows]) for name, rows in parts.items()}
    return Split(molecules, values, len(read) - len(good))


def run_contest(
    data: Path,
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1),
    steps: int = 150,
    contenders: Sequence[str] = CONTENDERS,
    progress: Callable[[str], object] = lambda _: None,
) -> dict[str, object]:
    """Trains and tests every contender on every property; goes on where it was stopped.

    Args:
        data: a folder with MoleculeNet's files.
        out: gets checkpoints and `contest.json`.
        seeds: each is a training from other weights in another order.
        steps: of every contender, `BATCH` molecules each.
        contenders: which, of `CONTENDERS`.
        progress: is told what begins.

    Returns:
        What is in `contest.json`: by property and contender the metric with its 95 % interval (a
        bootstrap over the test molecules of the mean over seeds), and what it depends on.

    Raises:
        FileNotFoundError: a file is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    splits = {name: read_split(data, told) for name, told in PROPERTIES.items()}
    start = learn_form(splits, out)
    result: dict[str, object] = {
        "steps": steps,
        "batch": BATCH,
        "learning rate": RATE,
        "rank": RANK,
        "seeds": list(seeds),
        "properties": {},
    }
    for name, split in splits.items():
        told, true = PROPERTIES[name], split.values["test"]
        texts = plain_texts(start, splits, name)
        rows: dict[str, object] = {CONSTANT: _constant(told, split)}
        for contender in contenders:
            said, runs = [], []
            for seed in seeds:
                progress(f"{name}, {contender}, seed {seed}")
                label = f"{name} {contender} {seed}".replace(" ", "-")
                model = contestant(contender, start, seed)
                begun = time.perf_counter()
                train(model, told, split, out / f"{label}.pt", label, steps, seed)
                seconds = time.perf_counter() - begun
                answers, unread = ask(model, told, split)
                said.append(answers)
                lost = forgetting(model, start.language_model, texts, batch_size=64)
                runs.append({"seconds": round(seconds, 1), "unread": unread, **_plain(lost)})
            value, low, high = interval(told, np.stack(said), true)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            row = {"value": value, "low": low, "high": high, "trained": trained, "runs": runs}
            rows[contender] = row
        sizes = {part: len(molecules) for part, molecules in split.molecules.items()}
        result["properties"][name] = {
            "metric": "mean absolute error" if told.numeric else "AUROC",
            "molecules": {**sizes, "left out": split.left_out},
            "contenders": rows,
        }
        write_json(out / "contest.json", result)
    return result


def learn_form(splits: Mapping[str, Split], out: Path) -> MoleculeLM:
    """The shipped model whose language model has learned the form of the answers, and no molecule.

    All of its weights train on questions without a molecule, answered by a value that some training
    molecule has, drawn at random. Then it is frozen.
    """
    model = shipped.load("qformer_32")
    model.connector.requires_grad_(False)
    model.language_model.requires_grad_(True)

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        prompts, answers = [], []
        for name in rng.choice(sorted(splits), BATCH):
            told = PROPERTIES[name]
            prompts.append(model.processor.prompt(told.question, molecules=0))
            answers.append(told.text(rng.choice(splits[name].values["train"])))
        value = model(**model.processor(prompts, answers=answers)).loss
        return value, {"nats": value.item()}

    fit(
        model,
        loss,
        label="form of the answers",
        checkpoint=out / "form.pt",
        steps=FORM_STEPS,
        lr=FORM_RATE,
        seed=0,
    )
    model.language_model.requires_grad_(False)
    return model.eval()


def contestant(name: str, start: MoleculeLM, seed: int) -> MoleculeLM:
    """A new contender on the frozen parts of `start`."""
    language_model = copy.deepcopy(start.language_model)
    encoder = start.graph_encoder
    torch.manual_seed(seed)
    width = language_model.get_input_embeddings().embedding_dim
    configs = connector_configs(encoder.width, width, 0)
    known = {
        MORA: lambda: adapter_config(encoder.width, language_model),
        EDT: lambda: configs["edt_former"],
        STATIC: lambda: configs["qformer_32"],
        LORA: lambda: configs["qformer_32"],
    }
    model = MoleculeLM.from_parts(
        language_model,
        encoder,
        make_connector(known[name]()),
        shipped.predictor(),
        tokenizer=start.processor.tokenizer,
    )
    if name == LORA:
        lora = {"rank": RANK, "alpha": RANK, "dropout": 0.0, "targets": ["all-linear"]}
        model.add_lora(lora)
        for parameter, weight in model.named_parameters():
            weight.requires_grad_(is_adapter(parameter))
    return model


def prompts_of(
    model: MoleculeLM, told: Property, molecules: Sequence[Molecule]
) -> tuple[list[str], list[list[Molecule]]]:
    """The prompts about molecules and what stands at their marks: to LoRA it is the SMILES."""
    if model.config.lora is None:
        prompt = model.processor.prompt(told.question)
        return [prompt] * len(molecules), [[molecule] for molecule in molecules]
    asked = [f"{molecule.smiles} {told.question}" for molecule in molecules]
    return [model.processor.prompt(a, molecules=0) for a in asked], [[] for _ in molecules]


def train(
    model: MoleculeLM,
    told: Property,
    split: Split,
    checkpoint: Path,
    label: str,
    steps: int,
    seed: int,
) -> None:
    """The language model's loss on the answers of training molecules."""
    molecules, values = split.molecules["train"], split.values["train"]
    model.train()

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = rng.choice(len(molecules), BATCH, replace=False)
        prompts, marked = prompts_of(model, told, [molecules[row] for row in rows])
        answers = [told.text(values[row]) for row in rows]
        value = model(**model.processor(prompts, marked, answers=answers)).loss
        return value, {"nats": value.item()}

    fit(model, loss, label=label, checkpoint=checkpoint, steps=steps, lr=RATE, seed=seed)
    model.eval()


@torch.no_grad()
def ask(model: MoleculeLM, told: Property, split: Split) -> tuple[np.ndarray, int]:
    """What a model says of the test molecules, and of how many it says nothing that can be read.

    A number is read from the text that greedy decoding gives, the training mean where there is
    none. The score of a yes is the difference of its logit to that of a no, as the first word of
    the answer.
    """
    said, unread = [], 0
    molecules, mean = split.molecules["test"], split.values["train"].mean()
    vocabulary = model.processor.tokenizer.get_vocab()
    for start in range(0, len(molecules), BATCH):
        prompts, marked = prompts_of(model, told, molecules[start : start + BATCH])
        inputs = model.processor(prompts, marked)
        if told.numeric:
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            for text in model.processor.decode(ids):
                number = _NUMBER.match(text.replace(" ", ""))
                unread += number is None
                said.append(mean if number is None else float(number[0]))
        else:
            logits = model(**inputs).logits[:, -1]
            said += (logits[:, vocabulary["yes"]] - logits[:, vocabulary["no"]]).tolist()
    return np.array(said), unread


def interval(
    told: Property, said: np.ndarray, true: np.ndarray, *, resamples: int = 1000
) -> tuple[float, float, float]:
    """The metric's mean over seeds, and its 95 % interval by a bootstrap over molecules.

    Args:
        told: decides the metric.
        said: [seeds, molecules].
        true: [molecules].
        resamples: of the bootstrap; those that lack a class are drawn again.

    Raises:
        ValueError: all molecules are of one class.
    """
    mean = float(np.mean([told.metric(one, true) for one in said]))
    if math.isnan(mean):
        raise ValueError(f"true must have both classes, got {len(true)} of {np.unique(true)}")
    rng, found = np.random.default_rng(0), []
    while len(found) < resamples:
        rows = rng.integers(len(true), size=len(true))
        value = np.mean([told.metric(one[rows], true[rows]) for one in said])
        if not math.isnan(value):
            found.append(value)
    low, high = np.percentile(found, [2.5, 97.5])
    return mean, float(low), float(high)


def auroc(scores: np.ndarray, true: np.ndarray) -> float:
    """The share of pairs of a yes and a no in which the yes has the higher score, ties one half.

    >>> auroc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
    0.75
    """
    yes, no = scores[true > 0], scores[true <= 0]
    if not len(yes) or not len(no):
        return math.nan
    sign = np.sign(yes[:, None] - no)
    return float((sign.mean() + 1) / 2)


def plain_texts(model: MoleculeLM, splits: Mapping[str, Split], trained: str) -> list[str]:
    """Texts without a molecule that the language model has learned and a contender does not see.

    They are the questions about the other properties, answered by `PLAIN` of their training values.
    """
    texts = []
    for name, split in splits.items():
        if name != trained:
            prompt = model.processor.prompt(PROPERTIES[name].question, molecules=0)
            values = split.values["train"][:PLAIN]
            texts += [f"{prompt} {PROPERTIES[name].text(value)}" for value in values]
    return texts


def _constant(told: Property, split: Split) -> dict[str, float]:
    """What the training values alone give: their median, or no preference."""
    train, true = split.values["train"], split.values["test"]
    said = np.full((1, len(true)), np.median(train) if told.numeric else 0.0)
    value, low, high = interval(told, said, true)
    return {"value": value, "low": low, "high": high, "trained": 0}


def _plain(lost: Forgetting) -> dict[str, object]:
    figures = asdict(lost)
    return {"forgetting": {name: figures[name] for name in ("before", "after", "equal")}}
