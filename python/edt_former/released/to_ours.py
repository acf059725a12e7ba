"""A released file becomes the parts of this package."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Size, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from edt_former.checkpoint import portable
from edt_former.chem import ConformerOptions
from edt_former.config import MoleculeConfig
from edt_former.connectors import make_connector
from edt_former.graph import make_encoder
from edt_former.language.frozen import CONFIG, content_hash, load_part, read_weights
from edt_former.language.manifest import FrozenPart, Manifest
from edt_former.processor import TOKENIZER_FILE, MoleculeProcessor, load_tokenizer
from edt_former.released import lora
from edt_former.released.mora import GeneratorSizes, from_generator, prefix_of
from edt_former.released.plan import Comparison, Plan, compare, initial, refuse, shapes_of
from edt_former.released.predictor import from_gpt2, is_gpt2, is_predictor
from edt_former.released.sizes import Told, connector_config, graph_config, has_text
from edt_former.released.tree import (
    BOTH,
    CONNECTOR,
    GRAPH,
    HEADS,
    KEPT,
    LANGUAGE,
    POSITION_IDS,
    STATIC_MASK,
    UNUSED_HEAD,
    Tree,
    read_tree,
)
from edt_former.tokens import NextAtomPredictor
from edt_former.train.objectives import RepresentationLearning
from edt_former.weights import WEIGHTS, StoredTensor, open_weights

MOL_TOKEN, PAD_TOKEN = "<mol>", "[PAD]"
PREDICTOR = "predictor"
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Options:
    """What a released file does not tell.

    Args:
        told: sizes that shapes do not tell.
        moleculestm: MoleculeSTM's file, where the source lacks the 2D encoder.
        unimol: Uni-Mol's file, where the source lacks the 3D encoder.
        language_model: a folder with the language model's `config.json` and its tokenizer; None
            where only the encoder and the connector are wanted.
        predictor: the next-atom predictor, a GPT-2 or a folder of ours; needed by a whole model.
        predictor_heads: its attention heads, see `from_gpt2`.
        lora_alpha: of adapters in the language model, which are merged with it.
        generator: sizes of MoRA's weight generator, where the source is one.
        allow_missing, allow_unexpected: patterns of names in the source; what is missing is then
            initialised anew, what is unexpected is left out.
    """

    told: Told = field(default_factory=Told)
    moleculestm: Path | None = None
    unimol: Path | None = None
    language_model: Path | None = None
    predictor: Path | None = None
    predictor_heads: int | None = None
    lora_alpha: float | None = None
    generator: GeneratorSizes = field(default_factory=GeneratorSizes)
    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()


@dataclass
class _Part:
    """One part in the making.

    Attributes:
        name: of the part.
        weights: what the source has.
        expected: what its module has.
        comparison: of the two.
        config: of the module.
        build: makes the module of the config; None where no new one can be made.
    """

    name: str
    weights: dict[str, StoredTensor]
    expected: Mapping[str, Size]
    comparison: Comparison
    config: Any = None
    build: Callable[[Any], nn.Module] | None = None

    def complete(self) -> dict[str, StoredTensor]:
        """Its tensors, with initial values for those that are missing, without unexpected ones."""
        weights = {n: self.weights[n] for n in self.expected if n in self.weights}
        missing = [n for n in self.expected if n not in weights]
        if missing:
            if self.build is None:
                raise ValueError(f"the {self.name} cannot be completed, it lacks {missing[0]}")
            new = initial(self.build, self.config)
            weights |= {n: StoredTensor.of(new[n]) for n in missing}
        return weights


def to_ours(source: Path, options: Options, *, language_model: bool = True) -> Plan:
    """Plans the folder that a released file becomes.

    * an encoder of the first stage: `graph_encoder/` and `connector/`, which
      `edt_former.language.load_part` reads, and with a text branch `heads/`:
      `RepresentationLearning.from_pretrained` reads the folder;
    * a whole model: a checkpoint for `MoleculeLM.from_pretrained`, with its frozen parts; without
      `language_model`, the folders of an encoder;
    * the GPT-2 of the next-atom predictor: a folder for `load_part(NextAtomPredictor, ...)`;
    * the weight generator of MoRA: `connector/`, see `edt_former.released.mora`.

    Beside them, `released/` keeps what the file holds and no part reads, and how it spells names.
    Tensors keep their dtype.

    Args:
        source: a file, or a folder with one or several.
        options: what the file does not tell.
        language_model: convert the language model where the file has one.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or a copy that differs; an
            option is missing or has no use here. It names all of them.
    """
    weights = open_weights(source)
    if is_gpt2(weights):
        return from_gpt2(source, heads=options.predictor_heads)
    if prefix_of(weights) is not None:
        return from_generator(source, options.generator)
    tree = read_tree(weights)
    _add_encoders(source, tree, options)
    _check_copies(source, tree)
    graph, connector = _graph(tree, options.told), _connector(tree, options.told)
    parts = [graph, connector]
    if tree.parts[HEADS]:
        if not has_text(tree.parts[CONNECTOR]):
            raise ValueError(f"{source} has heads of the first stage and no text branch")
        parts.append(_heads(tree, connector))
    full = bool(tree.parts[LANGUAGE]) and language_model
    text = None
    if full:
        text = _LanguageModel(source, tree, options)
        parts.append(text.part)
    else:
        _refuse_useless(options, "no language model is converted")
    unplaced = Comparison([], tree.unexpected, [])
    refuse(
        source,
        [*(part.comparison for part in parts), unplaced],
        allow_missing=options.allow_missing,
        allow_unexpected=options.allow_unexpected,
    )
    plan = Plan(_described(tree, graph, connector), tree.layout.spell("encoder.*"))
    plan.notes = _notes(tree, parts)
    if text is not None:
        plan.notes += text.notes
    complete = {part.name: part.complete() for part in parts}
    _place(plan, GRAPH, complete[GRAPH], graph.config)
    if text is None:
        _place(plan, CONNECTOR, complete[CONNECTOR], connector.config)
    else:
        plan.files[WEIGHTS] = {f"connector.{n}": x for n, x in complete[CONNECTOR].items()}
        plan.files[LANGUAGE] = complete[LANGUAGE]
        plan.sharded.add(LANGUAGE)
        _add_predictor(plan, options)
        plan.finish += [text.finish, partial(_finish_model, graph.config, connector.config, text)]
    if HEADS in complete:
        _place(plan, HEADS, complete[HEADS], parts[2].config)
    plan.files[f"{KEPT}/{WEIGHTS}"] = tree.parts[KEPT]
    plan.json[f"{KEPT}/{CONFIG}"] = tree.layout._asdict()
    return plan


def _refuse_useless(options: Options, reason: str) -> None:
    for name in ("language_model", "predictor", "lora_alpha"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no use: {reason}")


def _place(plan: Plan, folder: str, weights: dict[str, StoredTensor], config: Any) -> None:
    plan.files[f"{folder}/{WEIGHTS}"] = weights
    plan.json[f"{folder}/{CONFIG}"] = config


def _add_encoders(source: Path, tree: Tree[StoredTensor], options: Options) -> None:
    """Puts the weights of encoders that come in files of their own where the tree has them."""
    files = {"moleculestm": options.moleculestm, "unimol": options.unimol}
    wanted = tuple(files) if tree.view == BOTH else ("unimol",)
    for name, file in files.items():
        inside = f"graph_encoder.{name}." if tree.view == BOTH else ""
        present = name in wanted and any(n.startswith(inside) for n in tree.parts[GRAPH])
        if file is None and (present or name not in wanted):
            continue
        if file is None:
            raise ValueError(f"{source} holds no weights of {name}: --{name} FILE is needed")
        if present or name not in wanted:
            has = "holds those weights" if present else "reads no 2D encoder"
            raise ValueError(f"--{name} has no use: {source} {has}")
        for given, stored in open_weights(file).items():
            if name == "moleculestm" and given.startswith("graph_pred_linear."):
                tree.parts[KEPT][UNUSED_HEAD + given.removeprefix("graph_pred_linear.")] = stored
            elif name == "moleculestm" or given.startswith(_UNIMOL):
                tree.parts[GRAPH][inside + given] = stored


_UNIMOL = (
    *("embed_tokens.", "encoder.emb_layer_norm.", "encoder.final_layer_norm.", "encoder.layers."),
    *("gbf.", "gbf_proj."),
)
"""Weights of Uni-Mol's encoder; its file holds heads of its training too."""


