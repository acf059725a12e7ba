"""From SMILES to generated tokens, stage by stage."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edt_former.chem import read_molecules
from edt_former.connectors import MoleculeTokens
from edt_former.graph import GraphBatch, GraphFeatures
from edt_former.processor import find_patch_sets
from edt_former.report.contenders import Contender, Prompt, Rectangle
from edt_former.report.timing import Stopwatch
from edt_former.report.workload import Workload
from edt_kernels import Patches

PATCHES = "predictor + patches"
READING = ("featurise", PATCHES, "graph encoder")
"""Stages before a connector: alike for all that read patches, so timed once for all of them."""
ENCODING = (*READING, "connector")
"""Stages from SMILES to molecule tokens."""
STAGES = (*ENCODING, "splice", "prefill", "decode")
"""All stages, in their order."""

Seconds = dict[str, float]


class Batch(NamedTuple):
    """Molecules as a connector reads them."""

    features: GraphFeatures
    patches: Mapping[str, Patches]


class Answer(NamedTuple):
    """What a language model made of a batch: the `prompt` it read and its `logits` [B, V] there."""

    prompt: Prompt
    logits: Tensor


class Pipeline:
    """The models of a workload, run with a watch in hand.

    A stage ends when its work is done: on a GPU the host waits for it, so the stages of a batch do
    not overlap.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.parts = workload.build()
        self._table = self.parts.language_model.get_input_embeddings()
        generator = torch.Generator().manual_seed(workload.seed)
        text = torch.randint(
            self._table.num_embeddings, (workload.text_tokens,), generator=generator
        )
        self._text = text.to(workload.device)
        accepted = inspect.signature(self.parts.language_model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        # transformers before 5.24 has the other name.
        self._cache = "cache" if "cache" in accepted else "past_key_values"
        # An index gives rows in one piece; a count gives a slice, whose product with the head is
        # many times slower in bfloat16 on a CPU.
        last = torch.tensor([-1], device=workload.device)
        self._last_only = {"logits_to_keep": last} if "logits_to_keep" in accepted else {}

    def check_room(self, slots: int) -> None:
        """Raise ValueError where a molecule of that many tokens has no room in the prompt."""
        limit = getattr(self.parts.language_model.config, "max_position_embeddings", None)
        wanted = slots + self.workload.text_tokens + self.workload.new_tokens
        if limit is not None and wanted > limit:
            raise ValueError(
                f"prompt and answer must have at most {limit} tokens, as many as the language "
                f"model reads, got {wanted}: {slots} of the largest molecule"
            )

    def read(self, smiles: Sequence[str], *, patches: bool = True) -> tuple[Batch, Seconds]:
        """The first three stages; without `patches` none are found, and the stage takes nothing."""
        predictor, encoder, connector, _ = self.parts
        watch = Stopwatch(self.workload.device)
        molecules = read_molecules(smiles)
        graph = GraphBatch.pack(molecules).to(self.workload.device)
        seconds = {"featurise": watch.lap(), PATCHES: 0.0}
        sets = {}
        if patches:
            sets = dict(find_patch_sets(molecules, graph, connector.patch_options, predictor))
            seconds[PATCHES] = watch.lap()
        features = encoder(graph)
        seconds["graph encoder"] = watch.lap()
        return Batch(features, sets), seconds

    def encode(
        self, contender: Contender, batch: Batch
    ) -> tuple[MoleculeTokens | Rectangle, Seconds]:
        """The tokens of a batch."""
        watch = Stopwatch(self.workload.device)
        tokens = contender.encode(batch.features, batch.patches)
        return tokens, {"connector": watch.lap()}

    def answer(
        self, contender: Contender, tokens: MoleculeTokens | Rectangle
    ) -> tuple[Answer, Seconds]:
        """The last three stages: the prompt, the language model over it, new tokens one by one."""
        watch = Stopwatch(self.workload.device)
        prompt = contender.prompt(tokens, self._text, self._table)
        splice = watch.lap()
        length = prompt.embeds.shape[1]
        read = self._read(prompt.mask, length, inputs_embeds=prompt.embeds, **self._last_only)
        prefill = watch.lap()
        self._decode(read, prompt.mask)
        seconds = {"splice": splice, "prefill": prefill, "decode": watch.lap()}
        return Answer(prompt, read.logits[:, -1]), seconds

    def run(self, contender: Contender, batch: Batch) -> Seconds:
        """Seconds of all stages after the batch was read."""
        tokens, encoding = self.encode(contender, batch)
        return encoding | self.answer(contender, tokens)[1]

    def _decode(self, read: object, mask: Tensor | None) -> None:
        if getattr(read, self._cache, None) is None:
            kind = type(self.parts.language_model).__name__
            raise ValueError(f"the language model must return {self._cache}, {kind} does not")
        for _ in range(self.workload.new_tokens):
            token = read.logits[:, -1].argmax(-1, keepdim=True)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            cache = {self._cache: getattr(read, self._cache)}
            read = self._read(mask, 1, input_ids=token, **cache)

    def _read(self, mask: Tensor | None, length: int, **inputs: object) -> object:
        """The language model over the last `length` tokens; without padding it gets no mask."""
        if mask is not None:
            inputs["attention_mask"] = mask.long()
            if self._takes_positions:
                positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
                inputs["position_ids"] = positions[:, -length:]
        return self.parts.language_model(use_cache=True, **inputs)
