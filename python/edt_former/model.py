"""A frozen language model that reads molecules."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import edt_kernels
from edt_former.checkpoint import FROZEN_PARTS, load_checkpoint, save_checkpoint, trained_names
from edt_former.chem import ConformerOptions, Molecule, make_conformers
from edt_former.config import MoleculeConfig
from edt_former.connectors import (
    Connector,
    MoleculeAdapters,
    MoleculeTokens,
    make_connector,
)
from edt_former.connectors.adapter_cache import AdapterCache, weights_version
from edt_former.graph import GraphBatch, GraphEncoder, make_encoder
from edt_former.language.adapters import add_lora, base_of, is_adapter
from edt_former.language.frozen import input_scale
from edt_former.language.instance_adapters import InstanceAdapters
from edt_former.language.manifest import FrozenPart
from edt_former.processor import (
    IGNORED_LABEL,
    MoleculeProcessor,
    PatchSets,
    as_list,
    as_strings,
    pack_with_patches,
    places,
    read_all,
)
from edt_former.tokens import NextAtomPredictor, cut_on_device, pack_patches

if TYPE_CHECKING:
    from typing import Self

ROWS_OF_THE_MEAN = 1024


class MoleculeLM(PreTrainedModel, GenerationMixin):
    """A stock causal language model whose prompts hold molecules (arXiv:2602.02742).

    The graph encoder reads the atoms, the connector makes tokens of them, and these take the place
    of the `<mol>` positions in the prompt. The language model is reached through
    `get_input_embeddings()` and `inputs_embeds` only, so any architecture will do. Graph encoder,
    predictor and language model are frozen and in eval mode whatever `train` says; what trains is
    the connector and, as `config.train_embeddings` says, rows for added tokens or the whole input
    table (with it the head, where the two are tied).

    A connector that makes adapters instead of tokens (MoRA) leaves nothing at `<mol>`: every row of
    the batch computes with the sum of its molecules' adapters, in prompt and generation, and a row
    without a molecule with the bits of the plain language model. Outside of training, adapters are
    remembered by molecule as long as no weight changes; they are never saved.

    A molecule token stands on the scale of what the embedding module *returns* for text: where
    that module scales its table (Gemma, by sqrt(width)), the token is not scaled again, and where
    the language model scales its inputs later (Granite), text and molecules are scaled alike.

    Args:
        config: the parts are built from it, with random weights.
        language_model: used instead of building one, as are the next three.
        graph_encoder: see `edt_former.graph.make_encoder`.
        connector: see `edt_former.connectors.make_connector`.
        predictor: needed by `embed_molecules` where patches come from entropies.

    Example:
        >>> import edt_former
        >>> model = edt_former.load("qformer_32")
        >>> model.embed_molecules(["CCO", "c1ccccc1"]).offsets
        tensor([ 0, 32, 64])
    """

    config_class = MoleculeConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: MoleculeConfig,
        *,
        language_model: PreTrainedModel | None = None,
        graph_encoder: GraphEncoder | None = None,
        connector: Connector | None = None,
        predictor: NextAtomPredictor | None = None,
    ) -> None:
        super().__init__(config)
        if graph_encoder is None:
            graph_encoder = make_encoder(config.graph_config)
        if connector is None:
            connector = make_connector(config.connector_config)
        if predictor is None and config.predictor_config is not None:
            predictor = NextAtomPredictor(config.predictor_config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        if config.lora is not None:
            language_model = add_lora(language_model, config.lora)
        self.graph_encoder = graph_encoder
        self.predictor = predictor
        self.connector = connector
        self.language_model = language_model
        config.text_config = language_model.config
        self.processor: MoleculeProcessor | None = None
        self._input_scale: float | None = None
        # Processes that share a sharded model must gather the same layers, molecules or not.
        self.always_encodes = False
        self.frozen_parts: dict[str, FrozenPart] = {}
        _check_widths(graph_encoder, connector, self.get_input_embeddings())
        if graph_encoder.features != config.features:
            raise ValueError(
                f"config.features must be what the graph encoder reads, "
                f"{graph_encoder.features!r}, got {config.features!r}"
            )
        self._instance_adapters: InstanceAdapters | None = None
        self._adapter_cache = AdapterCache()
        if connector.adapts:
            options = connector.options
            self._instance_adapters = InstanceAdapters(
                language_model, options.widths, options.adapted, options.names
            )
        self._make_new_rows()
        self._freeze()
        self.generation_config = language_model.generation_config
        self.post_init()
        self._ignore_on_save()

    @classmethod
    def from_parts(
        cls,
        language_model: PreTrainedModel,
        graph_encoder: GraphEncoder,
        connector: Connector,
        predictor: NextAtomPredictor | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase,
        mol_token: str = "<mol>",
        new_tokens: Sequence[str] = (),
        train_embeddings: str = "new_rows",
        conformers: ConformerOptions | None = None,
    ) -> Self:
        """A model of parts that exist; its `processor` is made from `tokenizer`.

        Args:
            language_model: any causal LM; its table is never resized.
            graph_encoder: frozen here.
            connector: its `llm_width` is the language model's.
            predictor: needed where patches come from entropies.
            tokenizer: `mol_token` and `new_tokens` are added as special tokens where missing.
            mol_token: marks one molecule.
            new_tokens: further tokens whose embeddings are trained rows.
            train_embeddings: see `MoleculeConfig`.
            conformers: how the processor makes them where the graph encoder reads coordinates.
        """
        missing = [t for t in (mol_token, *new_tokens) if t not in tokenizer.get_vocab()]
        tokenizer.add_tokens(missing, special_tokens=True)
        config = MoleculeConfig(
            text_config=language_model.config,
            graph_config=graph_encoder.config,
            connector_config=connector.config,
            predictor_config=None if predictor is None else predictor.config,
            mol_token=mol_token,
            mol_token_id=tokenizer.convert_tokens_to_ids(mol_token),
            new_token_ids=tokenizer.convert_tokens_to_ids(list(new_tokens)),
            train_embeddings=train_embeddings,
            features=graph_encoder.features,
        )
        model = cls(
            config,
            language_model=language_model,
            graph_encoder=graph_encoder,
            connector=connector,
            predictor=predictor,
        )
        spatial = graph_encoder.needs_coordinates
        model.processor = MoleculeProcessor(
            tokenizer,
            connector,
            predictor,
            mol_token=mol_token,
            max_length=model.max_positions,
            features=config.features,
            conformers=conformers or ConformerOptions() if spatial else None,
        )
        return model

    @property
    def max_positions(self) -> int | None:
        """The most positions that the language model reads; None where it sets no limit."""
        return getattr(self.config.text_config, "max_position_embeddings", None)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_output_embeddings()

    def init_weights(self) -> None:
        """Nothing: every part has initialised itself, or was loaded."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        graph: GraphBatch | None = None,
        patches: PatchSets | Mapping[str, edt_kernels.Patches] | None = None,
        molecule_counts: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of B rows, and the loss where there are labels.

        A row's logits do not depend on the other rows, up to rounding, on whichever side it is
        padded.

        Args:
            input_ids: int64 [B, S], `mol_token_id` at every molecule token's place.
            attention_mask: [B, S], 0 at padding.
            graph: the molecules of all rows, row by row; None where there are none.
            patches: by source, of the same molecules.
            molecule_counts: int64 [B], how many of the molecules belong to each row.
            labels: int64 [B, S], -100 where nothing is learned; molecule tokens and new tokens
                are never learned.
            position_ids: [B, S]; None counts the tokens that are no padding.
            inputs_embeds: [B, S, E] instead of all the above but the mask.
            kwargs: of the language model (`cache`, `use_cache`, `logits_to_keep`, ...).

        Raises:
            ValueError: a row's placeholders are not as many as its molecule tokens; the prompt is
                longer than the language model reads.
        """
        adapters = None
        if inputs_embeds is None:
            inputs_embeds = self.embed_prompt(input_ids, graph, patches, molecule_counts)
            adapters = self._row_adapters(len(input_ids), graph, molecule_counts)
            if labels is not None:
                labels = self._without_inputs_only(labels)
        self._check_length(inputs_embeds.shape[1])
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = _positions(attention_mask)[:, -inputs_embeds.shape[1] :]
        if position_ids is not None and _accepts(self.language_model, "position_ids"):
            kwargs["position_ids"] = position_ids
        if labels is not None:
            kwargs["labels"] = labels
        with self.using(adapters):
            return self.language_model(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
            )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        graph: GraphBatch | None = None,
        patches: PatchSets | Mapping[str, edt_kernels.Patches] | None = None,
        molecule_counts: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """New tokens only, [B * num_return_sequences, T], by the language model's own `generate`.

        Molecules are encoded once, before beams or samples multiply the rows; a beam keeps the
        adapters of its row. Rows must be padded on the left.

        Args:
            input_ids: with the next four, see `forward`.
            attention_mask: [B, S].
            graph: of all rows.
            patches: by source.
            molecule_counts: int64 [B].
            kwargs: of `transformers.GenerationMixin.generate`.

        Raises:
            ValueError: as `forward`; a row is padded on the right; prompt and new tokens, as many
                as the options ask for, are longer than the language model reads.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        padded = (attention_mask[:, -1] == 0).nonzero().flatten().tolist()
        if padded:
            raise ValueError(f"generate needs padding on the left, row {padded[0]} ends in padding")
        self._check_length(input_ids.shape[1], self._new_tokens(input_ids.shape[1], kwargs))
        inputs_embeds = self.embed_prompt(input_ids, graph, patches, molecule_counts)
        config = kwargs.get("generation_config") or self.language_model.generation_config
        muted = kwargs.pop("suppress_tokens", config.suppress_tokens)
        muted = {*(muted or ()), *self._never_generated()}
        with self.using(self._row_adapters(len(input_ids), graph, molecule_counts)):
            return self.language_model.generate(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                suppress_tokens=sorted(muted) or None,
                **kwargs,
            )

    def embed_prompt(
        self,
        input_ids: Tensor,
        graph: GraphBatch | None = None,
        patches: PatchSets | Mapping[str, edt_kernels.Patches] | None = None,
        molecule_counts: Tensor | None = None,
    ) -> Tensor:
        """What the language model reads as `inputs_embeds` [B, S, E]; see `forward`."""
        device = input_ids.device
        if graph is None:
            graph, patches, molecule_counts = GraphBatch.pack([]), None, None
        if molecule_counts is None:
            molecule_counts = torch.zeros(len(input_ids), dtype=torch.int64)
        slots = input_ids == self.config.mol_token_id
        new_ids = self._new_ids(input_ids)
        inputs_only = slots if new_ids is None else slots | (new_ids >= 0)
        embeds = self.get_input_embeddings()(input_ids.masked_fill(inputs_only, 0))

        rows = edt_kernels.offsets_from_lengths(molecule_counts.to(device))
        if int(rows[-1]) != graph.num_molecules:
            raise ValueError(
                f"molecule_counts must sum to the molecules of graph, {graph.num_molecules}, "
                f"got {int(rows[-1])}"
            )
        if not self.connector.adapts and self._encodes(graph):
            tokens = self.encode(graph, patches)
        else:
            tokens = MoleculeTokens(
                embeds.new_zeros(0, embeds.shape[-1]), rows.new_zeros(int(rows[-1]) + 1)
            )
        token_offsets = tokens.offsets[rows]
        _check_counts(slots, token_offsets)
        prompt = edt_kernels.splice(
            embeds,
            tokens.values.to(embeds),
            token_offsets,
            slots,
            new_rows=None if new_ids is None else self.new_rows.to(embeds),
            new_ids=new_ids,
        )
        if self._input_scale is None:
            self._input_scale = input_scale(self.language_model)
        return prompt if self._input_scale == 1 else prompt * self._input_scale

    @contextmanager
    def using(self, adapters: MoleculeAdapters | None) -> Iterator[None]:
        """The language model computes with these adapters, one per row; None: as it is.

        `forward` and `generate` do this themselves. It is for calls of `language_model` alone.

        Raises:
            TypeError: adapters, and a connector that makes none.

        Example:
            >>> import edt_former
            >>> model = edt_former.load("mora")
            >>> ids = torch.tensor([[1, 5, 6]])
            >>> with model.using(model.adapt_molecules(["CCO"])):
            ...     logits = model.language_model(ids).logits
            >>> torch.equal(logits, model.language_model(ids).logits)
            False
        """
        if adapters is None:
            yield
            return
        if self._instance_adapters is None:
            raise TypeError(f"{type(self.connector).__name__} makes tokens, it has no adapters")
        with self._instance_adapters.using(adapters):
            yield

    @torch.no_grad()
    def adapt_molecules(self, molecules: Sequence[Any]) -> MoleculeAdapters:
        """The adapters of molecules, one each, in the language model's dtype.

        Args:
            molecules: as of `embed_molecules`.

        Raises:
            TypeError: the connector makes tokens.
            ValueError: a molecule cannot be read, or has no conformer where one is needed.
        """
        if not self.connector.adapts:
            raise TypeError(f"{type(self.connector).__name__} makes tokens, see embed_molecules")
        features = self.config.features
        read = read_all(molecules, options=self.connector.patch_options, features=features)
        graph = GraphBatch.pack(read, self._coordinates(read), features=features)
        return self._adapt(graph)

    def encode(
        self, graph: GraphBatch, patches: PatchSets | Mapping[str, edt_kernels.Patches] | None
    ) -> MoleculeTokens | MoleculeAdapters:
        """The tokens or adapters of packed molecules, from their patches by source."""
        if not graph.num_molecules:
            graph = GraphBatch.empty(*self.graph_encoder.widths)
        graph = graph.to(self.device)
        if patches is None:
            none = {s: pack_patches([]) for s in self.connector.patch_options.sources}
            patches = PatchSets({} if graph.num_molecules else none)
        sets = PatchSets(dict(patches)).to(self.device)
        return self.connector(self.connector.read_graph(self.graph_encoder, graph), dict(sets))

    @torch.no_grad()
    def embed_molecules(self, molecules: Sequence[Any]) -> MoleculeTokens:
        """The tokens of molecules, without the language model; patches are found on the device.

        Args:
            molecules: SMILES, RDKit `Mol`, `Molecule`, ...: see `edt_former.processor.as_molecule`;
                or graphs, where the graph encoder reads no molecules.

        Returns:
            Values [T, E] and offsets [B + 1].

        Raises:
            TypeError: the connector makes adapters, see `adapt_molecules`.
            ValueError: a molecule cannot be read, or has no conformer where one is needed.
        """
        self._needs_tokens("adapt_molecules")
        features = self.config.features
        read = read_all(molecules, options=self.connector.patch_options, features=features)
        packed = pack_with_patches(
            read,
            self.connector,
            self.predictor,
            device=self.device,
            features=features,
            coordinates=self._coordinates(read),
        )
        return self.encode(*packed)

    @torch.no_grad()
    def embed_graph(self, graph: GraphBatch, *, longest: int | None = None) -> MoleculeTokens:
        """The tokens of a packed batch, for molecules in bulk: nothing waits for the device.

        Entropies, patches, features and tokens are computed on the model's device, and no size
        is read back from it: batches are queued one behind the other while the host packs the
        next, and a call can be captured in a CUDA graph. Only a graph encoder that reads
        coordinates has to know how many pairs of atoms there are, and waits for that.

        Args:
            graph: as `GraphBatch.pack` makes it, with the features and coordinates that the graph
                encoder reads, and the motifs that the connector reads.
            longest: at least the most atoms of a molecule, which the host knows as it packs. It
                says that none needs windows; without it, and where one does, a batch of more atoms
                than the predictor's `positions` is waited for.

        Returns:
            Values [T, E] at a capacity that the numbers of atoms and molecules decide, and offsets
            [B + 1]; rows from offsets[-1] on belong to no molecule.

        Raises:
            TypeError: the connector makes adapters.
            ValueError: the connector reads patches that are found on the host, see
                `edt_former.tokens.cut_on_device`; `embed_molecules` finds them.

        Example:
            >>> import edt_former
            >>> from edt_former.chem import read_molecules
            >>> from edt_former.graph import GraphBatch
            >>> model = edt_former.load("edt_former")
            >>> graph = GraphBatch.pack(read_molecules(["CCO", "c1ccccc1"]))
            >>> tokens = model.embed_graph(graph, longest=6)
            >>> tokens.offsets, len(tokens.values)
            (tensor([ 0, 34, 69]), 70)
        """
        self._needs_tokens("adapt_molecules")
        graph = graph.to(self.device)
        options = self.connector.patch_options
        return self.encode(graph, cut_on_device(graph, options, self.predictor, longest=longest))

    def add_lora(self, options: Mapping[str, Any]) -> None:
        """Gives the language model low-rank adapters, which train and are in the checkpoint.

        Args:
            options: see `edt_former.language.adapters.add_lora`.

        Raises:
            ImportError: peft is not installed.
            ValueError: it has adapters already.
        """
        if self.config.lora is not None:
            raise ValueError(f"the language model has adapters already, {self.config.lora}")
        self.language_model = add_lora(self.language_model, options)
        self.config.lora = dict(options)
        self._freeze()
        self._ignore_on_save()

    def set_budget(self, **budget: int | None) -> None:
        """Fewer tokens for every molecule, so shorter prompts; saved with the model.

        Args:
            budget: `anchors`, the learned queries that are used, the first in order; and of a
                connector with patches `dynamic`, the most queries from patches. What is not given
                has no limit.

        Raises:
            TypeError: the connector has no such budget.
            ValueError: a budget that is negative, or beyond the anchors that there are.

        Example:
            >>> import edt_former
            >>> model = edt_former.load("edt_former")
            >>> model.set_budget(anchors=16, dynamic=4)
            >>> model.embed_molecules(["CCO", "CC(=O)Oc1ccccc1C(=O)O"]).offsets
            tensor([ 0, 18, 37])
        """
        self.connector.set_budget(**budget)
        self.config.connector_config = self.connector.config
        if self.processor is not None:
            self.processor.set_budget(**budget)

    def answer(
        self,
        molecules: Any,
        questions: str | Sequence[str],
        *,
        batch_size: int = 16,
        max_new_tokens: int = 64,
        **kwargs: Any,
    ) -> list[str]:
        """Answers to questions about molecules, greedily unless `kwargs` say otherwise.

        Args:
            molecules: one per question, or one for all; each may be a list of several. Arrays and
                columns of tables will do.
            questions: one per molecule, or one for all.
            batch_size: how many are asked at a time.
            max_new_tokens: longest answer.
            kwargs: of `generate`.

        Raises:
            TypeError: a question is no string.
            ValueError: there is no processor; as many molecules as questions are needed; a
                molecule cannot be read; `batch_size` is below 1.
        """
        if self.processor is None:
            raise ValueError("answer needs a processor, set model.processor")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        pairs = _paired(molecules, questions)
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, **kwargs}
        answers = []
        for start in range(0, len(pairs), batch_size):
            asked = pairs[start : start + batch_size]
            prompts = [self.processor.prompt(q, molecules=len(given)) for given, q in asked]
            inputs = self.processor(
                prompts,
                [given for given, _ in asked],
                add_special_tokens=self.processor.tokenizer.chat_template is None,
            )
            answers += self.processor.decode(self.generate(**inputs.to(self.device), **options))
        return answers

    def train(self, mode: bool = True) -> Self:
        """Parts without a trainable parameter stay in eval; checkpointing works in them."""
        super().train(mode)
        for part in self._frozen_modules():
            part.eval()
            for layer in part.modules():
                # Layers decide by their own flag whether to checkpoint; what is inside them
                # (dropout, batch statistics) stays in eval.
                layer.training = mode and getattr(layer, "gradient_checkpointing", False)
        return self

    def trainable_parameters(self) -> dict[str, int]:
        """How many parameters train, by part, and how many there are.

        Keys: "connector", "new_rows", each frozen part, "trainable" and "total".
        """
        counts = dict.fromkeys(("connector", "new_rows", *FROZEN_PARTS), 0)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                counts[name.split(".")[0]] += parameter.numel()
        trainable = sum(counts.values())
        return {
            **counts,
            "trainable": trainable,
            "total": sum(p.numel() for p in self.parameters()),
        }

    def save_pretrained(
        self,
        folder: Path | str,
        *,
        save_frozen: bool = False,
        frozen_folder: Path | str | None = None,
        frozen_names: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **_: Any,
    ) -> None:
        """Writes what is trained, the config, the processor, and a manifest of the frozen parts.

        The manifest holds a hash of each frozen part's weights and, relative to `folder`, where
        the part is: several checkpoints can share one set.

        Args:
            folder: gets `model.safetensors`, `config.json`, `manifest.json`, `processor.json`, and
                the tokenizer's files unless they are beside the language model.
            save_frozen: also write the frozen parts, and the tokenizer to the language model.
            frozen_folder: where the frozen parts are, or go: in `language_model/`,
                `graph_encoder/` and `predictor/`. None: into `folder` with `save_frozen`, else
                they stay where they were read from.
            frozen_names: folders there of parts that are not to be in one of their own name, as
                `{"graph_encoder": "graph_encoder_3d"}`: several of a kind can be side by side.
            dtype: of floating-point weights on disk, None keeps them.
            state_dict: used instead of the model's own, for a Trainer that gathers one.
        """
        save_checkpoint(
            self,
            Path(folder),
            save_frozen=save_frozen,
            frozen_folder=None if frozen_folder is None else Path(frozen_folder),
            frozen_names=frozen_names or {},
            dtype=dtype,
            state_dict=state_dict,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        language_model: PreTrainedModel | Path | str | None = None,
        graph_encoder: GraphEncoder | Path | str | None = None,
        predictor: NextAtomPredictor | Path | str | None = None,
        config: MoleculeConfig | None = None,
        dtype: torch.dtype | None = torch.float32,
        verify: bool = True,
        **_: Any,
    ) -> Self:
        """Reads what `save_pretrained` wrote, with its processor; in eval mode.

        Args:
            folder: of the checkpoint, or its name on the Hugging Face Hub.
            language_model: a causal LM, its folder or its name; None takes the manifest's.
            graph_encoder: likewise.
            predictor: likewise.
            config: instead of the folder's.
            dtype: of the language model where it is read from files; all else is float32.
            verify: check the frozen parts' hashes, which reads all their weights once more. A
                quantised language model needs False.

        Raises:
            FileNotFoundError: a file or a frozen part is missing.
            ValueError: a frozen part is not the one that the checkpoint was trained with, or
                weights are missing, unexpected or of another shape. It names them.
        """
        given = dict(zip(FROZEN_PARTS, (language_model, graph_encoder, predictor), strict=True))
        return load_checkpoint(cls, folder, given, config=config, dtype=dtype, verify=verify)

    def _encodes(self, graph: GraphBatch) -> bool:
        """Whether the connector runs: every parameter needs a gradient, molecules or not."""
        return bool(graph.num_molecules or self.training or self.always_encodes)

    def _row_adapters(
        self, rows: int, graph: GraphBatch | None, molecule_counts: Tensor | None
    ) -> MoleculeAdapters | None:
        """The adapters of every row of a batch; None where no row can have one."""
        if not self.connector.adapts:
            return None
        if graph is None:
            graph, molecule_counts = GraphBatch.empty(*self.graph_encoder.widths), None
        if not self._encodes(graph):
            return None
        if molecule_counts is None:
            molecule_counts = graph.offsets.new_zeros(rows)
        return self._adapt(graph).of_rows(edt_kernels.offsets_from_lengths(molecule_counts))

    def _adapt(self, graph: GraphBatch) -> MoleculeAdapters:
        """The adapters of molecules; where nothing trains, from memory if they were met before."""
        like = self.get_input_embeddings().weight
        if torch.is_grad_enabled() or not graph.num_molecules:
            return self.encode(graph, None).to(like)
        makers = (self.connector, self.graph_encoder)
        tensors = chain(*(m.parameters() for m in makers), *(m.buffers() for m in makers))
        return self._adapter_cache.find(
            graph.keys(),
            lambda new: self.encode(graph.take(new), None).to(like),
            version=(like.dtype, weights_version(tensors)),
        )

    def _needs_tokens(self, instead: str) -> None:
        if self.connector.adapts:
            raise TypeError(f"{type(self.connector).__name__} makes no tokens, see {instead}")

    def _coordinates(self, molecules: Sequence[Molecule]) -> list[np.ndarray] | None:
        """Coordinates for a graph encoder that reads them, by the processor where there is one."""
        if not self.graph_encoder.needs_coordinates:
            return None
        known = None if self.processor is None else self.processor.coordinates(molecules)
        return places(molecules, make_conformers(molecules)) if known is None else known

    def _make_new_rows(self) -> None:
        """Rows for the added tokens: the table's where it has them, else its mean."""
        ids = torch.tensor(self.config.new_token_ids, dtype=torch.int64)
        self.register_buffer("new_token_ids", ids, persistent=False)
        self.register_parameter("new_rows", None)
        if len(ids) == 0:
            return
        table = self.get_input_embeddings()
        device, size = table.weight.device, table.num_embeddings
        with torch.no_grad():
            mean = table(torch.arange(min(size, ROWS_OF_THE_MEAN), device=device)).mean(0)
            known = table(ids.clamp(max=size - 1).to(device))
            rows = torch.where((ids < size).to(device)[:, None], known, mean)
        self.new_rows = nn.Parameter(rows.float())

    def _freeze(self) -> None:
        self.graph_encoder.freeze()
        for part in (self.predictor, self.language_model):
            if part is not None:
                part.requires_grad_(False).eval()
        for name, parameter in self.language_model.named_parameters():
            parameter.requires_grad_(is_adapter(name))
        if self.config.train_embeddings == "all":
            self.get_input_embeddings().weight.requires_grad_(True)
        if self.new_rows is not None:
            self.new_rows.requires_grad_(self.config.train_embeddings != "none")

    def _ignore_on_save(self) -> None:
        """What a Trainer misses in a checkpoint when it resumes; BatchNorm never misses its
        counter."""
        self._keys_to_ignore_on_save = {
            name
            for name in set(self.state_dict()) - set(trained_names(self))
            if not name.endswith("num_batches_tracked")
        }

    def _frozen_modules(self) -> Iterator[nn.Module]:
        """The parts of which nothing trains, the input table apart."""
        table = self.get_input_embeddings().weight
        for name in FROZEN_PARTS:
            part = getattr(self, name)
            if part is not None and not any(
                p.requires_grad and p is not table for p in part.parameters()
            ):
                yield part

    def _new_ids(self, input_ids: Tensor) -> Tensor | None:
        """Which new row each position takes, -1 for none; None where there are no new rows."""
        if self.new_rows is None:
            return None
        same = input_ids[..., None] == self.new_token_ids
        return torch.where(same.any(-1), same.to(torch.int8).argmax(-1), -1)

    def _new_tokens(self, length: int, options: Mapping[str, Any]) -> int:
        """How many tokens `generate` is asked for; 0 where nobody has said."""
        given = options.get("generation_config")
        own = self.language_model.generation_config
        for asked in (options, vars(given or own)):
            if asked.get("max_new_tokens") is not None:
                return asked["max_new_tokens"]
            # That of the language model's own configuration is how much it reads.
            if asked.get("max_length") is not None and (asked is options or given is not None):
                return max(0, asked["max_length"] - length)
        return 0

    def _never_generated(self) -> list[int]:
        """Ids of the language model's vocabulary that only stand in prompts."""
        size = self.config.get_text_config().vocab_size
        ids = (self.config.mol_token_id, *self.config.new_token_ids)
        return [i for i in ids if i is not None and i < size]

    def _without_inputs_only(self, labels: Tensor) -> Tensor:
        """Labels without molecule tokens and new tokens."""
        ignored = torch.isin(labels, self.new_token_ids) | (labels == self.config.mol_token_id)
        return labels.masked_fill(ignored, IGNORED_LABEL)

    def _check_length(self, length: int, new_tokens: int = 0) -> None:
        limit = self.max_positions
        if limit is not None and length + new_tokens > limit:
            new = f" and max_new_tokens={new_tokens}" if new_tokens else ""
            raise ValueError(
                f"the prompt has {length} tokens{new}, the language model reads at most {limit}"
            )