def _check_copies(source: Path, tree: Tree[StoredTensor]) -> None:
    for copy, (one, other) in tree.copies.items():
        if one.shape != other.shape or not torch.equal(one.read(), other.read()):
            raise ValueError(
                f"{tree.layout.spell(copy)} in {source} must equal the tensor that it is tied to, "
                "it differs"
            )


def _graph(tree: Tree[StoredTensor], told: Told) -> _Part:
    weights = tree.parts[GRAPH]
    config = graph_config(weights, tree.view, told)
    with torch.device("meta"):
        config = make_encoder(config).config
    return _part(tree, GRAPH, weights, make_encoder, config)


def _connector(tree: Tree[StoredTensor], told: Told) -> _Part:
    weights, ids = tree.parts[CONNECTOR], tree.parts[KEPT].get(POSITION_IDS)
    positions = None if ids is None else ids.shape[-1]
    config = connector_config(weights, tree.view, told, positions=positions)
    with torch.device("meta"):
        config = make_connector(config).config
    return _part(tree, CONNECTOR, weights, make_connector, config)


def _heads(tree: Tree[StoredTensor], connector: _Part) -> _Part:
    weights, config = tree.parts[HEADS], connector.config
    projection = weights.get("graph_proj.weight")
    task = {
        "embed_dim": 512 if projection is None else projection.shape[0],
        "begin_id": config["text_vocab_size"] - 1,
        "caption_position": config["num_queries"] + config["max_dynamic"],
        "matching": "anchors",
    }
    return _part(tree, HEADS, weights, partial(new_heads, config), task)


