"""Graphs that are no molecules: read without chemistry, asked about, and learned from."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from edt_former.connectors import make_connector
from edt_former.graph import Graph, make_encoder, read_graph
from edt_former.model import MoleculeLM
from edt_former.tasks.graph_questions import (
    MOST,
    QUESTIONS,
    graph_answers,
    questions,
    random_graphs,
)

TRIANGLE = SimpleNamespace(
    x=torch.zeros(3, 1, dtype=torch.int64),
    edge_index=torch.tensor([[0, 1, 2, 1, 2, 0], [1, 2, 0, 0, 1, 2]]),
)
GIN = {"name": "gin", "layers": 2, "width": 32, "atom_tables": [1], "bond_tables": [1]}
CONNECTORS = {
    "llamo": {
        **{"name": "llamo", "num_levels": 3, "motif_queries": 0, "level_queries": 2, "depth": 2},
        **{"sum_tokens": 2, "sum_width": 32, "heads": 2},
    },
    "qformer": {
        **{"name": "qformer", "num_queries": 4, "width": 32, "layers": 2, "heads": 2, "ffn": 64},
        **{"sum_tokens": 2, "dropout": 0.0},
    },
}


def graph_model(connector: str = "llamo") -> MoleculeLM:
    torch.manual_seed(0)
    words = " ".join(QUESTIONS.values()).replace("?", " ?").split()
    values = ["yes", "no", *map(str, range(MOST + 1))]
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    names = dict.fromkeys([*special, "question:", "answer:", *words, *values])
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True)),
    )
    config = LlamaConfig(
        vocab_size=len(names) + 1,
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.1},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    options = {**CONNECTORS[connector], "encoder_width": 32, "llm_width": 32}
    parts = AutoModelForCausalLM.from_config(config), make_encoder(GIN), make_connector(options)
    return MoleculeLM.from_parts(*parts, tokenizer=fast).eval()


@pytest.mark.parametrize("connector", CONNECTORS)
def test_graphs_take_the_place_of_molecules(connector, tmp_path):
    model = graph_model(connector)
    given = [TRIANGLE, SimpleNamespace(num_nodes=2, edge_index=[[], []])]
    rows = ["<mol> how many ?", "<mol> how many ?", "how many ?"]
    inputs = model.processor(rows, given)
    assert inputs["molecule_counts"].tolist() == [1, 1, 0]
    assert inputs["graph"].offsets.tolist() == [0, 3, 5]
    with torch.no_grad():
        together = model(**inputs).logits
        alone = model(**model.processor(rows[:1], given[0])).logits[0]
    torch.testing.assert_close(together[0], alone, rtol=0, atol=1e-5)
    tokens = model.embed_molecules(given)
    assert tokens.offsets.diff().tolist() == model.processor.token_counts(given)
    model.save_pretrained(tmp_path, save_frozen=True)
    again = MoleculeLM.from_pretrained(tmp_path)
    assert again.config.features is again.processor.features is None
    torch.testing.assert_close(again.embed_molecules(given).values, tokens.values)


def test_a_row_without_a_graph_trains_too():
    model = graph_model().train()
    model(**model.processor("how many ?", answers="3")).loss.backward()
    for name, parameter in model.connector.named_parameters():
        assert parameter.grad is not None, name
    assert model(**model.processor([""], answers=["3"])).loss.isfinite()


def test_pyg_data_are_read_as_they_are():
    geometric = pytest.importorskip("torch_geometric.data", reason="needs torch_geometric")
    data = geometric.Data(**vars(TRIANGLE))
    assert read_graph(data).bond_index.tolist() == read_graph(TRIANGLE).bond_index.tolist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"edge_index": [[0], [3]]}, "graph 0: edge_index must name nodes from 0 to 2, got 0 to 3"),
        ({"edge_index": [0, 1]}, r"edge_index must have shape \[2, E\]"),
        ({"edge_index": [[0.5], [1.0]]}, "edge_index must hold integers, got float64"),
        ({"x": [[0.5]] * 3}, "x must hold integers"),
        ({"x": [[-1]] * 3}, "x must not be negative, got -1"),
        ({"x": [0, 0, 0]}, "x must have two dimensions"),
        ({"edge_attr": [[0]]}, "edge_attr must have a row per edge, 6, got 1"),
        ({"edge_index": None}, "a graph must have edge_index"),
    ],
)
def test_what_is_no_graph_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        graph_model().processor("<mol>", SimpleNamespace(**{**vars(TRIANGLE), **changed}))


def test_smiles_and_chemistry_are_refused():
    model = graph_model()
    with pytest.raises(ValueError, match=r"graph 0: a graph must have edge_index, .* got str"):
        model.processor("<mol>", "CCO")
    config = {**model.connector.config, "motif_queries": 4}
    with pytest.raises(ValueError, match=r"neither patches nor motifs .* 'llamo' does"):
        type(model.processor)(model.processor.tokenizer, config, features=None)


def by_hand(graph: Graph) -> dict[str, str]:
    """Degrees and components written out."""
    near = {n: set() for n in range(graph.num_atoms)}
    for source, target in graph.bond_index.T.tolist():
        near[source].add(target)
    seen, wave = {0}, {0}
    while wave:
        wave = set().union(*(near[n] for n in wave)) - seen
        seen |= wave
    degree = max(map(len, near.values()))
    connected = "yes" if len(seen) == len(near) else "no"
    return {"nodes": str(len(near)), "degree": str(degree), "connected": connected}


def test_the_truths_of_random_graphs():
    graphs = random_graphs(60, seed=3)
    answers = [graph_answers(graph) for graph in graphs]
    assert answers == [by_hand(graph) for graph in graphs]
    share = np.mean([a["connected"] == "yes" for a in answers])
    assert 0.25 < share < 0.75
    assert [g.num_atoms for g in random_graphs(60, seed=3)] == [g.num_atoms for g in graphs]
    assert len({a["nodes"] for a in answers}) > 5


def test_a_model_learns_to_count_the_nodes_of_unseen_graphs():
    """Connector and language model are trained, for seconds."""
    model = graph_model().train()
    model.language_model.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    train = [row for row in questions(random_graphs(400)) if row[1] == QUESTIONS["nodes"]]
    rng = np.random.default_rng(0)
    for _ in range(200):
        graphs, texts, answers = zip(*(train[i] for i in rng.choice(len(train), 32)), strict=True)
        prompts = [model.processor.prompt(text) for text in texts]
        loss = model(**model.processor(prompts, list(graphs), answers=list(answers))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    test = random_graphs(60, seed=1)
    said = model.answer(test, QUESTIONS["nodes"], batch_size=60, max_new_tokens=2)
    right = [a == graph_answers(g)["nodes"] for a, g in zip(said, test, strict=True)]
    guess = max(np.bincount([g.num_atoms for g in test])) / len(test)
    assert np.mean(right) > guess + 0.3
