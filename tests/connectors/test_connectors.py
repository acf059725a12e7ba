"""Connectors against a padded BERT, the published numbers, and the promises of a connector."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from edt_former.connectors import EDTFormer, QFormer, QueryTransformer, make_connector
from edt_former.graph import GraphFeatures
from edt_former.released import read_tree
from edt_former.tokens import pack_patches
from edt_kernels import Patches

SIZE = {"width": 24, "layers": 3, "heads": 4, "ffn": 40, "encoder_width": 10, "llm_width": 12}
ATOMS = [6, 0, 1, 9]
IDS = {
    "entropy": [[0, 0, 1, 1, 2, 2], [], [0], [0, 0, 0, 1, 1, 1, 1, 1, 1]],
    "brics": [[0, 1, 0, 1, 1, 0], [], [0], [2, 0, 0, 1, 1, 2, 3, 3, 3]],
}
BOTH = {"patches": {"sources": ["entropy", "brics"]}}


def connector(name: str = "edt_former", seed: int = 0, **options: object):
    torch.manual_seed(seed)
    model = make_connector({"name": name, "num_queries": 5, **SIZE, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def cut(lengths) -> torch.Tensor:
    return F.pad(torch.as_tensor(lengths).cumsum(0), (1, 0))


def features(seed: int = 0) -> GraphFeatures:
    torch.manual_seed(seed)
    return GraphFeatures(torch.randn(sum(ATOMS), SIZE["encoder_width"]), cut(ATOMS))


def packed_patches(molecules=(0, 1, 2, 3)) -> dict[str, Patches]:
    return {name: pack_patches([ids[m] for m in molecules]) for name, ids in IDS.items()}


def padded(values: torch.Tensor, lengths) -> tuple[torch.Tensor, torch.Tensor]:
    parts = values.split(list(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), mask


def padded_bert(state, sizes, queries, keys, text=None):
    """The query transformer on padded batches with masks; each input is (values, mask).

    `text` holds word ids. Returns the hidden states of [queries; text].
    """
    width, heads = sizes["width"], sizes["heads"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        weight, bias = state[f"{name}.LayerNorm.weight"], state[f"{name}.LayerNorm.bias"]
        return F.layer_norm(x, (width,), weight, bias, eps=1e-12)

    def attend(x, source, mask, name):
        q, k, v = (
            linear(a, f"{name}.self.{part}").unflatten(-1, (heads, -1)).transpose(1, 2)
            for a, part in ((x, "query"), (source, "key"), (source, "value"))
        )
        scores = q @ k.mT / (width // heads) ** 0.5
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        p = scores.softmax(-1).nan_to_num(0)
        read = (p @ v).transpose(1, 2).flatten(2)
        return norm(linear(read, f"{name}.output.dense") + x, f"{name}.output")

    def feed(x, layer, branch):
        inner = F.gelu(linear(x, f"{layer}.intermediate{branch}.dense"))
        return norm(linear(inner, f"{layer}.output{branch}.dense") + x, f"{layer}.output{branch}")

    x, mask = queries
    count = x.shape[1]
    if text is not None:
        words = state["bert.embeddings.word_embeddings.weight"][text[0]]
        positions = state["bert.embeddings.position_embeddings.weight"][: words.shape[1]]
        x, mask = torch.cat([x, words + positions], 1), torch.cat([mask, text[1]], 1)
    x = norm(x, "bert.embeddings")
    for n in range(sizes["layers"]):
        layer = f"bert.encoder.layer.{n}"
        x = attend(x, x, mask, f"{layer}.attention")
        query, words = x[:, :count], x[:, count:]
        if n % sizes["cross_attention_freq"] == 0:
            query = attend(query, *keys, f"{layer}.crossattention")
        query = feed(query, layer, "_query")
        x = query if text is None else torch.cat([query, feed(words, layer, "")], 1)
    return x


@pytest.mark.parametrize("freq", [1, 2])
@pytest.mark.parametrize("with_text", [False, True], ids=["queries", "text"])
def test_query_transformer_equals_a_padded_bert(freq, with_text):
    torch.manual_seed(0)
    sizes = {"width": 24, "layers": 3, "heads": 4, "ffn": 40, "cross_attention_freq": freq}
    vocab = {"text_vocab_size": 30, "text_positions": 16} if with_text else {}
    model = QueryTransformer(key_width=10, **sizes, **vocab).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    queries, keys, words = [4, 2, 7, 1], [6, 0, 1, 9], [3, 5, 0, 1]
    q, k = torch.randn(sum(queries), 24), torch.randn(sum(keys), 10)
    ids = torch.randint(30, (sum(words),))
    text = (padded(ids, words)) if with_text else None
    expected = padded_bert(model.state_dict(), sizes, padded(q, queries), padded(k, keys), text)

    arguments = (ids, cut(words)) if with_text else ()
    out = model(q, cut(queries), k, cut(keys), *arguments)
    rows = torch.cat([x[:n] for x, n in zip(expected, queries, strict=True)])
    torch.testing.assert_close(out.queries, rows, rtol=1e-4, atol=1e-4)
    if with_text:
        rows = torch.cat([x[7 : 7 + n] for x, n in zip(expected, words, strict=True)])
        torch.testing.assert_close(out.text, rows, rtol=1e-4, atol=1e-4)
    else:
        assert out.text is None


def test_text_alone():
    """A pass without queries: what a text tower computes."""
    torch.manual_seed(0)
    sizes = {"width": 24, "layers": 2, "heads": 4, "ffn": 40, "cross_attention_freq": 1}
    model = QueryTransformer(key_width=10, text_vocab_size=30, **sizes).eval()
    ids, offsets, none = torch.randint(30, (5,)), torch.tensor([0, 2, 5]), torch.zeros(3).long()
    out = model(torch.zeros(0, 24), none, torch.zeros(0, 10), none, ids, offsets)
    nothing = torch.zeros(2, 0, 24), torch.zeros(2, 0, dtype=torch.bool)
    keys = torch.zeros(2, 1, 10), torch.zeros(2, 1, dtype=torch.bool)
    expected = padded_bert(model.state_dict(), sizes, nothing, keys, padded(ids, [2, 3]))
    expected = torch.cat([expected[0, :2], expected[1]])
    torch.testing.assert_close(out.text, expected, rtol=1e-4, atol=1e-5)
    assert out.queries.shape == (0, 24)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ((torch.zeros(1).long(), torch.tensor([0, 1])), "text branch"),
        ((torch.zeros(1).long(),), "text_offsets"),
    ],
    ids=["no-branch", "no-offsets"],
)
def test_text_errors(text, match):
    model = connector().Qformer
    one = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=match):
        model(torch.zeros(1, 24), one, torch.zeros(1, 10), one, *text)


@pytest.mark.parametrize("sources", [(), ("entropy",), ("brics",), ("brics", "entropy")], ids=str)
def test_edt_former_written_out_molecule_by_molecule(sources):
    """Anchors, then per source the projected means of the patches; keys = LN([mean; atoms])."""
    model = connector(patches={"sources": list(sources)})
    atoms = features()
    tokens = model(atoms, packed_patches())
    state = model.state_dict()
    for m, x in enumerate(atoms.values.split(ATOMS)):
        mean = x.mean(0, keepdim=True) if len(x) else torch.zeros(1, x.shape[1])
        keys = model.ln_graph(torch.cat([mean, x]))
        dynamic = [
            model.ln_graph(x)[torch.tensor(IDS[source][m]) == patch].mean(0, keepdim=True)
            for source in sources
            for patch in sorted(set(IDS[source][m]))
        ]
        queries = torch.cat([model.query_tokens[0], *map(model.local_q_proj, dynamic)])
        trunk = {k.removeprefix("Qformer."): v for k, v in state.items() if "Qformer" in k}
        sizes = {**SIZE, "cross_attention_freq": 1}
        full = [(a[None], torch.ones(1, len(a), dtype=torch.bool)) for a in (queries, keys)]
        expected = model.llm_proj(padded_bert(trunk, sizes, *full)[0])
        mine = tokens.values[tokens.offsets[m] : tokens.offsets[m + 1]]
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


CASES = [
    pytest.param("qformer", {}, id="static"),
    pytest.param("qformer", {"graph_token": False}, id="static-no-mean"),
    pytest.param("edt_former", {}, id="entropy"),
    pytest.param("edt_former", {"patches": {"sources": ["brics"]}}, id="brics"),
    pytest.param("edt_former", BOTH, id="both"),
    pytest.param("edt_former", {"patches": {"sources": []}}, id="no-patches"),
    pytest.param("edt_former", {"sum_tokens": 3, **BOTH}, id="sums"),
    pytest.param("edt_former", {"max_dynamic": 3, **BOTH}, id="limit"),
    pytest.param("edt_former", {"num_queries": 0}, id="no-anchors"),
    pytest.param("edt_former", {"patch_reduce": "sum"}, id="patch-sums"),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_molecule_alone_equals_it_in_a_batch(name, options):
    model, atoms = connector(name, **options), features()
    tokens = model(atoms, packed_patches())
    for m, x in enumerate(atoms.values.split(ATOMS)):
        alone = model(GraphFeatures(x, torch.tensor([0, len(x)])), packed_patches([m]))
        mine = tokens.values[tokens.offsets[m] : tokens.offsets[m + 1]]
        torch.testing.assert_close(mine, alone.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_token_counts_are_what_forward_makes(name, options):
    model, patches = connector(name, **options), packed_patches()
    counts = {source: patches[source].patch_offsets.diff().tolist() for source in patches}
    tokens = model(features(), patches)
    assert model.token_counts(counts, len(ATOMS)) == tokens.offsets.diff().tolist()


def test_patches_at_capacity_change_nothing():
    model, patches = connector(**BOTH), packed_patches()
    spare = {
        name: p._replace(atom_offsets=F.pad(p.atom_offsets, (0, 4), value=int(p.atom_offsets[-1])))
        for name, p in patches.items()
    }
    tokens, loose = model(features(), patches), model(features(), spare)
    assert torch.equal(loose.offsets, tokens.offsets)
    exact = loose.values[: tokens.offsets[-1]]
    torch.testing.assert_close(exact, tokens.values, rtol=1e-5, atol=1e-6)


def test_no_molecules():
    model = connector(sum_tokens=2, **BOTH)
    nothing = GraphFeatures(torch.zeros(0, 10), torch.tensor([0]))
    tokens = model(nothing, packed_patches([]))
    assert tokens.values.shape == (0, 12)
    assert tokens.offsets.tolist() == [0]
    assert model.token_counts({"brics": [], "entropy": []}, 0) == []


def test_the_limit_keeps_the_first_dynamic_queries():
    limited, free = connector(max_dynamic=3, **BOTH), connector(**BOTH)
    free.load_state_dict(limited.state_dict())
    a, b = (model.queries(features(), packed_patches()) for model in (limited, free))
    for m in range(len(ATOMS)):
        mine = a.values[a.offsets[m] : a.offsets[m + 1]]
        assert torch.equal(mine, b.values[b.offsets[m] : b.offsets[m] + len(mine)])


def test_sum_keys_count_what_means_lose():
    """A molecule doubled has the same mean but twice the sum."""
    model = connector("qformer", sum_tokens=2)
    x = features().values[:4]
    keys = model.keys(GraphFeatures(torch.cat([x, x, x]), torch.tensor([0, 4, 12])))
    once, twice = keys.values.split([1 + 2 + 4, 1 + 2 + 8])
    torch.testing.assert_close(once[0], twice[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(2 * once[1:3], twice[1:3], rtol=1e-4, atol=1e-5)
    expected = model.sum_mlp(x).sum(0).unflatten(0, (2, -1)) / 16
    torch.testing.assert_close(once[1:3], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), CASES[2:3] + CASES[4:5] + CASES[6:7])
def test_gradients_reach_every_parameter_and_the_atoms(name, options):
    model, atoms = connector(name, **options), features()
    atoms.values.requires_grad_()
    model(atoms, packed_patches()).values.square().sum().backward()
    for name, parameter in model.named_parameters():
        # A constant shift of all keys moves no softmax.
        if not name.endswith("self.key.bias"):
            assert parameter.grad.abs().max() > 0, name
    assert (atoms.values.grad.abs().amax(1) > 0).all()


def test_gradients_equal_finite_differences():
    model = connector(layers=1, num_queries=1, **BOTH).double()
    for p in model.parameters():
        p.requires_grad_(False)
    atoms, patches = features(), packed_patches()
    anchors = model.query_tokens.data.clone().requires_grad_()
    weight = model.local_q_proj.weight.data.clone().requires_grad_()

    def tokens(values, anchors, weight):
        trained = {"query_tokens": anchors, "local_q_proj.weight": weight}
        graph = GraphFeatures(values, atoms.offsets)
        return torch.func.functional_call(model, trained, (graph, patches)).values.sum(1)

    inputs = (atoms.values.double().requires_grad_(), anchors, weight)
    assert torch.autograd.gradcheck(tokens, inputs, fast_mode=True)


def test_dropout_acts_in_training_only_and_follows_the_seed():
    model, atoms, patches = connector(dropout=0.5), features(), packed_patches()
    assert torch.equal(model(atoms, patches).values, model(atoms, patches).values)
    model.train()

    def run(seed):
        torch.manual_seed(seed)
        return model(atoms, patches).values

    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2))


def test_half_precision_connector_reads_full_precision_atoms():
    model = connector(**BOTH)
    exact = model(features(), packed_patches()).values
    rounded = model.bfloat16()(features(), packed_patches()).values
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_autocast():
    model = connector(sum_tokens=2, **BOTH)
    exact = model(features(), packed_patches()).values
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(features(), packed_patches()).values
    assert (rounded.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_parameter_names_and_default_sizes_are_the_published_ones():
    with torch.device("meta"):
        model = EDTFormer({"llm_width": 4096, "encoder_width": 512, "text_vocab_size": 31091})
    names = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {
        "query_tokens": (1, 32, 768),
        "ln_graph.weight": (512,),
        "local_q_proj.weight": (768, 512),
        "llm_proj.weight": (4096, 768),
        "Qformer.bert.embeddings.word_embeddings.weight": (31091, 768),
        "Qformer.bert.embeddings.position_embeddings.weight": (512, 768),
        "Qformer.bert.embeddings.LayerNorm.weight": (768,),
    }
    for n in range(12):
        layer = f"Qformer.bert.encoder.layer.{n}."
        for part in ("query", "key", "value"):
            expected[f"{layer}attention.self.{part}.weight"] = (768, 768)
            cross = (768, 768 if part == "query" else 512)
            expected[f"{layer}crossattention.self.{part}.weight"] = cross
        for part in ("attention", "crossattention"):
            expected[f"{layer}{part}.output.dense.weight"] = (768, 768)
            expected[f"{layer}{part}.output.LayerNorm.weight"] = (768,)
        for branch in ("", "_query"):
            expected[f"{layer}intermediate{branch}.dense.weight"] = (3072, 768)
            expected[f"{layer}output{branch}.dense.weight"] = (768, 3072)
            expected[f"{layer}output{branch}.LayerNorm.weight"] = (768,)
    assert {name: shape for name, shape in names.items() if name.endswith("bias")} == {
        name.replace("weight", "bias"): shape[:1]
        for name, shape in expected.items()
        if "embeddings.weight" not in name and name != "query_tokens"
    }
    assert {name: shape for name, shape in names.items() if not name.endswith("bias")} == expected


def test_static_default_has_cross_attention_in_every_second_layer():
    with torch.device("meta"):
        names = QFormer({"llm_width": 8}).state_dict()
    layers = {int(name.split(".")[4]) for name in names if "crossattention" in name}
    assert layers == {0, 2, 4, 6, 8, 10}
    assert not any("local_q_proj" in name or "word_embeddings" in name for name in names)


def test_weights_start_small():
    torch.manual_seed(0)
    model = EDTFormer({"llm_width": 64, "width": 64, "layers": 2, "heads": 4, "ffn": 128})
    for name, parameter in model.named_parameters():
        if name == "query_tokens" or (parameter.dim() == 2 and "LayerNorm" not in name):
            assert 0.015 < parameter.std().item() < 0.025, name


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_config_builds_the_same_connector(name, options):
    model = connector(name, **options)
    again = make_connector(json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert again.config == model.config == json.loads(json.dumps(model.config))
    assert again.patch_options == model.patch_options


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"name": "mlp"}, ValueError, r"known connector, 'edt_former', .*; got 'mlp'"),
        ({"name": "qformer"}, TypeError, "llm_width"),
        ({"name": "qformer", "llm_width": 8, "depth": 2}, TypeError, "depth"),
        (
            {"name": "qformer", "llm_width": 8, "heads": 7},
            ValueError,
            "multiple of heads 7, got 768",
        ),
        ({"name": "qformer", "llm_width": 8, "cross_attention_freq": 0}, ValueError, "at least 1"),
        ({"name": "edt_former", "llm_width": 8, "max_dynamic": -1}, ValueError, "max_dynamic"),
        (
            {"name": "edt_former", "llm_width": 8, "patch_reduce": "median"},
            ValueError,
            "patch_reduce must be one of .*got 'median'",
        ),
        (
            {"name": "edt_former", "llm_width": 8, "patches": {"sources": ["recap"]}},
            ValueError,
            "subset",
        ),
    ],
)
def test_config_errors(config, error, match):
    with pytest.raises(error, match=match):
        make_connector(config)


def test_missing_patches_are_named():
    model = connector(**BOTH)
    with pytest.raises(ValueError, match="source 'brics' that the connector reads, got 'entropy'"):
        model(features(), {"entropy": packed_patches()["entropy"]})
    with pytest.raises(ValueError, match=r"source 'brics'.*got none"):
        model.token_counts({}, 1)


def oracle(name: str) -> dict[str, torch.Tensor]:
    safetensors = pytest.importorskip("safetensors.torch")
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of the recorded published numbers) is not set")
    return safetensors.load_file(Path(os.environ["EDT_SHARED"], "oracles", f"{name}.safetensors"))


def load_published(model, state, **ln_graph: torch.Tensor) -> None:
    """Published weights; the file's heads and graph encoders have no place in a connector."""
    weights = read_tree(state, view="3d").parts["connector"] | ln_graph
    missing = model.load_state_dict(weights, strict=False)
    assert set(missing.missing_keys) == {"llm_proj.weight", "llm_proj.bias"}
    assert missing.unexpected_keys == []


