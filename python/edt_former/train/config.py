"""What a training run is told: YAML or JSON, checked key by key before anything starts."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from edt_former.config import TRAIN_EMBEDDINGS
from edt_former.extras import need

SHIPPED = "shipped"
EFFECTIVE = "config.json"
SCHEDULES = ("cosine", "linear", "constant")
HEADS = ("regression", "classification")

T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """Which rows are read.

    Attributes:
        train: folders of `edt prepare`.
        validation: likewise; none for no validation.
        workers: processes that read rows and pack graphs beside training.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    workers: int = 0


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast is trained.

    Attributes:
        steps: of the optimiser.
        batch_size: rows of a process and a pass; a step has batch_size x accumulation x processes.
        accumulation: passes whose gradients are summed for a step.
        learning_rate: the highest, after `warmup` steps.
        schedule: how it falls to zero: "cosine", "linear"; or "constant".
        weight_decay: of the matrices of linear layers and attention; none of biases, norms,
            embeddings and queries.
        max_grad_norm: gradients are scaled down to it.
        bf16: products in bfloat16, weights and their sums in float32.
        checkpointing: activations of layers are computed again instead of kept.
        sharding: parameters, gradients and optimiser state are spread over the processes (FSDP2);
            without it every process has them all (DDP).
        balance: rows of a step are dealt so that processes have as many tokens each.
        log_every: steps between lines of the log; means over the steps since the last one.
        save_every: steps between checkpoints, a multiple of `log_every`.
        evaluate_every: steps between losses on the validation rows, 0 for never.
        keep: how many checkpoints stay.
    """

    steps: int
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: int = 100
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    bf16: bool = False
    checkpointing: bool = False
    sharding: bool = False
    balance: bool = True
    log_every: int = 10
    save_every: int = 100
    evaluate_every: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every"):
            at_least(f"training.{name}", getattr(self, name), 1)
        at_least("training.keep", self.keep, 2)
        one_of("training.schedule", self.schedule, SCHEDULES)
        if self.save_every % self.log_every:
            raise ValueError(
                "training.save_every must be a multiple of log_every, so that a run that resumes "
                f"logs the same means; got {self.save_every} and {self.log_every}"
            )


@dataclass(frozen=True)
class TextConfig:
    """The text branch of the first stage.

    Attributes:
        bert: a folder with a BERT of the connector's size, such as SciBERT: its weights and its
            words are taken.
        vocabulary: a file of WordPieces, one a line; or how many are learned from the training
            texts. Not with `bert`.
        max_words: of a text; the rest is cut off.
    """

    bert: str | None = None
    vocabulary: str | int | None = None
    max_words: int = 128

    def __post_init__(self) -> None:
        if (self.bert is None) == (self.vocabulary is None):
            raise ValueError("text must have one of bert and vocabulary")
        at_least("text.max_words", self.max_words, 2)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Options of `edt_former.train.objectives.RepresentationLearning`."""

    embed_dim: int = 512
    temperature: float = 0.1
    label_smoothing: float = 0.1
    matching: str = "all"


@dataclass(frozen=True)
class Stage1Config:
    """The first stage: a connector learns to read molecules by their texts.

    Attributes:
        out: the folder of the run.
        data: rows with one molecule and a text.
        text: the text branch.
        connector: its name and options; those that follow from the other parts are filled in.
        training: see `TrainingConfig`.
        graph_encoder: a folder, or "shipped".
        predictor: likewise; read where patches come from entropies.
        tune_graph_encoder: it is trained too.
        objective: of the three losses.
        seed: of everything that is drawn.
    """

    out: str
    data: DataConfig
    text: TextConfig
    connector: dict[str, Any]
    training: TrainingConfig
    graph_encoder: str = SHIPPED
    predictor: str = SHIPPED
    tune_graph_encoder: bool = False
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    seed: int = 0


@dataclass(frozen=True)
class QuestionConfig:
    """How rows with a text, but no conversation, become one.

    Attributes:
        questions: one is asked about the molecule, the text answers; "{smiles}" in it is the
            molecule's SMILES. Of several, a row has its own by its number.
        system: what the system says before, None for nothing.
    """

    questions: tuple[str, ...] = ("Describe the molecule.",)
    system: str | None = None


