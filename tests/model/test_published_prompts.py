"""Prompts with molecules in them: every row where the published program has it, less its padding.

Published prompts mark a molecule with n placeholders. Its first n tokens take their places and the
others follow the last one; here a placeholder stands for every token, so no others are left.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import edt_kernels
from edt_former.chem import read_molecules
from edt_former.config import MoleculeConfig
from edt_former.connectors import Connector, MoleculeTokens
from edt_former.graph import GraphBatch, make_encoder
from edt_former.model import MoleculeLM
from edt_former.tokens import PatchOptions

CASES = ["basic_b3", "no_labels", "all_global", "truncate_max_pos", "local_q_only"]
CASES += ["different_n_mol", "two_groups_same_sample", "right_padded_input"]
CASES += ["published_8_of_96_b3", "fp16_text_fp32_query", "zero_inside_mask"]
CASES += ["multi_fn_two_groups", "multi_fn_zero_mol"]
RAISED = ["one_mol_token", "zero_mol_tokens", "too_many_mol_tokens"]
"""Prompts that the published program does not take."""
STATIC_QUERIES = 6  # of the "multi_fn" cases, whose groups all begin with the first of them
IGNORED = -100
VOCAB = 512
MARK = VOCAB
"""The molecule token has no row in the table."""


class Row(NamedTuple):
    """A prompt: `index` [L] of its text, -1 at molecule tokens; `groups` of tokens, run by run."""

    index: Tensor
    groups: list[Tensor]
    left_out: slice  # of the published row: tokens that do not exist

    @property
    def tokens(self) -> Tensor:
        return torch.cat(self.groups)


class Prompts(NamedTuple):
    text: Tensor  # [B, S, E]
    mask: Tensor  # bool [B, S]
    labels: Tensor | None  # [B, S]
    rows: list[Row]


def prompts(record, case: str, spare: int) -> Prompts:
    """A case as the product lays it out; row b has `spare` + b tokens less than were recorded."""
    text, flags, queries, mask = (
        record[f"{case}.in.{name}"]
        for name in ("text_embeds", "mol_token_flag", "query_output", "attention_mask")
    )
    rows = []
    for b in range(len(text)):
        marked = int(flags[b].sum())
        kept = max(len(queries[b]) - (spare + b if spare else 0), marked)
        runs = [len(list(run)) for flag, run in groupby(flags[b].tolist()) if flag]
        if case.startswith("multi_fn"):
            groups = [queries[b, :run] for run in runs]
            following = queries[b, STATIC_QUERIES:]
            kept = max(kept - STATIC_QUERIES, 0)
        else:
            groups = list(queries[b, :marked].split(runs)) if runs else []
            following = queries[b, marked:]
            kept -= marked
        if case == "local_q_only":
            groups = [group[:0] for group in groups]
        index = torch.arange(text.shape[1])
        if case != "local_q_only":
            index = torch.where(flags[b], -1, index)
        end = 0
        if runs:
            groups[-1] = torch.cat([groups[-1], following[:kept]])
            end = int(flags[b].nonzero()[-1]) + 1
            index = torch.cat([index[:end], index.new_full((kept,), -1), index[end:]])
        left_out = slice(end + kept, end + (len(following) if runs else kept))
        rows.append(Row(index, groups or [queries[b, :0]], left_out))
    return Prompts(text, mask.bool(), record.get(f"{case}.in.labels"), rows)


def expected(record, case: str, name: str, given: Prompts, b: int) -> Tensor:
    """A published row less the slots of tokens that do not exist and what the batch appended."""
    values, row = record[f"{case}.out.{name}"][b], given.rows[b]
    kept = torch.ones(len(values), dtype=torch.bool)
    kept[row.left_out] = False
    return values[kept][: len(row.index)]


def beside(values: Tensor, row: Row, other: object) -> Tensor:
    """What the text has along its row, and `other` at molecule tokens."""
    slots = row.index < 0
    slots = slots if values.dim() == 1 else slots[:, None]
    return values[row.index.clamp(min=0)].masked_fill(slots, other)


def padded(parts: list[Tensor], value: object) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)


def check_embeds(record, case, given, b, found):
    """`found` [L, E] of row b; the published program may have cut its end off."""
    wanted = expected(record, case, "embeds", given, b)
    assert len(wanted) == len(found) or case == "truncate_max_pos"
    assert torch.equal(found[: len(wanted)], wanted), (case, b)


SPARE = pytest.mark.parametrize("spare", [0, 2], ids=["all", "fewer"])


def test_every_recorded_case_is_here(recorded):
    names = {name.split(".")[0] for name in recorded("edt_inject")}
    assert names == {*CASES, *RAISED}


@SPARE
@pytest.mark.parametrize("case", CASES)
def test_splice_equals_the_published_layout_edt_inject(recorded, case, spare):
    record = recorded("edt_inject")
    given = prompts(record, case, spare)
    embeds = [
        beside(text, row, torch.nan) for text, row in zip(given.text, given.rows, strict=True)
    ]
    lengths = torch.tensor([len(row.tokens) for row in given.rows])
    found = edt_kernels.splice(
        padded(embeds, 0.0),
        torch.cat([row.tokens for row in given.rows]).to(given.text.dtype),
        edt_kernels.offsets_from_lengths(lengths),
        padded([row.index < 0 for row in given.rows], False),
    )
    for b, row in enumerate(given.rows):
        check_embeds(record, case, given, b, found[b, : len(row.index)])


@SPARE
@pytest.mark.parametrize("case", CASES)
def test_insert_equals_the_published_layout_edt_inject(recorded, case, spare):
    """Packed prompts: no padding at all, so what is attended to is what is there."""
    record = recorded("edt_inject")
    given = prompts(record, case, spare)
    text, labels, places, owners, groups, there = [], [], [], [], [], []
    for b, row in enumerate(given.rows):
        begin = sum(map(len, text))
        attended = beside(given.mask[b], row, True)
        kept = (row.index >= 0) & attended
        text.append(given.text[b][row.index[kept]])
        if given.labels is not None:
            labels.append(given.labels[b][row.index[kept]])
        before = begin + kept.cumsum(0)
        starts = (row.index < 0) & ~torch.cat([torch.tensor([False]), row.index[:-1] < 0])
        places += before[starts].tolist()
        full = [group for group in row.groups if len(group)]
        assert len(full) == int(starts.sum())
        groups += full
        owners += [b] * len(full)
        there.append(attended)
    longer = edt_kernels.insert(
        torch.cat(text),
        edt_kernels.offsets_from_lengths(torch.tensor([len(rows) for rows in text])),
        torch.cat(groups).to(given.text.dtype),
        edt_kernels.offsets_from_lengths(torch.tensor([len(group) for group in groups])),
        torch.tensor(places),
        rows=torch.tensor(owners),
        labels=torch.cat(labels) if labels else None,
    )
    assert (longer.labels is None) == (case == "no_labels")
    for b, attended in enumerate(there):
        start, stop = longer.offsets[b : b + 2].tolist()
        assert stop - start == int(attended.sum())
        assert longer.positions[start:stop].tolist() == list(range(stop - start))
        wanted = expected(record, case, "embeds", given, b)
        wanted = wanted[attended[: len(wanted)]]
        assert torch.equal(longer.embeds[start:stop][: len(wanted)], wanted)
        if case != "no_labels":
            wanted = expected(record, case, "labels", given, b)
            wanted = wanted[attended[: len(wanted)]]
            assert torch.equal(longer.labels[start:stop][: len(wanted)], wanted)


class Given(Connector):
    """A connector that was told its tokens."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__()
        self.config, self.patch_options = {}, PatchOptions(sources=())
        # Molecule by molecule: only rows that have tokens have a molecule.
        self.tokens = [row.tokens for row in rows if len(row.tokens)]

    def forward(self, features, patches):
        lengths = torch.tensor([len(tokens) for tokens in self.tokens])
        return MoleculeTokens(torch.cat(self.tokens), edt_kernels.offsets_from_lengths(lengths))

    def token_counts(self, patch_counts, num_molecules):
        return [len(tokens) for tokens in self.tokens]


