"""The losses of stage 1: by hand, against the published numbers, and their promises."""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from edt_former.chem import read_as_written
from edt_former.connectors import EDTFormer, QFormer
from edt_former.connectors.qformer import Rows
from edt_former.graph import GraphBatch, GraphFeatures, PretrainGNN
from edt_former.released import read_tree
from edt_former.tokens import pack_patches
from edt_former.train.objectives import (
    Negatives,
    RepresentationLearning,
    caption_loss,
    contrast_loss,
    draw_negatives,
    take_rows,
)
from tests.train import published_reference as published

SIZE = {"width": 16, "layers": 2, "heads": 2, "ffn": 24, "encoder_width": 6, "llm_width": None}
WORDS, ATOMS, IDS = [4, 1, 6], [3, 5, 1], [[0, 0, 1], [0, 1, 1, 2, 2], [0]]


def cut(lengths) -> torch.Tensor:
    return F.pad(torch.as_tensor(lengths).cumsum(0), (1, 0))


def task(seed: int = 0, **options) -> RepresentationLearning:
    torch.manual_seed(seed)
    connector = EDTFormer({**SIZE, "num_queries": 4, "text_vocab_size": 30, "text_positions": 20})
    model = RepresentationLearning(connector, embed_dim=5, begin_id=1, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(molecules=(0, 1, 2)):
    torch.manual_seed(1)
    atoms = torch.randn(sum(ATOMS), SIZE["encoder_width"]).split(ATOMS)
    words = torch.randint(2, 30, (sum(WORDS),)).split(WORDS)
    features = GraphFeatures(
        torch.cat([atoms[m] for m in molecules]), cut([ATOMS[m] for m in molecules])
    )
    patches = {"entropy": pack_patches([IDS[m] for m in molecules])}
    text = torch.cat([words[m] for m in molecules]), cut([WORDS[m] for m in molecules])
    return features, patches, *text


def turned(negatives: Negatives, order: list[int]) -> Negatives:
    """The same pairs after the molecules have taken another order."""
    place = torch.tensor(order).argsort()
    return Negatives(*(place[part[torch.tensor(order)]] for part in negatives))


def test_the_order_of_the_batch_changes_nothing():
    model, negatives = task(), Negatives(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
    losses = model(*batch(), negatives=negatives)
    again = model(*batch((2, 0, 1)), negatives=turned(negatives, [2, 0, 1]))
    for a, b in zip(losses, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.total, sum(losses))


def test_contrast_by_hand():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    rows = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))]
    columns = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-2))]
    expected = (sum(rows) / 2 + sum(columns) / 2) / 2
    assert contrast_loss(logits).item() == pytest.approx(expected, rel=1e-6)


def test_similarity_is_the_best_query():
    model = task()
    graph = Rows(F.normalize(torch.randn(5, 5), dim=-1), torch.tensor([0, 2, 5]))
    text = F.normalize(torch.randn(2, 5), dim=-1)
    found = model.similarities(graph, text)
    for i, part in enumerate(graph.values.split([2, 3])):
        for j in range(2):
            best = max(float(query @ text[j]) for query in part) / 0.1
            assert found[i, j].item() == pytest.approx(best, rel=1e-5)


def test_captioning_by_hand():
    """Every word but the first, (1 - s) of the mass on it and s / V on every word."""
    torch.manual_seed(0)
    logits, text = (
        torch.randn(6, 4),
        Rows(torch.tensor([3, 1, 2, 0, 0, 3]), torch.tensor([0, 3, 4, 6])),
    )
    log_p = logits.log_softmax(1)
    pairs = [(0, 1), (1, 2), (4, 3)]
    smooth = [-(0.9 * log_p[i, word] + 0.1 * log_p[i].mean()) for i, word in pairs]
    torch.testing.assert_close(caption_loss(logits, text), sum(smooth) / 3)
    exact = [-log_p[i, word] for i, word in pairs]
    torch.testing.assert_close(caption_loss(logits, text, 0.0), sum(exact) / 3)


def test_captioning_is_the_teacher_forced_likelihood():
    """Logits of a text that goes on are those of the text that ends there."""
    model = task()
    features, patches, ids, offsets = batch()
    queries, keys = model.connector.queries(features, patches), model.connector.keys(features)
    _, full = model.caption(queries, keys, Rows(ids, offsets))
    shorter = torch.cat([ids[:2], ids[4:]])
    _, short = model.caption(queries, keys, Rows(shorter, cut([2, 1, 6])))
    torch.testing.assert_close(full[[0, 1, *range(4, 11)]], short, rtol=1e-5, atol=1e-5)
    changed = model.caption(queries, keys, Rows(ids.index_fill(0, offsets[:-1], 7), offsets))
    assert torch.equal(changed[1], full), "the first word is replaced by begin_id"


