"""The published EDT-Former: the recorded numbers, from SMILES to hidden states and losses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from edt_former.chem import read_as_written
from edt_former.connectors import PublishedEDTFormer
from edt_former.connectors.qformer import Rows
from edt_former.graph import Blended, GraphBatch, GraphEncoder, GraphFeatures, UniMol
from edt_former.tokens import pack_patches
from edt_former.tokens.published import predictor_from_gpt2
from edt_former.train.objectives import Negatives, RepresentationLearning
from edt_kernels import offsets_from_lengths
from tests.train import published_reference as reference

MOLECULES = {
    "ethanol": "CCO",
    "aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "caffeine": "Cn1c(=O)c2c(ncn2C)n(C)c1=O",
    "sodium acetate": "CC(=O)[O-].[Na+]",
    "deuterated methanol": "[2H]C([2H])([2H])O",
    "imatinib": "Cc1ccc(NC(=O)c2ccc(CN3CCN(C)CC3)cc2)cc1Nc1nccc(-c2cccnc2)n1",
    "alanine": "C[C@H](N)C(=O)O",
    "methane": "C",
}
ALL, LONGEST = range(8), 5
SPATIAL = {"layers": 4, "width": 64, "heads": 8, "ffn": 128}
SPATIAL |= {"special_tokens": True, "hydrogens": False}
BERT = {"width": 96, "layers": 4, "heads": 4, "ffn": 192, "llm_width": None}
BERT |= {"encoder_width": 64, "text_vocab_size": 91, "text_positions": 224}
RECORDS = {"edt_encoder_unimol": "3d", "edt_encoder_blend": "both"}


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def published(recorded):
    """Records, the weights, and the molecules at their places, as read from SMILES."""
    state, entropy = recorded("edt_encoder_state"), recorded("edt_entropy")
    gpt2 = {n.removeprefix("model."): x for n, x in entropy.items() if n.startswith("model.")}
    return SimpleNamespace(
        record={name: recorded(name) for name in (*RECORDS, "edt_encoder_blend_fp64")},
        state=state,
        predictor=predictor_from_gpt2(gpt2).eval(),
        molecules=[read_as_written(smiles) for smiles in MOLECULES.values()],
        places=state["coords.flat"].split(state["coords.len"].tolist()),
    )


def encoder(published, views: str) -> GraphEncoder:
    if views == "3d":
        model, prefix = UniMol(**SPATIAL), "graph_encoder.unimol."
    else:
        flat = {"name": "gin", "layers": 5, "width": 48}
        sizes = {"layers": 2, "width": 64, "heads": 4, "special_tokens": True}
        model, prefix = Blended(flat, SPATIAL, **sizes), ""
    model.load_state_dict({name: published.state[prefix + name] for name in model.state_dict()})
    return model.eval()


def connector(published, views: str) -> PublishedEDTFormer:
    model = PublishedEDTFormer({**BERT, "patches": {"encoder": views}})
    model.load_state_dict(
        {
            name: published.state[name.replace("ln_graph.", "ln_graph.unimol.")]
            for name in model.state_dict()
        }
    )
    return model.eval()


def batch(published, which) -> GraphBatch:
    places = [published.places[m].numpy() for m in which]
    return GraphBatch.pack([published.molecules[m] for m in which], places)


def patches(published, views: str, which):
    options = connector(published, views).patch_options
    found = options.find([published.molecules[m] for m in which], published.predictor)
    return {source: pack_patches(ids) for source, ids in found.items()}


def watched(model: PublishedEDTFormer) -> dict[str, torch.Tensor]:
    """Fills with what the parts of the connector compute, under the names of the record."""
    seen = {}

    def keep(name, pick=lambda out: out):
        return lambda module, _, out: seen.update({name: pick(out)})

    bert, rows = model.Qformer.bert, (lambda out: out[0].values)
    first = bert.encoder.layer[0].attention.self
    model.local_q_proj.register_forward_pre_hook(lambda _, x: seen.update(pooled=x[0]))
    model.local_q_proj.register_forward_hook(keep("local_q"))
    bert.embeddings.register_forward_hook(keep("embeddings_out"))
    first.key.register_forward_hook(keep("past_k0"))
    first.value.register_forward_hook(keep("past_v0"))
    for n, layer in enumerate(bert.encoder.layer):
        layer.register_forward_hook(keep(f"layer{n}", rows))
    return seen


@torch.no_grad()
def read(published, views: str, which, dtype=torch.float32) -> SimpleNamespace:
    """Everything between the molecules `which` and their last hidden states, packed."""
    model = connector(published, views).to(dtype)
    features = encoder(published, views).to(dtype)(batch(published, which))
    cuts, seen = patches(published, views, which), watched(model)
    queries = model.queries(features, cuts)
    hidden = model.read(features, cuts)
    return SimpleNamespace(features=features, queries=queries, hidden=hidden, **seen)


def heads_joined(recorded_keys: torch.Tensor) -> torch.Tensor:
    """[B, H, L, D] to [B, L, H * D]."""
    return recorded_keys.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("name", "views"), RECORDS.items(), ids=RECORDS)
def test_patches_equal_the_published_ones(published, name, views):
    record = published.record[name]
    found = patches(published, views, ALL)
    labels = record["pooled_labels.flat"].split(record["pooled_labels.len"].tolist())
    lengths = batch(published, ALL).offsets.diff()
    for m, expected in enumerate(labels):
        alone = patches(published, views, [m])
        ids = [alone[source].ids.unique() for source in ("brics", "entropy")]
        assert torch.equal(torch.cat(ids), expected), list(MOLECULES)[m]
    counts = sum(cut.patch_offsets.diff() for cut in found.values())
    assert counts.tolist() == record["pooled_mask"].sum(1).tolist()
    assert lengths.tolist() == published.state["coords.len"].tolist()


def test_every_level_equals_the_published_numbers_edt_encoder_unimol(published):
    """Nothing here depends on padding, so all eight molecules are compared."""
    record, found = published.record["edt_encoder_unimol"], read(published, "3d", ALL)
    mask, pooled = record["query_mask"], record["pooled_mask"]
    assert torch.equal(found.queries.offsets.diff(), mask.sum(1))
    close(found.features.values, record["enc.unimol.node"][record["enc.unimol.mask"]])
    close(found.pooled, record["pooled"][pooled])
    close(found.local_q, record["local_q"][pooled])
    close(found.queries.values, record["query_embeds"][mask])
    close(found.embeddings_out, record["embeddings_out"][mask])
    close(found.hidden.values, record["last_hidden_state"][mask])


def test_every_level_equals_the_published_numbers_edt_encoder_blend(published):
    """The longest molecule of the record has no padding before its last pooled row."""
    record, found = published.record["edt_encoder_blend"], read(published, "both", [LONGEST])
    mask, pooled = record["query_mask"][LONGEST], record["pooled_mask"][LONGEST]
    close(found.features.values, record["node"][LONGEST][record["node_mask"][LONGEST]])
    close(found.pooled, record["pooled"][LONGEST][pooled])
    close(found.local_q, record["local_q"][LONGEST][pooled])
    close(found.queries.values, record["query_embeds"][LONGEST][mask])
    close(found.embeddings_out, record["embeddings_out"][LONGEST][mask])
    for n in range(4):
        close(getattr(found, f"layer{n}"), record[f"layer{n}"][LONGEST][mask])
    close(found.hidden.values, record["last_hidden_state"][LONGEST][mask])


def test_float64_equals_the_published_numbers_edt_encoder_blend_fp64(published):
    record, exact = (published.record[f"edt_encoder_blend{kind}"] for kind in ("", "_fp64"))
    found = read(published, "both", [LONGEST], torch.float64)
    mask, pooled = record["query_mask"][LONGEST], record["pooled_mask"][LONGEST]
    close(found.pooled, exact["pooled"][LONGEST][pooled], atol=1e-5)
    close(found.hidden.values, exact["last_hidden_state"][LONGEST][mask], atol=1e-5)


def test_every_layer_equals_the_published_one_edt_encoder_blend(published):
    """All eight molecules, from the queries and rows that were recorded."""
    record, model = published.record["edt_encoder_blend"], connector(published, "both")
    mask, rows, seen = record["query_mask"], record["node_mask"], watched(model)
    queries = Rows(record["query_embeds"][mask], offsets_from_lengths(mask.sum(1)))
    features = GraphFeatures(record["node"][rows], offsets_from_lengths(rows.sum(1)))
    with torch.no_grad():
        hidden = model.Qformer(*queries, *model.keys(features)).queries
    for n in range(4):
        close(seen[f"layer{n}"], record[f"layer{n}"][mask])
    for name in ("past_k0", "past_v0"):
        close(seen[name], heads_joined(record[name])[mask])
    close(seen["embeddings_out"], record["embeddings_out"][mask])
    close(hidden, record["last_hidden_state"][mask])


def alone(record, m: int) -> dict[str, torch.Tensor]:
    """What the record holds of molecule m, without the padding that others cause."""
    found = {}
    for name in ("moleculestm", "unimol"):
        mask = record[f"enc.{name}.mask"][m]
        found[f"enc.{name}.node"] = record[f"enc.{name}.node"][m][mask][None]
        found[f"enc.{name}.mask"] = mask[mask][None]
    for source in ("brics", "entropy"):
        lengths = record[f"in.{source}_gids.len"]
        ids = record[f"in.{source}_gids.flat"].split(lengths.tolist())
        found[f"in.{source}_gids.flat"] = ids[m]
        found[f"in.{source}_gids.len"] = lengths[m : m + 1]
    return found


@pytest.mark.parametrize("m", ALL, ids=MOLECULES)
def test_a_molecule_is_what_the_published_program_makes_of_it_alone(published, m):
    """Against the rule written out in padded torch, which itself equals the record."""
    front = reference.blend(published.state, alone(published.record["edt_encoder_blend"], m))
    count = int(front.query_mask.sum())
    hidden = reference.transformer(
        published.state,
        front.queries,
        front.node,
        front.node_mask,
        None,
        front.query_mask[:, None],
    )
    found = read(published, "both", [m])
    assert found.queries.offsets.tolist() == [0, count]
    close(found.features.values, front.node[0], atol=5e-5)
    close(found.pooled, front.pooled[0], atol=5e-5)
    close(found.queries.values, front.queries[0, :count], atol=5e-5)
    close(found.hidden.values, hidden[0, :count], atol=5e-5)


def trainable(published):
    """The task of stage 1 over all of the product, and its parameters by their published names."""
    model, graph = connector(published, "both"), encoder(published, "both")
    options = {"embed_dim": 32, "begin_id": 90, "caption_position": 96, "matching": "anchors"}
    task = RepresentationLearning(model, **options).eval()
    state = {n.removeprefix("Qformer."): x for n, x in published.state.items()}
    heads = {n: state[n] for n in task.state_dict() if not n.startswith("connector.")}
    task.load_state_dict(heads, strict=False)
    parameters = dict(graph.named_parameters()) | dict(model.named_parameters())
    parameters |= {n: x for n, x in task.named_parameters() if n in heads}
    return graph, task, parameters


def test_losses_and_gradients_from_smiles_follow_the_published_rule_edt_stage1_losses(
    published, recorded
):
    """The padded reference, which equals the record, of molecules that are read one by one."""
    record, blended = recorded("edt_stage1_losses"), published.record["edt_encoder_blend"]
    ids, words = record["in.input_ids"], record["in.attention_mask"].bool()
    negatives = record["neg_graph_idx"], record["neg_text_idx"]
    names = [name.removeprefix("grad.") for name in record if name.startswith("grad.")]
    assert len(names) == 15
    leaves = dict(published.state)
    leaves |= {name: leaves[name].clone().requires_grad_() for name in names}
    fronts = [reference.blend(leaves, alone(blended, m)) for m in ALL]
    node, node_mask = (
        torch.nn.utils.rnn.pad_sequence([getattr(f, part)[0] for f in fronts], batch_first=True)
        for part in ("node", "node_mask")
    )
    queries, query_mask = (
        torch.cat([getattr(f, part) for f in fronts]) for part in ("queries", "query_mask")
    )
    rows = node, node_mask, queries, query_mask
    options = {"begin_id": 90, "first": 96, "padded_slots": False}
    expected = reference.stage1(leaves, *rows, ids, words, negatives, **options).losses
    gradients = torch.autograd.grad(sum(expected), [leaves[name] for name in names])

    graph, task, parameters = trainable(published)
    text = ids[words], offsets_from_lengths(words.sum(1))
    losses = task(
        graph(batch(published, ALL)),
        patches(published, "both", ALL),
        *text,
        negatives=Negatives(*negatives),
    )
    for found, wanted in zip(losses, expected, strict=True):
        close(found, wanted, atol=1e-5)
    found = torch.autograd.grad(losses.total, [parameters[name] for name in names])
    for name, mine, wanted in zip(names, found, gradients, strict=True):
        assert wanted.abs().max() > 1e-2, name
        close(mine, wanted, atol=1e-5)


BATCHES = [
    pytest.param(list(ALL), id="all"),
    pytest.param([*reversed(ALL)], id="reversed"),
    pytest.param([LONGEST, 7, 4], id="long-and-short"),
    pytest.param([3, 3, 0], id="twice"),
]


# Dense products round as their shapes have it: float64 shows that it is rounding and no more.
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float32, 5e-5), (torch.float64, 1e-10)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("views", RECORDS.values())
@pytest.mark.parametrize("which", BATCHES)
def test_a_molecule_is_the_same_in_every_batch(published, views, which, dtype, atol):
    together = read(published, views, which, dtype)
    model = connector(published, views).to(dtype)
    for at, m in enumerate(which):
        single = read(published, views, [m], dtype)
        for part in ("features", "queries", "hidden"):
            values, offsets = getattr(together, part)[:2]
            mine = values[offsets[at] : offsets[at + 1]]
            close(mine, getattr(single, part).values, atol=atol)
        # Pooling is a kernel of its own: of the same rows it makes the same numbers, bit by bit.
        values, offsets = together.features[:2]
        mine = values[offsets[at] : offsets[at + 1]]
        features = GraphFeatures(mine, torch.tensor([0, len(mine)]))
        seen = watched(model)
        model.queries(features, patches(published, views, [m]))
        start = sum(int(together.queries.offsets.diff()[i]) - 32 for i in range(at))
        assert torch.equal(seen["pooled"], together.pooled[start : start + len(seen["pooled"])])


def test_counts_of_tokens_are_known_before(published):
    model, record = connector(published, "both"), published.record["edt_encoder_blend"]
    found = patches(published, "both", ALL)
    counts = {source: cut.patch_offsets.diff().tolist() for source, cut in found.items()}
    assert model.token_counts(counts, 8) == record["query_mask"].sum(1).tolist()


def tiny(**options: object) -> PublishedEDTFormer:
    sizes = {"width": 16, "layers": 1, "heads": 2, "ffn": 16, "encoder_width": 4}
    return PublishedEDTFormer({"llm_width": 8, **sizes, **options}).eval()


def test_beyond_64_patches_the_last_entropy_patches_are_left_out():
    model, many = tiny(), pack_patches([list(range(50))])
    features = GraphFeatures(torch.randn(52, 4), torch.tensor([0, 52]))
    tokens = model(features, {"brics": many, "entropy": many})
    assert tokens.offsets.tolist() == [0, 96]
    assert model.token_counts({"brics": [50], "entropy": [50]}, 1) == [96]
    queries = model.queries(features, {"brics": many, "entropy": many}).values
    torch.testing.assert_close(queries[32:82], model.local_q_proj(features.values[1:51]))
    torch.testing.assert_close(queries[82:], queries[32:46])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"graph_token": True}, "graph_token must be False in the published EDT-Former, got True"),
        ({"sum_tokens": 2}, "sum_tokens must be 0 .* got 2"),
        ({"patch_reduce": "max"}, "patch_reduce must be 'mean' .* got 'max'"),
        ({"view_reduce": "concat"}, "view_reduce must be 'mean' .* got 'concat'"),
        ({"num_views": 2}, "num_views must be 1 .* got 2"),
    ],
)
def test_options_that_the_published_model_lacks(options, match):
    with pytest.raises(ValueError, match=match):
        tiny(**options)


def test_patches_of_other_rows_are_refused():
    features = GraphFeatures(torch.zeros(5, 4), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"of the 3 rows .* got 5 ids; does the graph encoder"):
        tiny()(features, {"brics": pack_patches([[0] * 5]), "entropy": pack_patches([[0] * 5])})