def model_of(given: Prompts, positions_read: int = 128) -> MoleculeLM:
    """A model whose table holds the recorded text, one row per position of the batch."""
    positions = given.text.flatten(0, 1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=positions.shape[1],
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=positions_read,
    )
    language_model = AutoModelForCausalLM.from_config(config).to(given.text.dtype)
    with torch.no_grad():
        language_model.get_input_embeddings().weight[: len(positions)] = positions
    config = MoleculeConfig(text_config=config, mol_token_id=MARK)
    encoder = make_encoder({"name": "gin", "layers": 1, "width": 4})
    parts = {"graph_encoder": encoder, "connector": Given(given.rows)}
    return MoleculeLM(config, language_model=language_model, **parts).eval()


def inputs_of(given: Prompts) -> dict[str, object]:
    ids, labels, masks, counts = [], [], [], []
    for b, row in enumerate(given.rows):
        own = b * given.text.shape[1] + torch.arange(given.text.shape[1])
        ids.append(beside(own, row, MARK))
        masks.append(beside(given.mask[b], row, True))
        if given.labels is not None:
            labels.append(beside(given.labels[b], row, MARK))
        counts.append(int(len(row.tokens) > 0))
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded(masks, False).long(),
        "graph": GraphBatch.pack(read_molecules(["C"] * sum(counts))),
        "molecule_counts": torch.tensor(counts),
        **({"labels": padded(labels, IGNORED)} if labels else {}),
    }


