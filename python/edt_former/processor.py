"""From texts and molecules to what a `MoleculeLM` reads."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from edt_former.chem import (
    Conformer,
    ConformerOptions,
    ConformerPool,
    Invalid,
    Molecule,
    check_graph_data,
    motif_features,
    read_as_written,
    read_molecule,
    read_selfies,
)
from edt_former.config import MoleculeConfig
from edt_former.connectors import Connector, make_connector
from edt_former.graph import Graph, GraphBatch, read_graph
from edt_former.graph.batch import OGB
from edt_former.language.frozen import load_part, write_json
from edt_former.language.manifest import Manifest
from edt_former.language.prompt import Message, ask, conversation, render
from edt_former.tokens import (
    NextAtomPredictor,
    PatchOptions,
    PublishedPatchOptions,
    cut_molecules,
    pack_patches,
    unpack_patches,
)
from edt_kernels import Patches

if TYPE_CHECKING:
    from typing import Self

IGNORED_LABEL = -100
PROCESSOR_FILE = "processor.json"
TOKENIZER_FILE = "tokenizer_config.json"


class TooLongError(ValueError):
    """A row has more tokens than the language model reads."""


class PatchSets:
    """`Patches` by source ("brics", "entropy"), of one batch of molecules.

    It has `keys` and `[]`, so `dict(sets)` works, but is no `Mapping`: the Trainer would rebuild
    one entry by entry, down into the named tuples inside.
    """

    def __init__(self, sets: Mapping[str, Patches]) -> None:
        self._sets = dict(sets)

    def keys(self) -> Iterator[str]:
        """The sources."""
        return iter(self._sets)

    def __getitem__(self, source: str) -> Patches:
        return self._sets[source]

    def to(self, device: torch.device | str | None, non_blocking: bool = False) -> PatchSets:
        """The same on another device."""
        moved = {
            source: Patches(
                *(None if x is None else x.to(device, non_blocking=non_blocking) for x in patches)
            )
            for source, patches in self._sets.items()
        }
        return PatchSets(moved)


class ModelInputs(BatchFeature):
    """Keyword arguments of `MoleculeLM.forward` and `generate`; `.to(device)` moves all of them."""

    def to(self, device: torch.device | str | None, non_blocking: bool = False) -> ModelInputs:
        """The same on another device."""
        return ModelInputs({k: v.to(device, non_blocking=non_blocking) for k, v in self.items()})


def find_patch_sets(
    molecules: Sequence[Molecule],
    graph: GraphBatch,
    options: PatchOptions,
    predictor: NextAtomPredictor | None,
) -> PatchSets:
    """The patches of molecules by every source that `options` names.

    Args:
        molecules: the B molecules of `graph`.
        graph: on the predictor's device.
        options: a connector's `patch_options`.
        predictor: needed where `options.needs_predictor`.

    Raises:
        ValueError: BRICS patches of a molecule whose SMILES is not known.
    """
    if isinstance(options, PublishedPatchOptions):
        found = options.find(molecules, predictor)
        sets = {source: pack_patches(ids) for source, ids in found.items()}
        return PatchSets(sets).to(graph.offsets.device)
    sets = {
        source: cut_molecules(source, molecules, graph, options, predictor)
        for source in options.sources
    }
    return PatchSets(sets).to(graph.offsets.device)


def pack_with_patches(
    molecules: Sequence[Molecule] | Sequence[Graph],
    connector: Connector,
    predictor: NextAtomPredictor | None,
    *,
    device: torch.device,
    features: str | None = OGB,
    coordinates: Sequence[np.ndarray] | None = None,
) -> tuple[GraphBatch, PatchSets]:
    """What a graph encoder and a connector read of molecules, on the device of the predictor."""
    motifs = motif_features(molecules) if connector.reads_motifs else None
    graph = GraphBatch.pack(molecules, coordinates, features=features, motifs=motifs).to(device)
    return graph, find_patch_sets(molecules, graph, connector.patch_options, predictor)


def as_molecule(source: Any, *, as_written: bool = False) -> Molecule | Invalid:
    """Reads a molecule in any form that the processor takes.

    Args:
        source: SMILES, SELFIES behind "selfies:", RDKit `Mol`, `Molecule`, or graph data in the
            manner of PyG (`x` [n, 9], `edge_index` [2, E], `edge_attr` [E, 3] of OGB's features;
            its `smiles`, where it has one, is read instead).
        as_written: the atoms of a SMILES string stay where they stand in it.

    Example:
        >>> as_molecule("OCC").smiles, as_molecule("C1CC").reason
        ('CCO', 'unclosed ring')
    """
    if isinstance(source, Molecule | Invalid):
        return source
    if isinstance(source, str) and source.lower().startswith("selfies:"):
        return read_selfies(source[len("selfies:") :])
    if all(hasattr(source, name) for name in ("x", "edge_index", "edge_attr")):
        smiles = getattr(source, "smiles", None)
        if not isinstance(smiles, str):
            return _graph_data(source)
        source = smiles
    written = as_written and isinstance(source, str)
    return read_as_written(source) if written else read_molecule(source)


def read_all(
    sources: Sequence[Any],
    *,
    selfies: bool = False,
    options: PatchOptions | None = None,
    features: str | None = OGB,
) -> list[Molecule] | list[Graph]:
    """`as_molecule` of every source, or of a single one, read as the patches of `options` need it.

    With `selfies`, strings are SELFIES. Without a scheme of `features` they are graphs, see
    `edt_former.graph.read_graph`.

    Raises:
        ValueError: one cannot be read; it names the index and the reason.
    """
    if isinstance(sources, str | Molecule) or hasattr(sources, "GetNumAtoms"):
        sources = [sources]
    if features is None:
        return [_graph(index, source) for index, source in enumerate(sources)]
    molecules = []
    for index, source in enumerate(sources):
        plain = selfies and isinstance(source, str)
        as_written = isinstance(options, PublishedPatchOptions)
        molecule = read_selfies(source) if plain else as_molecule(source, as_written=as_written)
        if isinstance(molecule, Invalid):
            raise ValueError(f"molecule {index} ({molecule.source!r}): {molecule.reason}")
        molecules.append(molecule)
    return molecules


def as_strings(name: str, given: str | Sequence[str]) -> list[str]:
    """One string or several, as a list.

    Raises:
        TypeError: one is no string; it names the index.
    """
    given = as_list(given)
    rows = [given] if isinstance(given, str) else list(given)
    for index, row in enumerate(rows):
        if not isinstance(row, str):
            raise TypeError(f"{name}[{index}] must be a string, got {type(row).__name__}")
    return rows


def as_list(given: Any) -> Any:
    """Arrays and columns of tables as lists; anything else as it is."""
    return given.tolist() if hasattr(given, "tolist") else given


def places(
    molecules: Sequence[Molecule], conformers: Sequence[Conformer | Invalid]
) -> list[np.ndarray]:
    """The coordinates of every molecule.

    Raises:
        ValueError: a conformer could not be made; it names the index, the molecule and the reason.
    """
    for index, (molecule, found) in enumerate(zip(molecules, conformers, strict=True)):
        if isinstance(found, Invalid):
            raise ValueError(f"molecule {index} ({molecule.smiles!r}): {found.reason}")
    return [found.coordinates for found in conformers]


def _graph(index: int, source: Any) -> Graph:
    try:
        return read_graph(source)
    except (TypeError, ValueError) as error:
        raise ValueError(f"graph {index}: {error}") from error


def _graph_data(data: Any) -> Molecule | Invalid:
    """A molecule in the order of its data; its SMILES stays empty."""
    x, index, bonds = (np.asarray(a) for a in (data.x, data.edge_index, data.edge_attr))
    several = getattr(data, "ptr", None)
    if several is not None and len(several) != 2:
        reason = f"graph data must hold one molecule, got a batch of {len(several) - 1}"
        return Invalid(repr(data), reason)
    try:
        check_graph_data(x, index, bonds)
    except ValueError as error:
        return Invalid(repr(data), str(error))
    order = np.lexsort(index)
    return Molecule(
        smiles="",
        atom_features=x.astype(np.int64),
        bond_index=index[:, order].astype(np.int64),
        bond_features=bonds[order].astype(np.int64),
        order=np.arange(len(x)),
    )


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, of the class that its files name.

    `AutoTokenizer` alone can prefer the usual class of the language model beside it, which splits
    words in its own way whatever `tokenizer.json` says.
    """
    config = json.loads((Path(folder) / TOKENIZER_FILE).read_text())
    if config.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