def test_captioning_leaves_the_queries_alone():
    model = task()
    features, patches, ids, offsets = batch()
    queries, keys = model.connector.queries(features, patches), model.connector.keys(features)
    hidden, _ = model.caption(queries, keys, Rows(ids, offsets))
    alone = model.connector.read(features, patches).values
    torch.testing.assert_close(hidden.values, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("matching", ["all", "anchors"])
def test_matching_judges_every_pair_as_if_alone(matching):
    model = task(matching=matching)
    negatives = Negatives(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
    features, patches, ids, offsets = batch()
    queries, keys = model.connector.queries(features, patches), model.connector.keys(features)
    loss = model.matching_loss(queries, keys, Rows(ids, offsets), negatives)
    graphs, texts = [0, 1, 2, 1, 2, 0, 0, 1, 2], [0, 1, 2, 0, 1, 2, 2, 0, 1]
    logits = []
    for g, t in zip(graphs, texts, strict=True):
        one, cuts, _, _ = batch((g,))
        text = Rows(*batch((t,))[2:])
        read = (
            model.connector.anchors()
            if matching == "anchors"
            else model.connector.queries(one, cuts).values
        )
        keys = model.connector.keys(one)
        out = model.connector.Qformer(read, torch.tensor([0, len(read)]), *keys, *text)
        logits.append(model.gtm_head(out.queries).mean(0, keepdim=True))
    expected = F.cross_entropy(torch.cat(logits), torch.tensor([1] * 3 + [0] * 6))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_matching_teaches_dynamic_queries_unless_anchors_alone_match():
    negatives = Negatives(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
    for matching, learns in (("all", True), ("anchors", False)):
        model = task(matching=matching)
        model(*batch(), negatives=negatives).matching.backward()
        gradient = model.connector.local_q_proj.weight.grad
        assert (gradient is not None and bool(gradient.any())) is learns


def test_negatives_are_others_and_follow_the_likeness():
    torch.manual_seed(0)
    logits = torch.zeros(4, 4)
    logits[0, 2] = logits[3, 1] = 20.0
    drawn = [draw_negatives(logits) for _ in range(200)]
    for negatives in drawn:
        for part in negatives:
            assert (part != torch.arange(4)).all()
    assert sum(n.texts[0].item() == 2 for n in drawn) > 195, "the text most like graph 0"
    assert sum(n.graphs[1].item() == 3 for n in drawn) > 195, "the graph most like text 1"
    assert {n.texts[1].item() for n in drawn} == {0, 2, 3}
    generator = torch.Generator().manual_seed(3)
    a = draw_negatives(logits, generator)
    b = draw_negatives(logits, generator.manual_seed(3))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_parameter_learns_and_gradients_equal_finite_differences():
    model = task()
    negatives = Negatives(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
    model(*batch(), negatives=negatives).total.backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("self.key.bias"):  # a constant shift of all keys moves no softmax
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name

    model = task().double()
    features, patches, ids, offsets = batch()
    values = features.values.double().requires_grad_()
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def total(values):
        graph = GraphFeatures(values, features.offsets)
        return model(graph, patches, ids, offsets, negatives=negatives).total

    assert torch.autograd.gradcheck(total, (values,), fast_mode=True)


def test_errors():
    model = task()
    features, patches, ids, offsets = batch()
    with pytest.raises(ValueError, match="got 2 texts and 3 molecules"):
        model(features, patches, ids, offsets[:-1])
    with pytest.raises(ValueError, match="two or more; got 1 texts and 1 molecules"):
        model(*batch((0,)))
    with pytest.raises(ValueError, match="must have a text branch"):
        RepresentationLearning(QFormer(SIZE))
    with pytest.raises(ValueError, match="matching must be 'all' or 'anchors', got 'some'"):
        task(matching="some")


def oracle(name: str) -> dict[str, torch.Tensor]:
    safetensors = pytest.importorskip("safetensors.torch")
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of the recorded published numbers) is not set")
    return safetensors.load_file(Path(os.environ["EDT_SHARED"], "oracles", f"{name}.safetensors"))


BERT = {"width": 96, "layers": 4, "heads": 4, "ffn": 192, "llm_width": None, "text_vocab_size": 91}


def published_task(state, connector, **options) -> RepresentationLearning:
    """The task with published weights; the encoders' and derived entries have no place in it."""
    model = RepresentationLearning(connector, embed_dim=32, begin_id=90, **options).eval()
    parts = read_tree(state).parts
    found = {f"connector.{name}": value for name, value in parts["connector"].items()}
    left = model.load_state_dict(found | parts["heads"], strict=False)
    assert set(left.missing_keys) <= {"connector.ln_graph.weight", "connector.ln_graph.bias"}
    assert left.unexpected_keys == []
    return model


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def padded():
    """The padded reference, which has to equal every recorded number first."""
    state, record = oracle("edt_encoder_state"), oracle("edt_stage1_losses")
    leaves = {
        name: value.clone().requires_grad_() if value.is_floating_point() else value
        for name, value in state.items()
    }
    front = published.blend(leaves, oracle("edt_encoder_blend"))
    negatives = record["neg_graph_idx"], record["neg_text_idx"]

    def run(**options):
        ids, mask = record["in.input_ids"], record["in.attention_mask"].bool()
        out = published.stage1(
            leaves, *front[:2], *front[3:5], ids, mask, negatives, begin_id=90, first=96, **options
        )
        names = [name for name in leaves if leaves[name].is_floating_point()]
        grads = torch.autograd.grad(
            sum(out.losses), [leaves[n] for n in names], retain_graph=True, allow_unused=True
        )
        return out, dict(zip(names, grads, strict=True))

    return record, leaves, front, run


def test_the_padded_reference_equals_the_published_numbers_edt_stage1_losses(padded):
    record, _, front, run = padded
    out, grads = run()
    blended = oracle("edt_encoder_blend")
    close(front.node, blended["node"])
    close(front.pooled, blended["pooled"])
    close(front.queries, blended["query_embeds"])
    for n, pair in enumerate(front.blocks):
        close(pair[0], blended[f"blend.block{n}.f2d"])
        close(pair[1], blended[f"blend.block{n}.f3d"])
    for loss, name in zip(out.losses, ("gtc", "gtm", "lm"), strict=True):
        close(loss, record[f"loss_{name}"])
    close(out.similarity, record["logits_g2t"])
    close(out.similarity.T, record["logits_t2g"])
    names = [name.removeprefix("grad.") for name in record if name.startswith("grad.")]
    assert len(names) == 15
    for name in names:
        close(grads[name], record[f"grad.{name}"], atol=1e-5)


def test_losses_and_gradients_equal_the_published_ones_edt_stage1_losses(padded):
    """Recorded numbers where padding has no part in them, else the reference without padding."""
    record, leaves, front, run = padded
    connector = EDTFormer(
        {**BERT, "encoder_width": 64, "text_positions": 224, "patches": {"sources": ["brics"]}}
    )
    state = {name: value.detach() for name, value in leaves.items()}
    model = published_task(state, connector, caption_position=96, matching="anchors")
    mask = record["query_mask"]
    words = record["in.attention_mask"].bool()
    text = Rows(record["in.input_ids"][words], cut(words.sum(1)))
    queries = Rows(front.queries[mask], cut(mask.sum(1)))
    keys = Rows(front.node[front.node_mask], cut(front.node_mask.sum(1)))
    negatives = Negatives(record["neg_graph_idx"], record["neg_text_idx"])

    hidden, logits = model.caption(queries, keys, text)
    close(hidden.values, record["query_last_hidden"][mask])
    close(logits, record["lm_logits"][words], atol=2e-4)
    graph, features = model.graph_features(hidden), model.text_features(text)
    close(graph.values, record["graph_feats"][mask])
    close(features, record["text_feats"])
    similarity = model.similarities(graph, features)
    every = record["graph_feats"] @ record["text_feats"].T / 0.1
    close(similarity, every.masked_fill(~mask[..., None], -torch.inf).amax(1))
    # What the recorded slots of padding add makes the recorded contrast of it.
    padding = every.masked_fill(mask[..., None], -torch.inf).amax(1)
    close(torch.maximum(similarity, padding), record["logits_g2t"])
    close(torch.maximum(similarity, padding).T, record["logits_t2g"])
    close(contrast_loss(torch.maximum(similarity, padding)), record["loss_gtc"])
    assert (similarity > padding).sum() > 55, "padding wins in few pairs only"

    own = torch.arange(8)
    graphs, texts = torch.cat([own, negatives.graphs, own]), torch.cat([own, own, negatives.texts])
    read = [front.node[g][front.node_mask[g]] for g in graphs]
    said = [record["in.input_ids"][t][words[t]] for t in texts]
    pairs = (Rows(torch.cat(x), cut([len(part) for part in x])) for x in (read, said))
    by_anchor = []
    model.gtm_head.register_forward_hook(lambda _, __, out: by_anchor.append(out))
    close(model.matching_logits(queries, *pairs), record["gtm_logits"])
    close(by_anchor[0].unflatten(0, (24, 32)), record["gtm_token_logits"])

    reference, expected = run(padded_slots=False)
    losses = model.losses(queries, keys, text, negatives=negatives)
    close(losses.contrast, reference.losses[0])
    close(losses.matching, record["loss_gtm"])
    close(losses.captioning, record["loss_lm"])
    close(losses.total - losses.contrast, record["loss"] - record["loss_gtc"])
    losses.total.backward()
    mine = dict(model.named_parameters())
    for name in [key.removeprefix("grad.") for key in record if key.startswith("grad.")]:
        # What lies before the transformer is the reference's, the anchors of matching are ours.
        own = [mine[n] for n in (f"connector.{name}", name) if n in mine]
        parts = [x.grad for x in (leaves[name], *own) if x.grad is not None]
        close(sum(parts), expected[name], atol=1e-5)


def test_weights_of_negatives_equal_the_published_ones_edt_stage1_losses(monkeypatch):
    record, seen = oracle("edt_stage1_losses"), []
    draw = torch.multinomial
    monkeypatch.setattr(
        torch,
        "multinomial",
        lambda weights, *a, **k: seen.append(weights) or draw(weights, *a, **k),
    )
    draw_negatives(record["logits_g2t"])
    # Graphs are drawn for texts, by their likeness to the text; and the other way round.
    for found, name in zip(seen, ("t2g", "g2t"), strict=True):
        close(found, record[f"neg_weights_{name}"], atol=1e-6)


MOLCA = ["C", "CC", "CC(=O)Oc1ccccc1C(=O)O", "Cn1c(=O)c2c(ncn2C)n(C)c1=O", "CC(=O)[O-].[Na+]"]
MOLCA += ["C[C@H](N)C(=O)O", "Cc1ccc(NC(=O)c2ccc(CN3CCN(C)CC3)cc2)cc1Nc1nccc(-c2cccnc2)n1"]
MOLCA += ["c1ccccc1"]


def test_static_losses_equal_the_published_ones_qformer_molca_q8():
    """From SMILES; without dynamic queries nothing is padded, so all numbers are the recorded."""
    record = oracle("qformer_molca_q8")
    state = {k.removeprefix("state."): v for k, v in record.items() if k.startswith("state.")}
    sizes = {"encoder_width": 48, "num_queries": 8, "text_positions": 128}
    connector = QFormer({**BERT, **sizes, "cross_attention_freq": 2})
    model = published_task(state, connector)
    norm = {name: state[f"ln_graph.{name}"] for name in ("weight", "bias")}
    connector.ln_graph.load_state_dict(norm)
    encoder = PretrainGNN("gin", layers=3, width=48, self_loop=0).eval()
    encoder.load_state_dict({k: state[f"graph_encoder.{k}"] for k in encoder.state_dict()})
    molecules = [read_as_written(smiles) for smiles in MOLCA]
    features = encoder(GraphBatch.pack(molecules, features=encoder.features))
    nodes, words = record["node_mask"], record["in.attention_mask"].bool()
    text = Rows(record["in.input_ids"][words], cut(words.sum(1)))

    queries, keys = connector.queries(features, {}), connector.keys(features)
    assert torch.equal(keys.offsets.diff(), nodes.sum(1))
    close(keys.values, record["node"][nodes])
    hidden, logits = model.caption(queries, keys, text)
    close(hidden.values, record["query_last_hidden"].flatten(0, 1))
    close(connector.read(features, {}).values, record["query_last_hidden"].flatten(0, 1))
    close(logits, record["lm_logits"][words])
    close(model.graph_features(hidden).values, record["graph_feats"].flatten(0, 1))
    close(model.text_features(text), record["text_feats"])
    negatives = Negatives(record["neg_graph_idx"], record["neg_text_idx"])
    losses = model(features, {}, *text, negatives=negatives)
    for loss, name in zip(losses, ("itc", "itm", "lm"), strict=True):
        close(loss, record[f"loss_{name}"])
    close(losses.total, record["loss"])

    own = torch.arange(8)
    graphs, texts = torch.cat([own, negatives.graphs, own]), torch.cat([own, own, negatives.texts])
    read = [record["node"][g][nodes[g]] for g in graphs]
    said = [record["in.input_ids"][t][words[t]] for t in texts]
    pairs = (Rows(torch.cat(x), cut([len(part) for part in x])) for x in (read, said))
    by_anchor = []
    model.gtm_head.register_forward_hook(lambda _, __, out: by_anchor.append(out))
    logits = model.matching_logits(take_rows(queries, graphs), *pairs)
    close(by_anchor[0].unflatten(0, (24, 8)), record["gtm_token_logits"])
    close(logits[:8, 1], record["compute_gtm_positive_logit"])
