"""Names: which layout a file has, where a tensor belongs, and what a name becomes in one line."""

from __future__ import annotations

import pytest
import torch

from edt_former.connectors import make_connector
from edt_former.graph import make_encoder
from edt_former.released.plan import shapes_of
from edt_former.released.sizes import Told, connector_config, graph_config
from edt_former.released.to_ours import new_heads
from edt_former.released.tree import (
    COPIES,
    PARTS,
    Layout,
    abbreviated,
    layout_of,
    placed,
    read_tree,
    tree_name,
)

PREFIXES = ["", "model.", "mol_llama."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "first", ["llm.model.norm.weight", "encoder.query_tokens", "llm_proj.bias"]
)
def test_the_prefix_is_that_of_all_names_whichever_is_first(prefix, first):
    names = [first, "llm.model.embed_tokens.weight", "encoder.ln_graph.unimol.bias"]
    assert layout_of([prefix + name for name in names]) == Layout(prefix)


def test_a_prefix_that_some_names_lack_is_none():
    names = ["model.encoder.query_tokens", "encoder.ln_graph.unimol.bias"]
    assert layout_of(names) == Layout()
    assert read_tree(dict.fromkeys(names)).unexpected == ["model.encoder.query_tokens"]


def test_an_encoder_without_its_name():
    names = ["query_tokens", "Qformer.bert.embeddings.LayerNorm.bias"]
    assert layout_of(names) == Layout(bare=True)
    assert layout_of([f"model.{name}" for name in names]) == Layout("model.", bare=True)
    tree = read_tree({names[0]: 1, names[1]: 2})
    assert tree.parts["connector"] == {
        "query_tokens": 1,
        "Qformer.bert.embeddings.LayerNorm.bias": 2,
    }
    assert tree.spell("connector", "query_tokens") == "query_tokens"


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([], id="nothing"),
        pytest.param(["model.layers.0.mlp.up_proj.weight", "lm_head.weight"], id="llama"),
        pytest.param(["embeddings.LayerNorm.bias", "encoder.layer.0.output.bias"], id="bert"),
        pytest.param(["embed_tokens.weight", "encoder.layers.0.fc1.bias"], id="uni-mol"),
        pytest.param(["llm.model.norm.weight"], id="language-model-alone"),
    ],
)
def test_other_files_are_refused(names):
    with pytest.raises(ValueError, match=r"must be of a released EDT-Former .*, got "):
        read_tree(dict.fromkeys(names))


def test_names_that_have_no_place_are_unexpected():
    tree = read_tree({"encoder.query_tokens": 1, "encoder.nonsense.bias": 2, "optimizer.step": 3})
    assert tree.unexpected == ["encoder.nonsense.bias", "optimizer.step"]


def test_one_of_two_copies_is_enough():
    (copy, original), *_ = COPIES.items()
    for name in (copy, original):
        tree = read_tree({"encoder.query_tokens": 1, name: 2})
        assert tree.copies == {}
        assert tree.parts["connector"]["Qformer.bert.embeddings.word_embeddings.weight"] == 2
    tree = read_tree({"encoder.query_tokens": 1, copy: 2, original: 3})
    assert tree.copies == {copy: (2, 3)}


def test_a_name_that_the_tree_lacks():
    with pytest.raises(ValueError, match=r"no sum_mlp.0.bias in its connector"):
        tree_name("connector", "sum_mlp.0.bias")


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ([], ""),
        (["a"], "a"),
        (["h.3.a"], "h.3.a"),
        (["h.10.a", "h.9.a", "h.2.a", "h.1.b"], "h.{2,9-10}.a, h.1.b"),
        (["h.0.mlp.0.a", "h.1.mlp.0.a"], "h.{0-1}.mlp.0.a"),
        (["h.0", "h.1"], "h.0, h.1"),
    ],
)
def test_names_in_one_line(names, line):
    assert abbreviated(names) == line


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_published_name_has_one_place_and_leads_back(published_keys, stage, prefix):
    keys = {
        prefix + name: torch.empty(shape, device="meta")
        for name, (shape, _) in published_keys(stage).items()
    }
    assert len(keys) == (1220 if stage == 1 else 1426)
    tree = read_tree(keys)
    assert (tree.layout, tree.view, tree.unexpected) == (Layout(prefix), "both", [])
    back = [tree.spell(part, name) for part in PARTS for name in tree.parts[part]]
    back += [tree.layout.spell(copy) for copy in tree.copies]
    assert len(back) == len(set(back)) and set(back) == set(keys)
    assert len(tree.copies) == (2 if stage == 1 else 0)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_published_shapes_are_those_of_the_modules(published_keys, stage):
    """What the sizes that are read off the shapes build has the same names and shapes."""
    keys = {
        name: torch.empty(shape, device="meta")
        for name, (shape, _) in published_keys(stage).items()
    }
    parts, told = read_tree(keys).parts, Told()
    graph, connector = (
        graph_config(parts["graph_encoder"], "both", told),
        connector_config(parts["connector"], "both", told, positions=608),
    )
    assert graph == {
        "name": "blended",
        "flat": {
            "name": "gin",
            "layers": 5,
            "width": 300,
            "atom_tables": [119, 4, 12, 12, 10, 6, 6, 2, 2],
            "bond_tables": [5, 6, 2],
        },
        "spatial": {
            "name": "unimol",
            "layers": 15,
            "width": 512,
            "heads": 64,
            "ffn": 2048,
            "gaussians": 128,
            "special_tokens": True,
            "hydrogens": False,
        },
        "layers": 8,
        "width": 512,
        "heads": 8,
        "special_tokens": True,
    }
    assert connector == {
        "name": "edt_former_published",
        "llm_width": None if stage == 1 else 4096,
        "width": 768,
        "layers": 12,
        "heads": 12,
        "ffn": 3072,
        "cross_attention_freq": 1,
        "encoder_width": 512,
        "num_queries": 32,
        "max_dynamic": 64,
        "text_vocab_size": 31091 if stage == 1 else None,
        "text_positions": 608,
        "patches": {"encoder": "both"},
    }
    found = {name: {n: x.shape for n, x in part.items()} for name, part in parts.items()}
    assert found["graph_encoder"] == shapes_of(make_encoder, graph)
    assert found["connector"] == shapes_of(make_connector, connector)
    if stage == 1:
        heads = shapes_of(lambda task: new_heads(connector, task), {"embed_dim": 512})
        assert found["heads"] == heads
    assert sum(map(len, found.values())) == len(keys) - 2 * (stage == 1)


def test_places():
    assert placed("encoder.graph_encoder.unimol.embed_tokens.weight", "3d") == (
        "graph_encoder",
        "embed_tokens.weight",
    )
    assert placed("encoder.ln_graph.unimol.bias", "3d") == ("connector", "ln_graph.bias")
    assert placed("encoder.query_tokens.more") is None
    assert placed("encoder") is None