def new_heads(connector: Mapping[str, Any], task: Mapping[str, Any]) -> nn.Module:
    """The heads of `RepresentationLearning` on a connector of that config, without it."""
    heads = RepresentationLearning(make_connector(connector), **task)
    del heads.connector
    return heads


def _part(
    tree: Tree[StoredTensor],
    name: str,
    weights: dict[str, StoredTensor],
    build: Callable[[Any], nn.Module],
    config: Any,
) -> _Part:
    expected = shapes_of(build, config)
    comparison = compare(weights, expected, partial(tree.spell, name))
    return _Part(name, weights, expected, comparison, config, build)


class _LanguageModel:
    """The language model of a whole model: its weights, config and tokenizer."""

    def __init__(self, source: Path, tree: Tree[StoredTensor], options: Options) -> None:
        folder = options.language_model
        if folder is None:
            raise ValueError(
                f"{source} holds a language model: --language-model DIR, with its config.json and "
                "tokenizer, is needed, or --no-language-model"
            )
        for name in (CONFIG, TOKENIZER_FILE):
            if not (folder / name).is_file():
                raise ValueError(f"--language-model must be a folder with {name}, got {folder}")
        if options.predictor is None:
            raise ValueError(
                f"{source} is a whole model, whose patches come from entropies: --predictor PATH, "
                "its next-atom predictor, is needed"
            )
        self.notes: list[str] = []
        weights = tree.parts[LANGUAGE]
        wrapper = ""
        if lora.is_adapted(weights):
            weights, wrapper = self._merged(source, weights, options.lora_alpha), lora.WRAPPER
        elif options.lora_alpha is not None:
            raise ValueError(f"--lora-alpha has no use: {source} holds no adapters")
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        self.config = self._sized(AutoConfig.from_pretrained(folder), weights)
        expected, tied = empty_language_model(self.config)
        weights = self._untied(source, tree, weights, tied)
        comparison = compare(weights, expected, lambda n: tree.spell(LANGUAGE, wrapper + n))
        self.part = _Part(LANGUAGE, weights, expected, comparison)

    def _merged(
        self, source: Path, weights: dict[str, StoredTensor], alpha: float | None
    ) -> dict[str, StoredTensor]:
        ranks = lora.ranks(weights)
        if alpha is None:
            raise ValueError(
                f"{source} holds LoRA adapters of {len(ranks)} matrices in its language model: "
                "merge them with --lora-alpha (32 in the published recipes), or convert with "
                "--no-language-model"
            )
        listed = ", ".join(map(str, sorted(set(ranks.values())))) or "none"
        self.notes.append(f"merged {len(ranks)} LoRA adapters of rank {listed}, alpha {alpha:g}")
        return lora.merged(weights, alpha)

    def _sized(
        self, config: PretrainedConfig, weights: dict[str, StoredTensor]
    ) -> PretrainedConfig:
        """The config with as many words as the table has rows; added tokens are in it."""
        table = next((w for n, w in weights.items() if n.endswith("embed_tokens.weight")), None)
        if table is None:
            return config
        text = config.get_text_config()
        if text.vocab_size != table.shape[0]:
            self.notes.append(
                f"vocab_size of the language model is {table.shape[0]} as in its table, "
                f"{self.folder} says {text.vocab_size}"
            )
            text.vocab_size = table.shape[0]
        config.dtype = table.dtype
        self._complete_tokenizer(table.shape[0])
        return config

    def _complete_tokenizer(self, rows: int) -> None:
        known = self.tokenizer.get_vocab()
        # In the order in which the published training adds them.
        added = [token for token in (PAD_TOKEN, MOL_TOKEN) if token not in known]
        if added:
            self.tokenizer.add_tokens(added, special_tokens=True)
            self.notes.append(f"added to the tokenizer: {', '.join(added)}")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = PAD_TOKEN
        if len(self.tokenizer) > rows:
            raise ValueError(
                f"the tokenizer in {self.folder} has {len(self.tokenizer)} tokens with "
                f"{PAD_TOKEN} and {MOL_TOKEN}, the language model's table {rows} rows"
            )

    @staticmethod
    def _untied(
        source: Path,
        tree: Tree[StoredTensor],
        weights: dict[str, StoredTensor],
        tied: Mapping[str, str],
    ) -> dict[str, StoredTensor]:
        """The weights without the second copy of what the language model ties."""
        weights = dict(weights)
        for copy, original in tied.items():
            if copy in weights and original in weights:
                if not torch.equal(weights[copy].read(), weights[original].read()):
                    raise ValueError(
                        f"{tree.spell(LANGUAGE, copy)} in {source} must equal the tensor that it "
                        "is tied to, it differs"
                    )
                del weights[copy]
            elif copy in weights:
                weights[original] = weights.pop(copy)
        return weights

    def finish(self, out: Path) -> None:
        """Writes what stands beside the weights."""
        folder = out / LANGUAGE
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if (self.folder / GENERATION).is_file():
            shutil.copyfile(self.folder / GENERATION, folder / GENERATION)