BERT = {"width": 96, "layers": 4, "heads": 4, "ffn": 192, "llm_width": 8, "text_vocab_size": 91}


def test_static_equals_the_published_numbers_qformer_molca_q8():
    record = oracle("qformer_molca_q8")
    sizes = {"encoder_width": 48, "num_queries": 8, "text_positions": 128}
    model = QFormer({**BERT, **sizes}).eval()
    state = {k.removeprefix("state."): v for k, v in record.items() if k.startswith("state.")}
    ln_graph = {n: x for n, x in state.items() if n.startswith("ln_graph.")}
    load_published(model, state, **ln_graph)
    nodes = record["node_mask"].sum(1)
    queries = model.queries(GraphFeatures(torch.zeros(0, 48), torch.zeros(9).long()), {})
    hidden = model.Qformer(*queries, record["node"][record["node_mask"]], cut(nodes)).queries
    expected = record["query_last_hidden"].flatten(0, 1)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-4)


def published_edt() -> EDTFormer:
    sizes = {"encoder_width": 64, "text_positions": 224, "num_queries": 32}
    model = EDTFormer({**BERT, **sizes, **BOTH}).eval()
    load_published(model, oracle("edt_encoder_state"))
    return model


def test_edt_former_equals_the_published_numbers_edt_encoder_unimol():
    record, model = oracle("edt_encoder_unimol"), published_edt()
    nodes = record["enc.unimol.mask"].sum(1)
    atoms = [x[1 : n - 1] for x, n in zip(record["enc.unimol.node"], nodes, strict=True)]
    ids = {
        source: [
            F.pad(part, (0, len(x) - len(part)), value=int(part[-1]) if len(part) else 0)
            for part, x in zip(
                record[f"in.{source}_gids.flat"].split(record[f"in.{source}_gids.len"].tolist()),
                atoms,
                strict=True,
            )
        ]
        for source in ("brics", "entropy")
    }
    graph = GraphFeatures(torch.cat(atoms), cut([len(x) for x in atoms]))
    queries = model.queries(graph, {source: pack_patches(x) for source, x in ids.items()})
    mask = record["query_mask"]
    assert queries.offsets.tolist() == cut(mask.sum(1)).tolist()
    torch.testing.assert_close(queries.values, record["query_embeds"][mask], rtol=0, atol=1e-4)

    keys = record["enc.unimol.node_ln"][record["enc.unimol.mask"]]
    hidden = model.Qformer(*queries, keys, cut(nodes)).queries
    torch.testing.assert_close(hidden, record["last_hidden_state"][mask], rtol=0, atol=1e-4)


