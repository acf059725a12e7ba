"""The published cut: what it reads, what it numbers, and the recorded numbers of 65 molecules."""

import json
import os
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import edt_kernels
from edt_former.chem import Invalid, brics_fragments, rdkit_mol, read_as_written, read_molecule
from edt_former.tokens import NextAtomPredictor, PublishedPatchOptions, unpack_patches
from edt_former.tokens.predictor import EOS, PUBLISHED_ELEMENTS
from edt_former.tokens.published import entropy_ids, predictor_from_gpt2, read_tokens


@pytest.mark.parametrize(
    ("smiles", "tokens"),
    [
        pytest.param("", "", id="empty"),
        pytest.param("CCO", "C C O", id="ethanol"),
        pytest.param("c1cc[nH]c1", "C C C N C", id="aromatic"),
        pytest.param("ClCBr", "Cl C Br", id="two-letters"),
        pytest.param("[2H]C([2H])([2H])O", "C O", id="no-hydrogen"),
        pytest.param("[K+].[U].[W]", "", id="unknown"),
        pytest.param("[Cs+].[F-]", "C S F", id="two-for-one"),
        pytest.param("[Os].[Pb].[Nb].[In]", "O S P B N B I N", id="pieces"),
        pytest.param("[Ti].[As].[se]", "S S", id="lost-and-cut"),
        pytest.param("CSn1cccc1", "C Sn C C C C", id="across-atoms"),
        pytest.param("OCoc", "O Co C", id="cobalt"),
        pytest.param("[C@@H](N)[Se]C%12", "C N Se C", id="stereo-and-rings"),
    ],
)
def test_tokens(smiles, tokens):
    assert read_tokens(smiles) == tokens.split()


def test_every_token_is_in_the_vocabulary():
    letters = [chr(i) for i in range(32, 127)]
    pairs = {token for a in letters for b in letters for token in read_tokens(a + b)}
    assert pairs == set(PUBLISHED_ELEMENTS)


def predictor(**options) -> NextAtomPredictor:
    torch.manual_seed(0)
    sizes = {"layers": 1, "width": 16, "vocabulary": "published"}
    model = NextAtomPredictor({**sizes, **options}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_elements_without_a_token_read_as_the_end():
    model = predictor()
    assert model.tokens(torch.tensor([6, 47, 30, 0, 19, 118, -1, 200])).tolist() == [
        *(9, 3, 38),
        *[EOS] * 5,
    ]
    assert model(torch.tensor([6]), torch.tensor([0, 1])).shape == (1, 39)


def test_tokens_beyond_the_positions_have_no_id():
    model = predictor(positions=8)
    ids = entropy_ids(["C" * 20, "CCO"], model)
    assert [len(x) for x in ids] == [6, 3]
    assert entropy_ids(["C" * 6, "CCO"], model) == ids


def test_no_tokens_no_ids():
    model = predictor()
    assert entropy_ids([], model) == []
    assert entropy_ids(["[K+]", "", "C"], model) == [[], [], [0]]


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary 'published', got 'elements'"):
        entropy_ids(["CCO"], NextAtomPredictor({"layers": 1}))
    with pytest.raises(ValueError, match="'elements', 'published', got 'bpe'"):
        NextAtomPredictor({"vocabulary": "bpe"})


@pytest.mark.parametrize(
    ("smiles", "encoder", "rows"),
    [
        ("CCO", "both", 7),
        ("CCO", "3d", 3),
        ("[2H]C([2H])([2H])O", "both", 8),
        ("[2H]C([2H])([2H])O", "3d", 2),
        ("[H][H]", "both", 5),
        ("[H][H]", "3d", 2),
        ("[Cs+].[F-]", "3d", 2),
    ],
)
def test_every_pooled_row_has_an_id(smiles, encoder, rows):
    options = PublishedPatchOptions(encoder=encoder)
    molecule, model = read_as_written(smiles), predictor()
    found = options.find([molecule], model)
    assert list(found) == ["brics", "entropy"]
    given = {"brics": brics_fragments(molecule).tolist(), "entropy": entropy_ids([smiles], model)}
    given["entropy"] = given["entropy"][0] or [0]
    for source, (ids,) in found.items():
        expected = [given[source][min(i, len(given[source]) - 1)] for i in range(rows)]
        assert ids == expected, source


def test_ids_follow_the_string_as_it_was_written():
    options, model = PublishedPatchOptions(), predictor()
    written, canonical = "OC(=O)c1ccccc1OC(C)=O", "CC(=O)Oc1ccccc1C(=O)O"
    molecules = [read_as_written(written), read_molecule(written)]
    assert [m.smiles for m in molecules] == [written, canonical]
    expected = [brics_fragments(rdkit_mol(m)).tolist() for m in molecules]
    found = options.find(molecules, model)
    assert [ids[:13] for ids in found["brics"]] == expected
    assert expected[0] != expected[1]
    assert [x[:13] for x in found["entropy"]] == entropy_ids([written, canonical], model)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"encoder": "2d"}, "one of 'both', '3d', got '2d'"),
        ({"rule": "local_max"}, "no option 'rule', got 'local_max'"),
        ({"min_size": 2}, "no option 'min_size', got 2"),
        ({"sources": ("recap",)}, "subset"),
    ],
)
def test_options_that_the_published_program_lacks(options, match):
    with pytest.raises(ValueError, match=match):
        PublishedPatchOptions(**options)