@SPARE
@pytest.mark.parametrize("case", CASES)
def test_the_language_model_reads_the_published_rows_edt_inject(recorded, case, spare):
    """Embeddings, attention and labels as the language model receives them."""
    record = recorded("edt_inject")
    given, seen = prompts(record, case, spare), {}
    model = model_of(given)
    model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    inputs = inputs_of(given)
    with torch.no_grad():
        model(**inputs)
    for b, row in enumerate(given.rows):
        length = len(row.index)
        check_embeds(record, case, given, b, seen["inputs_embeds"][b, :length])
        attended = seen["attention_mask"][b]
        assert not attended[length:].any()
        # Recorded masks count all padding from the left, so they tell where there is no other.
        if given.mask[b].sort(stable=True).values.equal(given.mask[b]):
            wanted = expected(record, case, "attention_mask", given, b)
            assert torch.equal(attended[:length][: len(wanted)], wanted)
        if case != "no_labels":
            wanted = expected(record, case, "labels", given, b)
            assert torch.equal(seen["labels"][b, :length][: len(wanted)], wanted)


def test_a_prompt_is_never_cut_off_edt_inject(recorded):
    given = prompts(recorded("edt_inject"), "truncate_max_pos", 0)
    with pytest.raises(ValueError, match="has 22 tokens, the language model reads at most 18"):
        model_of(given, positions_read=18)(**inputs_of(given))


def test_one_placeholder_is_enough_edt_inject(recorded):
    given = prompts(recorded("edt_inject"), "one_mol_token", 0)
    prompt = model_of(given).embed_prompt(
        **{k: v for k, v in inputs_of(given).items() if k not in ("labels", "attention_mask")}
    )
    queries = recorded("edt_inject")["one_mol_token.in.query_output"]
    for b, at in enumerate((3, 4)):
        row = torch.cat([given.text[b, :at], queries[b], given.text[b, at + 1 :]])
        assert torch.equal(prompt[b], row)


def test_a_row_without_a_molecule_is_text_edt_inject(recorded):
    given = prompts(recorded("edt_inject"), "zero_mol_tokens", 0)
    inputs = inputs_of(given)
    assert inputs["molecule_counts"].tolist() == [0, 1]
    inputs = {k: v for k, v in inputs.items() if k not in ("labels", "attention_mask")}
    prompt = model_of(given).embed_prompt(**inputs)
    queries = recorded("edt_inject")["zero_mol_tokens.in.query_output"]
    assert torch.equal(prompt[0, :10], given.text[0])
    row = torch.cat([given.text[1, :3], queries[1], given.text[1, 7:]])
    assert torch.equal(prompt[1], row)
    # A molecule that no placeholder marks is an error, as it is there.
    tokens = given.rows[1].tokens
    several = Prompts(
        given.text, given.mask, None, [Row(r.index, [tokens], r.left_out) for r in given.rows]
    )
    inputs = {**inputs, "molecule_counts": torch.tensor([1, 1])}
    inputs["graph"] = GraphBatch.pack(read_molecules(["C", "C"]))
    with pytest.raises(
        ValueError, match=r"row 0 of input_ids has 0 placeholders, .* have 12 tokens"
    ):
        model_of(several).embed_prompt(**inputs)


def test_more_placeholders_than_tokens_are_an_error_edt_inject(recorded):
    record, case = recorded("edt_inject"), "too_many_mol_tokens"
    flags, queries = (record[f"{case}.in.{name}"] for name in ("mol_token_flag", "query_output"))
    row = Row(torch.where(flags[0], -1, torch.arange(20)), [queries[0]], slice(0, 0))
    text, mask = record[f"{case}.in.text_embeds"], record[f"{case}.in.attention_mask"].bool()
    given = Prompts(text, mask, None, [row])
    with pytest.raises(ValueError, match=r"row 0 of input_ids has 13 placeholders, .* 12 tokens"):
        model_of(given)(**inputs_of(given))
    with pytest.raises(ValueError, match="got 13 slots and 12 tokens in row 0"):
        edt_kernels.splice(text, queries[0], torch.tensor([0, 12]), flags)