class MoleculeProcessor:
    """Texts with `<mol>` in them and molecules become the inputs of a `MoleculeLM`.

    Each `<mol>` is expanded to as many placeholders as its molecule has tokens, so every length is
    known before the model runs. Patches are found on the CPU for all new molecules of a call at
    once, and remembered by canonical SMILES; so are motifs, where the connector reads them, and
    conformers, where a 3D encoder does.

    Args:
        tokenizer: the language model's; `mol_token` is added to it as a special token if missing.
        connector: the model's connector, or its config: what is kept is how it counts tokens.
        predictor: the next-atom predictor, copied; needed for patches from entropies.
        mol_token: the text that marks one molecule.
        max_length: longest row in tokens, molecules included; None for no limit.
        cache_size: molecules whose patches, motifs and conformers are remembered, the least
            recently used go first.
        features: the scheme of atom and bond features that the graph encoder reads; None for
            graphs that are no molecules, in the place of molecules everywhere.
        conformers: how conformers are made, or a mapping of `ConformerOptions`; None where the
            graph encoder reads no coordinates.

    Raises:
        ValueError: the connector reads entropy patches and there is no predictor; or it reads
            patches or motifs, and graphs are no molecules.

    Example:
        >>> import edt_former
        >>> processor = edt_former.load("qformer_32").processor
        >>> inputs = processor("<mol> question: How many rings does it have? answer:", "CCO")
        >>> int((inputs["input_ids"] == processor.mol_token_id).sum())
        32
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        connector: Connector | Mapping[str, Any],
        predictor: NextAtomPredictor | None = None,
        *,
        mol_token: str = "<mol>",
        max_length: int | None = None,
        cache_size: int = 65_536,
        features: str | None = OGB,
        conformers: ConformerOptions | Mapping[str, Any] | None = None,
    ) -> None:
        config = connector.config if isinstance(connector, Connector) else connector
        with torch.device("meta"):
            self._connector = make_connector(config)
        self.patch_options = self._connector.patch_options
        if self.patch_options.needs_predictor and predictor is None:
            raise ValueError("predictor is needed for patches from entropies, got None")
        chemical = bool(self.patch_options.sources) or self._connector.reads_motifs
        if features is None and chemical:
            raise ValueError(
                "the connector must read neither patches nor motifs of graphs that are no "
                f"molecules, {config['name']!r} does"
            )
        if mol_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([mol_token], special_tokens=True)
        self.tokenizer = tokenizer
        self.predictor = copy.deepcopy(predictor)
        if self.predictor is not None:
            self.predictor.float().cpu().eval().requires_grad_(False)
        self.mol_token = mol_token
        self.mol_token_id = tokenizer.convert_tokens_to_ids(mol_token)
        self.max_length = max_length
        self.cache_size = cache_size
        self.features = features
        self._cache: OrderedDict[str, dict[str, list[int]]] = OrderedDict()
        if isinstance(conformers, Mapping):
            conformers = ConformerOptions(**conformers)
        self.conformers = conformers
        self._pool = None if conformers is None else ConformerPool(conformers)
        self._conformers: OrderedDict[str, Conformer | Invalid] = OrderedDict()
        self._motifs: OrderedDict[str, np.ndarray] = OrderedDict()

    def __call__(
        self,
        text: str | Sequence[str],
        molecules: Any = None,
        *,
        answers: str | Sequence[str] | None = None,
        selfies: bool = False,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
    ) -> ModelInputs:
        """Inputs of B rows.

        Args:
            text: one text per row, or a single one; `<mol>` marks a molecule.
            molecules: the molecules in the order of their marks, see `as_molecule`: one, a flat
                list, array or column over all rows, or a list per row; None where there are none.
            answers: what the model shall say, one per row: appended with the end-of-sequence token
                (and a space, unless white space is there), and the only tokens with a label.
            selfies: strings are SELFIES.
            padding_side: "left" (default, for generation) or "right" (default with answers).
            add_special_tokens: those that the tokenizer puts around a text, such as `<bos>`; a
                chat template has them already.

        Returns:
            `input_ids` and `attention_mask` int64 [B, S], `graph` (`GraphBatch` of all molecules),
            `patches` (`PatchSets`), `molecule_counts` int64 [B], and with answers `labels` [B, S].

        Raises:
            TypeError: a text or an answer is no string.
            ValueError: a row has more or fewer marks than molecules; a molecule cannot be read, or
                has no conformer where one is needed; a row is longer than `max_length`. It names
                the row or molecule and the numbers.
        """
        texts = as_strings("text", text)
        prompts = [self._ids(row, add_special_tokens) for row in texts]
        side = padding_side or ("left" if answers is None else "right")
        if answers is None:
            return self._inputs(prompts, None, molecules, side=side, selfies=selfies)
        replies = self._replies(texts, answers)
        learned = [
            [False] * len(prompt) + [True] * len(reply)
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        full = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
        return self._inputs(full, learned, molecules, side=side, selfies=selfies)

    def conversations(
        self,
        messages: Sequence[Sequence[Message]],
        molecules: Any = None,
        *,
        padding_side: str = "right",
        truncate: bool = False,
    ) -> ModelInputs:
        """Inputs of B conversations, with labels for what the assistant says in each.

        Args:
            messages: per row, see `edt_former.language.prompt.conversation`.
            molecules: a list per row; None where there are none.
            padding_side: "right" or "left".
            truncate: a row that is longer than `max_length` loses its end, as long as that is text
                and something is left to learn.

        Raises:
            TooLongError: a row is too long, or has nothing to learn.
            ValueError: as `__call__`; the tokenizer cannot tell where its tokens are in a text.

        Example:
            >>> import edt_former
            >>> processor = edt_former.load("qformer_32").processor
            >>> asked = {"role": "user", "content": "How many rings does it have?"}
            >>> said = {"role": "assistant", "content": "rings: 1"}
            >>> inputs = processor.conversations([[asked, said]], [["C1CC1"]])
            >>> int((inputs["labels"] >= 0).sum())
            3
        """
        if not self.tokenizer.is_fast:
            raise ValueError(
                "conversations need a fast tokenizer, one that knows where its tokens are in the "
                f"text; {type(self.tokenizer).__name__} is none"
            )
        given = [[] for _ in messages] if molecules is None else list(molecules)
        pairs = zip(messages, given, strict=True)
        rows = [self._learned_ids(turns, len(inside)) for turns, inside in pairs]
        ids, learned = [row[0] for row in rows], [row[1] for row in rows]
        return self._inputs(ids, learned, given, side=padding_side, truncate=truncate)

    def token_counts(self, molecules: Sequence[Any]) -> list[int]:
        """How many tokens each molecule takes in a prompt."""
        read = read_all(molecules, options=self.patch_options, features=self.features)
        return self._patches(read)[1]

    def set_budget(self, **budget: int | None) -> None:
        """As of the connector; see `MoleculeLM.set_budget`, which calls it."""
        self._connector.set_budget(**budget)

    def coordinates(self, molecules: Sequence[Molecule]) -> list[np.ndarray] | None:
        """Coordinates [n, 3] of every molecule; None where the graph encoder reads none.

        Raises:
            ValueError: a conformer could not be made; it names the index, the molecule and the
                reason.
        """
        return None if self._pool is None else places(molecules, self.find_conformers(molecules))

    def motifs(self, molecules: Sequence[Molecule]) -> list[np.ndarray] | None:
        """What the motifs of every molecule are made of; None where the connector reads none."""
        if not self._connector.reads_motifs:
            return None
        keys = [molecule.smiles or index for index, molecule in enumerate(molecules)]
        found = {key: self._motifs.get(key) for key in keys}
        new = {k: m for k, m in zip(keys, molecules, strict=True) if found[k] is None}
        found |= zip(new, motif_features(list(new.values())), strict=True)
        self._remember(self._motifs, found)
        return [found[key] for key in keys]

    def find_conformers(
        self, molecules: Sequence[Molecule], pool: ConformerPool | None = None
    ) -> list[Conformer | Invalid]:
        """A conformer of every molecule, remembered or made, or the reason why there is none.

        Args:
            molecules: any.
            pool: makes those that are new; None takes the processor's own, of one process.

        Raises:
            ValueError: the graph encoder reads no coordinates.
        """
        if self._pool is None:
            raise ValueError("conformers are made for a graph encoder that reads coordinates only")
        found = {m.smiles: self._conformers.get(m.smiles) for m in molecules}
        new = {m.smiles: m for m in molecules if found[m.smiles] is None}
        found |= zip(new, (pool or self._pool).make(new.values()), strict=True)
        self._remember(self._conformers, found)
        return [found[m.smiles] for m in molecules]

    def keep_conformers(
        self, molecules: Sequence[Molecule], conformers: Sequence[Conformer | Invalid]
    ) -> None:
        """Conformers made elsewhere: those of another program, or of many processes.

        They are remembered by the molecules' canonical SMILES, as if the processor had made them.

        Args:
            molecules: each with its SMILES.
            conformers: one per molecule, its atoms in the molecule's order; or the reason why
                there is none.

        Raises:
            ValueError: they are not as many as molecules; one has not its molecule's atoms.
        """
        if len(conformers) != len(molecules):
            raise ValueError(
                f"conformers must be one per molecule, {len(molecules)}, got {len(conformers)}"
            )
        for index, (molecule, given) in enumerate(zip(molecules, conformers, strict=True)):
            shape = (molecule.num_atoms, 3)
            if not isinstance(given, Invalid) and given.coordinates.shape != shape:
                raise ValueError(
                    f"the conformer of molecule {index} ({molecule.smiles!r}) must have shape "
                    f"{shape}, got {given.coordinates.shape}"
                )
        found = {m.smiles: c for m, c in zip(molecules, conformers, strict=True)}
        self._remember(self._conformers, found)

    def keep_patches(
        self, molecules: Sequence[Molecule], patches: Sequence[Mapping[str, Sequence[int]]]
    ) -> None:
        """Patches found elsewhere, remembered as if the processor had found them.

        Args:
            molecules: each with its SMILES.
            patches: per molecule and source, the patch id of every atom.

        Raises:
            ValueError: they are not as many as molecules; one lacks a source that the connector
                reads, or has not its molecule's atoms.
        """
        if len(patches) != len(molecules):
            raise ValueError(
                f"patches must be one mapping per molecule, {len(molecules)}, got {len(patches)}"
            )
        found = {}
        for index, (molecule, given) in enumerate(zip(molecules, patches, strict=True)):
            for source in self.patch_options.sources:
                if source not in given or len(given[source]) != molecule.num_atoms:
                    got = f"{len(given[source])}" if source in given else "none"
                    raise ValueError(
                        f"the patches of molecule {index} ({molecule.smiles!r}) must have "
                        f"{molecule.num_atoms} ids by {source!r}, got {got}"
                    )
            found[molecule.smiles] = {s: list(given[s]) for s in self.patch_options.sources}
        self._remember(self._cache, found)

    def prompt(self, question: str, *, molecules: int = 1) -> str:
        """The text that asks `question` about that many molecules; see `language.prompt.ask`."""
        return ask(self.tokenizer, question, molecules=molecules, mol_token=self.mol_token)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        molecules: Any = None,
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        **options: Any,
    ) -> ModelInputs | str:
        """Inputs of one conversation, or its text when not `tokenize`.

        Args:
            messages: see `language.prompt.render`; molecules may be items or `<mol>` in the text.
            molecules: those of the marks; None where all are items.
            add_generation_prompt: end where the model's answer begins.
            tokenize: False returns the text.
            options: of `__call__`.
        """
        text, items = render(
            self.tokenizer,
            messages,
            mol_token=self.mol_token,
            add_generation_prompt=add_generation_prompt,
        )
        if not tokenize:
            return text
        options.setdefault("add_special_tokens", self.tokenizer.chat_template is None)
        return self(text, items if molecules is None else molecules, **options)

    def decode(self, token_ids: Tensor, *, skip_special_tokens: bool = True) -> list[str]:
        """Texts of generated ids [B, T], without white space around them."""
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=skip_special_tokens)
        return [text.strip() for text in texts]

    def save_pretrained(self, folder: Path | str, *, save_tokenizer: bool = True) -> None:
        """Writes `processor.json`, and the tokenizer's files unless they are elsewhere.

        The predictor is not written: it is one of the frozen parts that the model's manifest names.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if save_tokenizer:
            self.tokenizer.save_pretrained(folder)
        content = {
            "processor_class": type(self).__name__,
            "mol_token": self.mol_token,
            "max_length": self.max_length,
            "features": self.features,
            "connector_config": self._connector.config,
            "predictor": self.predictor is not None,
            "conformers": None if self.conformers is None else asdict(self.conformers),
        }
        write_json(folder / PROCESSOR_FILE, content)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        tokenizer: PreTrainedTokenizerBase | Path | str | None = None,
        predictor: NextAtomPredictor | Path | str | None = None,
        **_: Any,
    ) -> Self:
        """Reads what `save_pretrained` wrote.

        Args:
            folder: holds `processor.json`.
            tokenizer: or its folder; None looks into `folder`, then beside the language model that
                the manifest names.
            predictor: or its folder; None takes the manifest's.
        """
        folder = Path(folder)
        file = folder / PROCESSOR_FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            config, needs_predictor = content["connector_config"], content["predictor"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: {error!r}") from error
        if tokenizer is None:
            here = (folder / TOKENIZER_FILE).exists()
            tokenizer = folder if here else Manifest.read(folder).folder("language_model")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = load_tokenizer(tokenizer)
        if predictor is None and needs_predictor:
            predictor = Manifest.read(folder).folder("predictor")
        if isinstance(predictor, Path | str):
            predictor = load_part(NextAtomPredictor, predictor)
        names = ("mol_token", "max_length", "features", "conformers")
        options = {name: content[name] for name in names if name in content}
        return cls(tokenizer, config, predictor, **options)

    @property
    def _pad_id(self) -> int:
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return token_id
        return 0

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt: an end-of-sequence token that the tokenizer adds is left out."""
        ids = self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids
        eos = self.tokenizer.eos_token
        if eos is not None and ids[-1:] == [self.tokenizer.eos_token_id] and not text.endswith(eos):
            return ids[:-1]
        return ids

    def _replies(
        self, texts: Sequence[str], answers: str | Sequence[str] | None
    ) -> list[list[int]]:
        if answers is None:
            return [[] for _ in texts]
        answers = as_strings("answers", answers)
        if len(answers) != len(texts):
            raise ValueError(f"answers must be one per text, {len(texts)}, got {len(answers)}")
        eos = self.tokenizer.eos_token_id
        replies = []
        for text, answer in zip(texts, answers, strict=True):
            joined = text[-1:].isspace() or answer[:1].isspace()
            reply = answer if joined else f" {answer}"
            ids = self.tokenizer(reply, add_special_tokens=False).input_ids
            replies.append(ids if eos is None else [*ids, eos])
        return replies

    def _learned_ids(
        self, messages: Sequence[Message], molecules: int
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them the model is to say."""
        text, spans = conversation(
            self.tokenizer, messages, molecules=molecules, mol_token=self.mol_token
        )
        plain = self.tokenizer.chat_template is None
        read = self.tokenizer(text, add_special_tokens=plain, return_offsets_mapping=True)
        ids, places = read["input_ids"], read["offset_mapping"]
        if plain and text.endswith(str(self.tokenizer.eos_token)):
            # The text has its own; what the tokenizer adds would be a second one.
            while len(ids) > 1 and ids[-2:] == [self.tokenizer.eos_token_id] * 2:
                ids, places = ids[:-1], places[:-1]
        learned = [
            any(start < stop and first < stop and start < last for first, last in spans)
            for start, stop in places
        ]
        return ids, learned

    def _inputs(
        self,
        rows: list[list[int]],
        learned: list[list[bool]] | None,
        molecules: Any,
        *,
        side: str,
        selfies: bool = False,
        truncate: bool = False,
    ) -> ModelInputs:
        """Inputs of rows of token ids, with labels where there is something to learn."""
        if side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {side!r}")
        marks = [ids.count(self.mol_token_id) for ids in rows]
        sources = _by_mark(molecules, marks, self.mol_token)
        options = self.patch_options
        read = read_all(sources, selfies=selfies, options=options, features=self.features)
        graph = self._pack(read)
        patches, sizes = self._patches(read)
        repeats = _repeats(rows, self.mol_token_id, sizes)
        full = _repeated(rows, repeats)
        flags = None if learned is None else _repeated(learned, repeats)
        if truncate and self.max_length is not None:
            full = [_cut(ids, self.mol_token_id, self.max_length) for ids in full]
            flags = [own[: len(ids)] for own, ids in zip(flags, full, strict=True)]
        self._check_lengths(full, flags if truncate else None)
        data = {
            "input_ids": _padded(full, self._pad_id, side),
            "attention_mask": _padded([[1] * len(row) for row in full], 0, side),
            "graph": graph,
            "patches": patches,
            "molecule_counts": torch.tensor(marks, dtype=torch.int64),
        }
        if flags is not None:
            labels = [
                [token if own else IGNORED_LABEL for token, own in zip(ids, owns, strict=True)]
                for ids, owns in zip(full, flags, strict=True)
            ]
            data["labels"] = _padded(labels, IGNORED_LABEL, side)
        return ModelInputs(data)

    def _check_lengths(self, rows: list[list[int]], learned: list[list[bool]] | None) -> None:
        for index, row in enumerate(rows):
            if self.max_length is not None and len(row) > self.max_length:
                raise TooLongError(
                    f"row {index} is {len(row)} tokens long ({row.count(self.mol_token_id)} of "
                    f"them molecule tokens), the language model reads at most {self.max_length}"
                )
            if learned is not None and not any(learned[index]):
                raise TooLongError(
                    f"row {index} has nothing to learn in its first {len(row)} tokens "
                    f"({row.count(self.mol_token_id)} of them molecule tokens)"
                )

    def _pack(self, molecules: list[Molecule]) -> GraphBatch:
        if not molecules and self.features is None:
            return GraphBatch.empty(1, 1)
        positions, motifs = self.coordinates(molecules), self.motifs(molecules)
        return GraphBatch.pack(molecules, positions, features=self.features, motifs=motifs)

    def _patches(self, molecules: list[Molecule]) -> tuple[PatchSets, list[int]]:
        """Patches of the molecules, and how many tokens each gives."""
        if not self.patch_options.sources:
            return PatchSets({}), self._connector.token_counts({}, len(molecules))
        found = self._look_up(molecules)
        ids = {s: [cut[s] for cut in found] for s in self.patch_options.sources}
        counts = {s: [len(set(cut)) for cut in cuts] for s, cuts in ids.items()}
        sets = PatchSets({s: pack_patches(cuts) for s, cuts in ids.items()})
        return sets, self._connector.token_counts(counts, len(molecules))

    def _look_up(self, molecules: list[Molecule]) -> list[dict[str, list[int]]]:
        """The patch ids of every molecule by source, from the cache or found in one batch."""
        new = {m.smiles or index: m for index, m in enumerate(molecules)}
        known = {key: ids for key in new if (ids := self._cache.get(key)) is not None}
        new = {key: molecule for key, molecule in new.items() if key not in known}
        if new:
            cuts = self._find(list(new.values()))
            for key, *ids in zip(new, *cuts, strict=True):
                known[key] = dict(zip(self.patch_options.sources, ids, strict=True))
        self._remember(self._cache, known)
        return [known[m.smiles or index] for index, m in enumerate(molecules)]

    def _find(self, molecules: list[Molecule]) -> list[list[list[int]]]:
        """By source and molecule, the patch ids."""
        options = self.patch_options
        if isinstance(options, PublishedPatchOptions):
            return list(options.find(molecules, self.predictor).values())
        graph = GraphBatch.pack(molecules)
        sets = find_patch_sets(molecules, graph, options, self.predictor)
        return [unpack_patches(sets[s], graph.offsets) for s in options.sources]

    def _remember(self, cache: OrderedDict[str, Any], found: Mapping[str | int, Any]) -> None:
        """Takes in what was found, as the most recent, in steps that other threads may cross."""
        for key, value in found.items():
            if isinstance(key, str) and key:
                cache.pop(key, None)
                cache[key] = value
        while len(cache) > self.cache_size:
            with suppress(KeyError):
                cache.popitem(last=False)


def _by_mark(molecules: Any, marks: list[int], mol_token: str) -> list[Any]:
    """All molecules in the order of their marks; `molecules` is one, flat, or a list per row."""
    molecules = as_list(molecules)
    if not isinstance(molecules, list | tuple):
        molecules = [] if molecules is None else [molecules]
    nested = [isinstance(item, list | tuple) for item in molecules]
    if any(nested):
        if not all(nested) or len(molecules) != len(marks):
            raise ValueError(
                f"molecules must be a list per text, {len(marks)} in all, or flat; "
                f"got {len(molecules)} items, {sum(nested)} of them lists"
            )
        for row, (count, given) in enumerate(zip(marks, molecules, strict=True)):
            _check_marks(f"row {row} of text", count, len(given), mol_token)
        return [molecule for given in molecules for molecule in given]
    left = len(molecules)
    for row, count in enumerate(marks):
        if count > left:
            _check_marks(f"row {row} of text", count, left, mol_token)
        left -= count
    where = "row 0 of text" if len(marks) == 1 else f"text ({len(marks)} rows)"
    _check_marks(where, sum(marks), len(molecules), mol_token)
    return list(molecules)


def _check_marks(where: str, marks: int, molecules: int, mol_token: str) -> None:
    if marks != molecules:
        raise ValueError(
            f"{where} must hold {mol_token} once per molecule, got {marks} {mol_token} and "
            f"{molecules} molecules"
        )


def _repeats(rows: list[list[int]], mol_token_id: int, sizes: list[int]) -> list[list[int]]:
    """How often every token stands: the n-th mark of all as often as `sizes[n]` says."""
    size = iter(sizes)
    return [[next(size) if token == mol_token_id else 1 for token in ids] for ids in rows]


def _repeated(rows: list[list[Any]], repeats: list[list[int]]) -> list[list[Any]]:
    return [
        [item for item, count in zip(row, counts, strict=True) for _ in range(count)]
        for row, counts in zip(rows, repeats, strict=True)
    ]


def _cut(ids: list[int], mol_token_id: int, length: int) -> list[int]:
    """The first `length` tokens, unless a molecule would lose some: then all."""
    return ids if mol_token_id in ids[length:] else ids[:length]


def _padded(rows: list[list[int]], value: int, side: str) -> Tensor:
    length = max(map(len, rows), default=0)
    fill = [[value] * (length - len(row)) for row in rows]
    pairs = zip(fill, rows, strict=True)
    padded = [f + row if side == "left" else row + f for f, row in pairs]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), length)


AutoProcessor.register(MoleculeConfig, MoleculeProcessor)