def empty_language_model(config: PretrainedConfig) -> tuple[dict[str, Size], dict[str, str]]:
    """Names and shapes of a language model's weights, what is tied once; and its ties.

    The ties lead from the name that is not stored to the one that is.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = dict(model.all_tied_weights_keys)
    state = model.state_dict()
    return {n: x.shape for n, x in state.items() if n not in tied}, tied


def _add_predictor(plan: Plan, options: Options) -> None:
    source = options.predictor
    if source.is_dir() and is_predictor(source):
        predictor = load_part(NextAtomPredictor, source)
        weights, config = open_weights(source), predictor.config
    else:
        found = from_gpt2(source, heads=options.predictor_heads)
        weights, config = found.files[WEIGHTS], found.json[CONFIG]
    if config["vocabulary"] != "published":
        raise ValueError(
            f"--predictor must have the vocabulary 'published', got {config['vocabulary']!r}"
        )
    _place(plan, PREDICTOR, weights, config)


def _finish_model(
    graph: Mapping[str, Any], connector: Mapping[str, Any], text: _LanguageModel, out: Path
) -> None:
    """Writes the checkpoint's config, processor and manifest beside its weights."""
    predictor = load_part(NextAtomPredictor, out / PREDICTOR)
    tokenizer: PreTrainedTokenizerBase = text.tokenizer
    config = MoleculeConfig(
        text_config=text.config,
        graph_config=graph,
        connector_config=connector,
        predictor_config=predictor.config,
        mol_token=MOL_TOKEN,
        mol_token_id=tokenizer.convert_tokens_to_ids(MOL_TOKEN),
    )
    portable(config).save_pretrained(out)
    processor = MoleculeProcessor(
        tokenizer,
        connector,
        predictor,
        mol_token=MOL_TOKEN,
        max_length=getattr(text.config.get_text_config(), "max_position_embeddings", None),
        conformers=ConformerOptions(),
    )
    processor.save_pretrained(out, save_tokenizer=False)
    parts = {}
    for name in (LANGUAGE, GRAPH, PREDICTOR):
        digest = content_hash(read_weights(out / name))
        parts[name] = FrozenPart(digest, str((out / name).resolve()), name)
    Manifest(out.resolve(), parts).write()


def _described(tree: Tree[StoredTensor], graph: _Part, connector: _Part) -> str:
    c, g = connector.config, graph.config
    spatial = g if tree.view != BOTH else g["spatial"]
    encoder = f"Uni-Mol {spatial['layers']} x {spatial['width']}"
    if tree.view == BOTH:
        flat = g["flat"]
        encoder = (
            f"GIN {flat['layers']} x {flat['width']} and {encoder}, "
            f"blended {g['layers']} x {g['width']}"
        )
    crossed = -(-c["layers"] // c["cross_attention_freq"])
    text = f", text of {c['text_vocab_size']} words" if c["text_vocab_size"] else ""
    kind = "EDT-Former" if c["llm_width"] else "encoder of EDT-Former"
    return (
        f"{kind}: {encoder}; {c['layers']} x {c['width']} query transformer, cross-attention in "
        f"{crossed} of {c['layers']} layers, {c['num_queries']} anchors{text}"
    )


def _notes(tree: Tree[StoredTensor], parts: list[_Part]) -> list[str]:
    notes = []
    if tree.copies:
        notes.append(f"tied copies, equal: {', '.join(map(tree.layout.spell, tree.copies))}")
    kept = [tree.layout.spell(n) for n in (STATIC_MASK, POSITION_IDS) if n not in tree.parts[KEPT]]
    if kept:
        notes.append(f"not in the file, and not needed: {', '.join(kept)}")
    if tree.unexpected:
        notes.append(f"left out: {', '.join(tree.unexpected)}")
    for part in parts:
        for what, names in (
            ("initialised anew", part.comparison.missing),
            ("left out", part.comparison.unexpected),
        ):
            if names:
                notes.append(f"{what}: {', '.join(names)}")
    return notes