def test_graph_data_alone_cannot_be_cut():
    molecule = read_as_written("CCO")
    nameless = type(molecule)("", *(getattr(molecule, n) for n in list(vars(molecule))[1:]))
    with pytest.raises(ValueError, match="need a molecule's SMILES"):
        PublishedPatchOptions().find([nameless], predictor())


def test_reading_as_written():
    molecule = read_as_written("OCC")
    assert molecule.elements.tolist() == [8, 6, 6]
    assert molecule.order.tolist() == [0, 1, 2]
    turned = read_molecule("OCC")
    assert (molecule.atom_features[turned.order] == turned.atom_features).all()
    assert read_as_written("C1CC") == Invalid("C1CC", "unclosed ring")
    assert "more than max_atoms=2" in read_as_written("CCC", max_atoms=2).reason
    assert "must be a SMILES string, got int" in read_as_written(3).reason


@pytest.fixture(scope="module")
def record():
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of the recorded published numbers) is not set")
    safetensors = pytest.importorskip("safetensors.torch")
    folder = Path(os.environ["EDT_SHARED"], "oracles")
    tensors = safetensors.load_file(folder / "edt_entropy.safetensors")
    molecules = json.loads((folder / "edt_entropy.json").read_text())["molecules"]
    assert len(molecules) == 65
    weights = {n.removeprefix("model."): x for n, x in tensors.items() if n.startswith("model.")}
    return tensors, molecules, predictor_from_gpt2(weights).eval()


def elements(molecule) -> list[int]:
    return [PUBLISHED_ELEMENTS[token] for token in read_tokens(molecule["smiles"])]


def test_tokens_and_ids_equal_the_published_ones_edt_entropy(record):
    _, molecules, model = record
    for molecule in molecules:
        assert read_tokens(molecule["smiles"]) == molecule["atom_tokens"], molecule["name"]
        tokens = model.tokens(torch.tensor(elements(molecule), dtype=torch.int64))
        assert [1, *tokens.tolist(), 2][:512] == molecule["ids"], molecule["name"]


def test_logits_equal_the_published_numbers_edt_entropy(record):
    tensors, molecules, model = record
    chosen = [elements(molecules[i])[:510] for i in tensors["logits_index"]]
    lengths = torch.tensor([len(x) for x in chosen])
    offsets = edt_kernels.offsets_from_lengths(lengths)
    logits = model(torch.tensor(list(chain(*chosen))), offsets, end=True)
    for part, expected in zip(logits.split((lengths + 1).tolist()), tensors["logits"], strict=True):
        torch.testing.assert_close(part, expected[: len(part)], rtol=0, atol=1e-4)


def test_entropies_thresholds_and_ids_equal_the_published_ones_edt_entropy(record):
    _, molecules, model = record
    numbers = [elements(molecule)[:510] for molecule in molecules]
    lengths = torch.tensor([len(x) for x in numbers])
    offsets = edt_kernels.offsets_from_lengths(lengths)
    packed = torch.tensor(list(chain(*numbers)))
    bits = edt_kernels.entropy(model(packed, offsets, end=True), unit="bits")
    after = []
    for molecule, found in zip(molecules, bits.split((lengths + 1).tolist()), strict=True):
        expected = torch.tensor(molecule["entropies_bits_all"])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        after.append(found[1:])
    for q in ("0.5", "0.75", "0.9"):
        patches = edt_kernels.find_patches(
            torch.cat(after), offsets, rule="rising_edge", q=float(q)
        )
        ids = unpack_patches(patches, offsets)
        for i, molecule in enumerate(molecules):
            assert (ids[i] or [0]) == molecule["q"][q]["gids"], (molecule["name"], q)
            if ids[i]:
                threshold = molecule["q"][q]["threshold"]
                assert abs(patches.threshold[i].item() - threshold) < 1e-4
    published = entropy_ids([molecule["smiles"] for molecule in molecules], model)
    assert [x or [0] for x in published] == [m["q"]["0.75"]["gids"] for m in molecules]


def test_ids_equal_the_published_ones_and_the_rest_is_reported_edt_brics(record):
    folder = Path(os.environ["EDT_SHARED"], "oracles")
    molecules = json.loads((folder / "edt_brics.json").read_text())["molecules"]
    invalid = []
    for molecule in molecules:
        read = read_as_written(molecule["smiles"])
        if isinstance(read, Invalid):
            invalid.append(molecule["name"])
            assert molecule["brics_gids"] is None
            assert read.reason
        else:
            assert brics_fragments(read).tolist() == molecule["brics_gids"], molecule["name"]
    assert invalid == ["invalid_ring", "invalid_valence"]


def test_weights_that_are_no_gpt2_of_this_kind(record):
    tensors, _, _ = record
    weights = {n.removeprefix("model."): x for n, x in tensors.items() if n.startswith("model.")}
    with pytest.raises(ValueError, match=r"do not fit .*: ln_f.bias"):
        predictor_from_gpt2({n: x for n, x in weights.items() if n != "transformer.ln_f.bias"})
    with pytest.raises(ValueError, match="must be tied"):
        predictor_from_gpt2({**weights, "lm_head.weight": weights["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match=r"must hold wte.weight, got none"):
        predictor_from_gpt2({})
    wide = {**weights, "transformer.wte.weight": F.pad(weights["transformer.wte.weight"], (0, 2))}
    with pytest.raises(ValueError, match="do not fit"):
        predictor_from_gpt2({n: x for n, x in wide.items() if n != "lm_head.weight"})