@dataclass(frozen=True)
class Stage2Config:
    """The second stage: a frozen language model reads the connector's tokens.

    Attributes:
        out: the folder of the run.
        data: rows with a conversation, or with a molecule and a text.
        language_model: a folder, or a name on the Hugging Face Hub.
        training: see `TrainingConfig`.
        stage1: the folder that the first stage saved, whose connector and frozen parts go on;
            None starts from `connector`.
        connector: its name and options, where there is no first stage.
        graph_encoder: a folder, or "shipped"; None takes that of the first stage.
        predictor: likewise.
        prompt: how texts become conversations.
        train_embeddings: "new_rows", "all" or "none", see `edt_former.config.MoleculeConfig`.
        new_tokens: further tokens whose embeddings are trained rows.
        max_length: tokens of a row; None for what the language model reads.
        seed: of everything that is drawn.
    """

    out: str
    data: DataConfig
    language_model: str
    training: TrainingConfig
    stage1: str | None = None
    connector: dict[str, Any] | None = None
    graph_encoder: str | None = None
    predictor: str | None = None
    prompt: QuestionConfig = field(default_factory=QuestionConfig)
    train_embeddings: str = "new_rows"
    new_tokens: tuple[str, ...] = ()
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("train_embeddings", self.train_embeddings, TRAIN_EMBEDDINGS)
        if (self.stage1 is None) == (self.connector is None):
            raise ValueError("one of stage1 and connector must be given")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the language model (arXiv:2106.09685), by peft.

    Attributes:
        rank: of the adapters.
        alpha: they are scaled by alpha / rank.
        dropout: before them, in training.
        targets: names of the linear layers that get one; "all-linear" for all but the head.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1
    targets: tuple[str, ...] = ("all-linear",)

    def __post_init__(self) -> None:
        at_least("lora.rank", self.rank, 1)