def test_the_text_branch_equals_the_published_numbers_edt_stage1_losses():
    record, model = oracle("edt_stage1_losses"), published_edt()
    mask = record["in.attention_mask"].bool()
    none = torch.zeros(len(mask) + 1, dtype=torch.int64)
    out = model.Qformer(
        torch.zeros(0, 96),
        none,
        torch.zeros(0, 64),
        none,
        record["in.input_ids"][mask],
        cut(mask.sum(1)),
    )
    torch.testing.assert_close(out.text, record["text_last_hidden"][mask], rtol=0, atol=1e-4)


def two_views() -> GraphFeatures:
    """Per molecule a first row that is no atom, the atoms of one view, then of another."""
    torch.manual_seed(3)
    values, rows, first, second = [], 0, [], []
    for n in ATOMS:
        values.append(torch.randn(1 + 2 * n, SIZE["encoder_width"]))
        first.append(torch.arange(n) + rows + 1)
        second.append(torch.arange(n) + rows + 1 + n)
        rows += 1 + 2 * n
    lengths = [1 + 2 * n for n in ATOMS]
    views = torch.cat(first), torch.cat(second)
    return GraphFeatures(torch.cat(values), cut(lengths), views)


@pytest.mark.parametrize("reduce", ["mean", "concat"])
def test_a_patch_is_the_same_atoms_in_every_view(reduce):
    found, both = two_views(), packed_patches()
    model = connector(view_reduce=reduce, num_views=2, **BOTH)
    queries = model.queries(found, both)
    rows = model.ln_graph(found.values)
    flat, spatial = (rows[view].split(ATOMS) for view in found.views)
    for m, (a, b) in enumerate(zip(flat, spatial, strict=True)):
        expected = [model.query_tokens[0]]
        for source in ("brics", "entropy"):
            ids = torch.tensor(IDS[source][m])
            for patch in ids.unique():
                views = a[ids == patch].mean(0), b[ids == patch].mean(0)
                joined = torch.cat(views) if reduce == "concat" else (views[0] + views[1]) / 2
                expected.append(model.local_q_proj(joined)[None])
        mine = queries.values[queries.offsets[m] : queries.offsets[m + 1]]
        torch.testing.assert_close(mine, torch.cat(expected))