def _check_widths(graph_encoder: GraphEncoder, connector: Connector, table: nn.Module) -> None:
    wanted = {"encoder_width": graph_encoder.width, "llm_width": table.embedding_dim}
    for option, width in wanted.items():
        got = connector.config.get(option, width)
        if got != width:
            raise ValueError(f"the connector's {option} must be {width}, got {got}")


def _check_counts(slots: Tensor, token_offsets: Tensor) -> None:
    pairs = torch.stack([slots.sum(1), token_offsets.diff()], 1).tolist()
    for row, (placeholders, tokens) in enumerate(pairs):
        if placeholders != tokens:
            raise ValueError(
                f"row {row} of input_ids has {placeholders} placeholders, its molecules have "
                f"{tokens} tokens"
            )


def _positions(attention_mask: Tensor) -> Tensor:
    """Positions that count the tokens which are no padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _accepts(language_model: nn.Module, argument: str) -> bool:
    """Whether the model, inside any wrapper with adapters, takes an argument."""
    return argument in inspect.signature(base_of(language_model).forward).parameters


def _paired(molecules: Any, questions: str | Sequence[str]) -> list[tuple[list[Any], str]]:
    """The molecules of each question; what comes alone goes with all."""
    molecules, questions = map(as_list, (molecules, questions))
    asked = as_strings("questions", questions)
    many = isinstance(molecules, list | tuple)
    given = list(molecules) if many else [molecules]
    if isinstance(questions, str):
        asked = asked * len(given)
    elif not many:
        given = given * len(asked)
    if len(given) != len(asked):
        raise ValueError(
            f"molecules and questions must be as many, got {len(given)} and {len(asked)}"
        )
    lists = [list(m) if isinstance(m, list | tuple) else [m] for m in given]
    return list(zip(lists, asked, strict=True))


AutoModel.register(MoleculeConfig, MoleculeLM)
AutoModelForCausalLM.register(MoleculeConfig, MoleculeLM)