@dataclass(frozen=True)
class HeadConfig:
    """A property head on the connector's tokens.

    Attributes:
        kind: "regression" (of standardised targets) or "classification" (yes or no, of each).
        width: of its hidden layer.
        dropout: of the mean token, in training.
    """

    kind: str
    width: int = 256
    dropout: float = 0.1

    def __post_init__(self) -> None:
        one_of("head.kind", self.kind, HEADS)


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning of a model of the second stage: its language model by adapters, or a head.

    Attributes:
        out: the folder of the run.
        model: a checkpoint of a `MoleculeLM`, or "shipped".
        data: as of the second stage; with a head rows with one molecule and targets.
        training: see `TrainingConfig`.
        lora: adapters of the language model.
        head: predicts the targets; the language model is not read then.
        train_connector: the connector is trained too.
        prompt: how texts become conversations.
        max_length: tokens of a row; None for what the language model reads.
        seed: of everything that is drawn.
    """

    out: str
    model: str
    data: DataConfig
    training: TrainingConfig
    lora: LoraConfig | None = None
    head: HeadConfig | None = None
    train_connector: bool = True
    prompt: QuestionConfig = field(default_factory=QuestionConfig)
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lora is not None and self.head is not None:
            raise ValueError("lora and head cannot be given both: a head reads no language model")
        if self.lora is None and self.head is None and not self.train_connector:
            raise ValueError("nothing would be trained: give lora, head or train_connector")


@dataclass(frozen=True)
class LanguageConfig:
    """A small causal language model from the texts of data sets, where there is none at hand.

    Attributes:
        out: the folder of the run.
        data: rows with texts or conversations; their molecules are not read.
        training: see `TrainingConfig`.
        vocabulary: byte-pair tokens that are learned from the training texts.
        width: of the hidden states.
        layers: number of layers.
        heads: attention heads.
        ffn: width inside the feed-forward.
        positions: the longest row that it reads.
        dropout: of attention weights, in training.
        prompt: how texts become conversations, as the second stage will write them.
        max_length: tokens of a training text.
        seed: of everything that is drawn.
    """

    out: str
    data: DataConfig
    training: TrainingConfig
    vocabulary: int = 4096
    width: int = 256
    layers: int = 4
    heads: int = 4
    ffn: int = 768
    positions: int = 512
    dropout: float = 0.0
    prompt: QuestionConfig = field(default_factory=QuestionConfig)
    max_length: int = 256
    seed: int = 0


def at_least(name: str, value: int, least: int) -> None:
    """Refuses a smaller value.

    Raises:
        ValueError: it is smaller.
    """
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def one_of(name: str, value: object, known: Sequence[object]) -> None:
    """Refuses an unknown value.

    Raises:
        ValueError: it is none of them.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def read_config(kind: type[T], path: Path | str, overrides: Sequence[str] = ()) -> T:
    """Reads a configuration file; relative paths in it are those of the current folder.

    Args:
        kind: one of the classes above.
        path: ends in .yaml, .yml or .json.
        overrides: "key=value" each, the key with dots for what is inside another, the value as in
            the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is unknown or missing, or a value is of another type or not allowed. It
            names the key.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "language.json")
    ...     content = {"out": "runs/lm", "data": {"train": ["a"]}, "training": {"steps": 10}}
    ...     _ = path.write_text(json.dumps(content))
    ...     config = read_config(LanguageConfig, path, ["training.steps=20"])
    >>> config.training.steps, config.data.train
    (20, ('a',))
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    content = _load(path)
    for override in overrides:
        _set(content, override)
    return build(kind, content)


def _load(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        content = json.loads(text)
    elif path.suffix in (".yaml", ".yml"):
        yaml = need("yaml", extra="train", purpose=f"reading {path.name}")
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    else:
        raise ValueError(f"{path} must end in .yaml, .yml or .json")
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(content).__name__}")
    return content


def _set(content: dict[str, Any], override: str) -> None:
    name, given, text = override.partition("=")
    if not given:
        raise ValueError(f"an override must be key=value, got {override!r}")
    *path, last = name.split(".")
    inside = content
    for key in path:
        inside = inside.setdefault(key, {})
        if not isinstance(inside, dict):
            raise ValueError(f"{name} cannot be set: {key} holds no keys")
    try:
        inside[last] = json.loads(text)
    except json.JSONDecodeError:
        inside[last] = text


def build(kind: type[T], content: Mapping[str, Any], where: str = "") -> T:
    """A configuration from keys and values; see `read_config`.

    >>> build(LoraConfig, {"rank": 4, "drop": 0.1})
    Traceback (most recent call last):
    ...
    ValueError: unknown key drop, did you mean dropout?
    """
    known: dict[str, Field] = {f.name: f for f in fields(kind)}
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {where}{close[0]}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"unknown key {where}{key}, {hint}")
    hints = get_type_hints(kind)
    values = {}
    for name, option in known.items():
        if name in content:
            values[name] = _value(hints[name], content[name], f"{where}{name}")
        elif option.default is MISSING and option.default_factory is MISSING:
            raise ValueError(f"key {where}{name} is missing")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _one_of_types(get_args(hint), value, where)
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must hold keys, got {value!r}")
        return build(hint, value, f"{where}.")
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ValueError(f"{where} must be a list, got {value!r}")
        inner = get_args(hint)[0]
        return tuple(_value(inner, item, f"{where}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must hold keys, got {value!r}")
        return dict(value)
    return _plain(hint, value, where)


def _one_of_types(hints: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and type(None) in hints:
        return None
    refused = []
    for hint in (hint for hint in hints if hint is not type(None)):
        try:
            return _value(hint, value, where)
        except ValueError as error:
            refused.append(error)
    raise refused[0] if len(refused) == 1 else ValueError(f"{where} cannot be {value!r}")


def _plain(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str):
        # YAML reads 1e-4, without a point, as text.
        with suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} must be {_NAMES[hint]}, got {value!r}")
    return value


_NAMES = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}


def effective(config: Any) -> dict[str, Any]:
    """Everything that a run was told, defaults included, as it is saved beside its weights."""
    return json.loads(json.dumps({"kind": type(config).__name__, **asdict(config)}))