def test_views_that_are_too_few_are_refused():
    model = connector(view_reduce="concat", num_views=2)
    with pytest.raises(ValueError, match="must have 2 views"):
        model.queries(features(), packed_patches())
    with pytest.raises(ValueError, match="view_reduce must be one of"):
        connector(view_reduce="sum")
    with pytest.raises(ValueError, match="num_views must be at least 1"):
        connector(num_views=0)


@pytest.mark.parametrize(
    ("anchors", "dynamic"),
    [(None, None), (3, None), (0, None), (None, 0), (2, 2), (0, 1), (0, 0)],
)
def test_a_budget_leaves_tokens_out(anchors, dynamic):
    """What is left out does not exist: the rest is as if it had never been there."""
    full, model = connector(**BOTH), connector(**BOTH)
    model.set_budget(anchors=anchors, dynamic=dynamic)
    found = model(features(), packed_patches())
    counts = {name: [len(set(ids)) for ids in molecules] for name, molecules in IDS.items()}
    expected = model.token_counts(counts, len(ATOMS))
    assert found.offsets.diff().tolist() == expected
    patches = [a + b for a, b in zip(counts["brics"], counts["entropy"], strict=True)]
    kept = 5 if anchors is None else anchors
    most = 99 if dynamic is None else dynamic
    assert expected == [kept + min(count, most) for count in patches]

    queries, all_queries = (m.queries(features(), packed_patches()) for m in (model, full))
    for m, (start, stop) in enumerate(zip(*queries.offsets.unfold(0, 2, 1).T, strict=True)):
        every = all_queries.values[all_queries.offsets[m] : all_queries.offsets[m + 1]]
        rest = torch.cat([every[:kept], every[5 : 5 + most]])
        torch.testing.assert_close(queries.values[start:stop], rest)
    again = make_connector(model.config)
    again.load_state_dict(full.state_dict())
    torch.testing.assert_close(
        again.eval()(features(), packed_patches()).values[: found.offsets[-1]],
        found.values[: found.offsets[-1]],
    )


def test_budgets_that_cannot_be():
    with pytest.raises(ValueError, match="anchor_budget must be from 0 to num_queries 5, got 6"):
        connector().set_budget(anchors=6)
    with pytest.raises(ValueError, match="max_dynamic must be at least 0, got -1"):
        connector().set_budget(dynamic=-1)
    with pytest.raises(TypeError, match="dynamic"):
        connector("qformer").set_budget(dynamic=1)
