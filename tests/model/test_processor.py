from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rdkit import Chem
from transformers import AutoProcessor

from edt_former import processor as processor_module
from edt_former.chem import (
    Conformer,
    ConformerOptions,
    ConformerPool,
    Invalid,
    make_conformer,
    read_molecule,
)
from edt_former.graph import GraphBatch
from edt_former.processor import MoleculeProcessor, PatchSets, as_molecule
from edt_former.tokens import pack_patches

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
MOL = 19


@pytest.fixture
def make_processor(make_parts, make_tokenizer):
    def make(connector: str = "qformer", **options: object) -> MoleculeProcessor:
        _, _, made, predictor = make_parts(connector=connector)
        return MoleculeProcessor(make_tokenizer(), made, predictor, **options)

    return make


def test_each_mark_becomes_as_many_placeholders_as_the_molecule_has_tokens(make_processor):
    inputs = make_processor()(["<mol> how many", "yes", "<mol> no <mol>"], ["C", "CC", "CCC"])
    assert inputs["input_ids"].tolist() == [
        [0, 0, 1, MOL, MOL, MOL, 6, 7],
        [0, 0, 0, 0, 0, 0, 1, 13],
        [1, MOL, MOL, MOL, 14, MOL, MOL, MOL],
    ]
    assert inputs["attention_mask"].tolist() == [
        [0, 0, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 1, 1],
        [1] * 8,
    ]
    assert inputs["molecule_counts"].tolist() == [1, 0, 2]
    assert inputs["graph"].offsets.tolist() == [0, 1, 3, 6]
    assert dict(inputs["patches"]) == {}


def test_the_number_of_placeholders_follows_the_patches(make_processor):
    processor = make_processor("edt_former_brics")
    inputs = processor("<mol>", ASPIRIN)
    patches = dict(inputs["patches"])
    assert list(patches) == ["brics", "entropy"]
    count = sum(int(p.count) for p in patches.values())
    assert int(patches["brics"].count) == 4
    assert (inputs["input_ids"] == MOL).sum() == 1 + count
    assert processor.token_counts([ASPIRIN]) == [1 + count]


def test_patches_are_those_of_the_predictor_new_or_remembered(make_processor):
    processor = make_processor("edt_former")
    molecules = [ASPIRIN, "OCC", "[Na+]", "CCO", "c1ccc2ccccc2c1"]
    first = processor("<mol>" + " <mol>" * 4, molecules)
    graph = GraphBatch.pack([read_molecule(s) for s in molecules])
    options = processor.patch_options.cutting()
    _, expected = processor.predictor.patches(graph.elements, graph.offsets, **options)
    processor.predictor.patches = None
    again = processor("<mol>" + " <mol>" * 4, molecules)
    for found in (first["patches"]["entropy"], again["patches"]["entropy"]):
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.patch_offsets, expected.patch_offsets)
        assert torch.equal(found.atom_offsets, expected.trim().atom_offsets)


def test_the_least_recently_used_patches_are_forgotten(make_processor):
    processor = make_processor("edt_former", cache_size=2)
    for smiles in ("C", "CC", "C", "CCC"):
        processor("<mol>", smiles)
    assert list(processor._cache) == ["C", "CCC"]
    many = processor("<mol>" * 3, ["CCCC", "CCCCC", "CCCCCC"])
    assert many["molecule_counts"].tolist() == [3]
    assert len(processor._cache) == 2


class Crossed(OrderedDict):
    """A memory of which another thread forgets everything at once."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.clear()


def test_what_another_thread_forgets_is_found_again(make_processor):
    processor = make_processor("edt_former")
    expected = processor("<mol> <mol>", ["CCO", "CCN"])["input_ids"]
    processor._cache = Crossed()
    for _ in range(2):
        assert torch.equal(processor("<mol> <mol>", ["CCO", "CCN"])["input_ids"], expected)


def test_a_molecule_may_come_in_any_form(make_processor):
    ethanol = read_molecule("OCC")
    data = SimpleNamespace(
        x=torch.tensor(ethanol.atom_features),
        edge_index=torch.tensor(ethanol.bond_index[:, [3, 1, 0, 2]]),
        edge_attr=torch.tensor(ethanol.bond_features[[3, 1, 0, 2]]),
    )
    named = SimpleNamespace(**vars(data), smiles="OCC")
    forms = ["OCC", Chem.MolFromSmiles("OCC"), ethanol, data, named]
    expected = GraphBatch.pack([ethanol])
    for form in forms:
        graph = make_processor()("<mol>", form)["graph"]
        for name, value in vars(expected).items():
            found = getattr(graph, name)
            assert found is value is None or torch.equal(found, value), name
    assert as_molecule(data).smiles == ""
    assert as_molecule(named).smiles == "CCO"


def test_selfies_are_read_behind_their_mark_or_by_option(make_processor):
    pytest.importorskip("selfies")
    assert as_molecule("selfies:[C][C][O]").smiles == "CCO"
    graph = make_processor()("<mol>", "[C][C][O]", selfies=True)["graph"]
    assert graph.elements.tolist() == [6, 6, 8]


def test_graph_data_without_smiles_has_no_brics_patches(make_processor):
    ethanol = read_molecule("OCC")
    data = SimpleNamespace(
        x=ethanol.atom_features, edge_index=ethanol.bond_index, edge_attr=ethanol.bond_features
    )
    same = make_processor("edt_former")(["<mol>"] * 2, ["CCO", data])
    assert torch.equal(same["input_ids"][0], same["input_ids"][1])
    with pytest.raises(ValueError, match="BRICS patches need a molecule's SMILES"):
        make_processor("edt_former_brics")("<mol>", data)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"x": np.zeros((3, 2), int)}, r"x must have shape \[n, 9\], got \(3, 2\)"),
        ({"x": np.full((3, 9), 9)}, "x must hold values from 0 to 3 in column 1, got 9 for atom 0"),
        ({"edge_index": np.array([[0, 1, 1, 2], [1, 0, 0, 1]])}, r"got \(1, 0\) twice"),
        ({"edge_attr": None}, r"edge_attr must have shape \[n, 3\], got \(\)"),
        ({"ptr": torch.tensor([0, 1, 3])}, "must hold one molecule, got a batch of 2"),
    ],
)
def test_graph_data_that_cannot_be_right_is_refused(make_processor, changed, reason):
    ethanol = read_molecule("OCC")
    good = {
        "x": ethanol.atom_features,
        "edge_index": ethanol.bond_index,
        "edge_attr": ethanol.bond_features,
    }
    with pytest.raises(ValueError, match=f"molecule 0 .*{reason}"):
        make_processor()("<mol>", SimpleNamespace(**good | changed))


def test_molecules_may_be_an_array(make_processor):
    processor, texts = make_processor(), ["<mol> how", "<mol> many"]
    array = processor(texts, np.array(["C", "CCO"], dtype=object))
    assert torch.equal(array["input_ids"], processor(texts, ["C", "CCO"])["input_ids"])


def test_answers_are_labels_and_rows_are_padded_on_the_right(make_processor):
    inputs = make_processor()(["<mol> how", "many"], ["C"], answers=["3", "yes no"])
    assert inputs["input_ids"].tolist() == [
        [1, MOL, MOL, MOL, 6, 18, 2],
        [1, 7, 13, 14, 2, 0, 0],
    ]
    assert inputs["labels"].tolist() == [
        [-100, -100, -100, -100, -100, 18, 2],
        [-100, -100, 13, 14, 2, -100, -100],
    ]
    left = make_processor()(["<mol> how", "many"], ["C"], answers=["3", "no"], padding_side="left")
    assert left["labels"][1].tolist() == [-100] * 5 + [14, 2]


def test_an_end_of_sequence_that_the_tokenizer_adds_is_left_out(make_processor):
    from tokenizers import processors

    processor = make_processor()
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert processor("how many")["input_ids"].tolist() == [[1, 6, 7]]


def test_a_conversation_with_molecule_items(make_processor):
    processor = make_processor()
    message = {
        "role": "user",
        "content": [
            {"type": "molecule", "molecule": "CCO"},
            {"type": "text", "text": "how many rings ?"},
        ],
    }
    marked = [{"role": "user", "content": "<mol> how many rings ?"}]
    expected = processor("<mol> how many rings ?", "CCO")
    for inputs in (
        processor.apply_chat_template([message]),
        processor.apply_chat_template(marked, ["CCO"]),
    ):
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
    processor.tokenizer.chat_template = (
        "<bos> {% for m in messages %}{{ m.role }} {{ m.content }} <eos>{% endfor %}"
        "{% if add_generation_prompt %} answer:{% endif %}"
    )
    text = processor.apply_chat_template([message], tokenize=False)
    assert text == "<bos> user <mol> how many rings ? <eos> answer:"
    ids = processor.apply_chat_template([message])["input_ids"][0].tolist()
    assert ids == [1, 3, MOL, MOL, MOL, 6, 7, 8, 12, 2, 5]
    assert processor.prompt("how many") == "<bos> user <mol> how many <eos> answer:"


def test_errors_name_the_row_the_molecule_and_the_numbers(make_processor):
    processor = make_processor(max_length=8)
    with pytest.raises(ValueError, match=r"row 1 of text must hold <mol> .* got 2 <mol> and 1 "):
        processor(["<mol>", "<mol> <mol>"], [["C"], ["C"]])
    with pytest.raises(ValueError, match=r"row 1 of text must hold <mol> .* got 2 <mol> and 1 "):
        processor(["<mol>", "<mol> <mol>"], ["C", "C"])
    with pytest.raises(ValueError, match=r"2 rows\) .* got 1 <mol> and 2 molecules"):
        processor(["<mol>", "yes"], ["C", "C"])
    with pytest.raises(ValueError, match="got 1 <mol> and 0 molecules"):
        processor("<mol>")
    with pytest.raises(ValueError, match="a list per text, 2 in all"):
        processor(["<mol>", "<mol>"], [["C"]])
    with pytest.raises(ValueError, match=r"molecule 1 \('C1CC'\): unclosed ring"):
        processor(["<mol>", "<mol>"], ["C", "C1CC"])
    with pytest.raises(ValueError, match=r"row 1 is 10 tokens long \(6 of them .* at most 8"):
        processor(["<mol> <mol>", "<mol> <mol> how many rings"], ["C"] * 4)
    with pytest.raises(ValueError, match="answers must be one per text, 2, got 1"):
        processor(["yes", "no"], answers=["1"])
    with pytest.raises(ValueError, match="padding_side must be 'left' or 'right', got 'up'"):
        processor("yes", padding_side="up")


def test_no_rows_and_no_molecules_are_legal(make_processor):
    processor = make_processor("edt_former")
    nothing = processor([])
    assert nothing["input_ids"].shape == (0, 0)
    text = processor(["yes"])
    assert text["graph"].num_molecules == 0
    assert text["patches"]["entropy"].patch_offsets.tolist() == [0]


def test_the_predictor_is_needed_for_entropy_patches(make_parts, make_tokenizer):
    connector = make_parts()[2]
    with pytest.raises(ValueError, match="predictor is needed"):
        MoleculeProcessor(make_tokenizer(), connector)


def test_inputs_move_together_and_survive_a_trainers_walk(make_processor):
    inputs = make_processor("edt_former_brics")("<mol>", "CCO")
    moved = inputs.to("meta")
    assert moved["input_ids"].is_meta
    assert moved["graph"].offsets.is_meta
    assert moved["patches"]["brics"].ids.is_meta
    sets = PatchSets({"brics": pack_patches([[0]])})
    assert not isinstance(sets, Mapping | tuple | list)
    assert dict(sets).keys() == {"brics"}


def test_a_saved_processor_reads_alike(make_model, tmp_path):
    model = make_model("qwen2", connector="edt_former_brics", new_tokens=["<end>"])
    model.save_pretrained(tmp_path, save_frozen=True)
    texts, molecules = ["<mol> <end> how", "<mol>"], [ASPIRIN, "CCO"]
    expected = model.processor(texts, molecules)
    for read in (
        MoleculeProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    ):
        assert isinstance(read, MoleculeProcessor)
        assert read.max_length == 256
        assert torch.equal(read(texts, molecules)["input_ids"], expected["input_ids"])


def test_conformers_are_made_once_and_stand_in_the_order_of_the_atoms(make_processor, monkeypatch):
    processor, made = make_processor(conformers={"seed": 3, "timeout": 60.0}), []
    make = processor._pool.make
    monkeypatch.setattr(
        processor._pool, "make", lambda items: made.append([m.smiles for m in items]) or make(items)
    )
    assert processor.coordinates([]) == []
    graph = processor("<mol> <mol> <mol>", ["OCC", "C", "CCO"])["graph"]
    again = processor("<mol>", "CCO")["graph"]
    assert [smiles for call in made for smiles in call] == ["CCO", "C"]
    alone = make_conformer(read_molecule("CCO"), ConformerOptions(seed=3)).coordinates
    assert graph.coordinates.dtype == torch.float32
    for found in (graph.coordinates[:3], graph.coordinates[4:], again.coordinates):
        np.testing.assert_array_equal(found, alone)


def test_a_molecule_without_a_conformer_is_named_with_the_reason(make_processor):
    processor = make_processor(conformers=ConformerOptions(timeout=1e-9))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"molecule 0 \('CCO'\): no conformer within 1e-09 s"):
            processor("<mol>", "OCC")
    flat = make_processor(conformers=ConformerOptions(timeout=1e-9, flat=True))
    coordinates = flat("<mol>", "OCC")["graph"].coordinates
    assert (coordinates[:, 2] == 0).all() and coordinates.abs().sum() > 0


def test_conformers_made_elsewhere_are_kept(make_processor):
    processor = make_processor(conformers=ConformerOptions(timeout=1e-9))
    ethanol, methane = read_molecule("OCC"), read_molecule("C")
    places = np.arange(9, dtype=np.float32).reshape(3, 3)
    processor.keep_conformers([ethanol, methane], [Conformer(places), Invalid("C", "not today")])
    coordinates = processor("<mol>", "CCO")["graph"].coordinates
    np.testing.assert_array_equal(coordinates, places)
    with pytest.raises(ValueError, match=r"molecule 0 \('C'\): not today"):
        processor("<mol>", "C")


def test_conformers_that_do_not_fit_their_molecules_are_refused(make_processor):
    processor, ethanol = make_processor(conformers=ConformerOptions()), read_molecule("CCO")
    with pytest.raises(ValueError, match="must be one per molecule, 2, got 1"):
        processor.keep_conformers([ethanol, ethanol], [Conformer(np.zeros((3, 3)))])
    with pytest.raises(ValueError, match=r"0 \('CCO'\) must have shape \(3, 3\), got \(2, 3\)"):
        processor.keep_conformers([ethanol], [Conformer(np.zeros((2, 3)))])


def test_conformers_are_found_by_any_pool_and_remembered(make_processor):
    processor = make_processor(conformers=ConformerOptions())
    molecules = [read_molecule("CCO"), read_molecule("CC")]
    with ConformerPool(ConformerOptions(timeout=1e-9)) as none, ConformerPool(workers=2) as pool:
        first = processor.find_conformers(molecules[:1], none)
        found = processor.find_conformers(molecules, pool)
    assert found[0] is first[0] and first[0].reason == "no conformer within 1e-09 s"
    assert found[1].coordinates.shape == (2, 3)
    with pytest.raises(ValueError, match="for a graph encoder that reads coordinates only"):
        make_processor().find_conformers(molecules)


def test_without_conformers_there_are_no_coordinates(make_processor):
    processor = make_processor()
    assert processor.coordinates([read_molecule("C")]) is None
    assert processor("<mol>", "C")["graph"].coordinates is None


def test_graph_data_without_smiles_has_no_conformer(make_processor):
    data = SimpleNamespace(
        x=np.array([[5, 0, 4, 5, 4, 0, 2, 0, 0]]),
        edge_index=np.zeros((2, 0), int),
        edge_attr=np.zeros((0, 3), int),
    )
    with pytest.raises(ValueError, match=r"molecule 0.*needs a molecule's SMILES"):
        make_processor(conformers=ConformerOptions())("<mol>", data)


def test_motifs_are_found_once_where_the_connector_reads_them(make_model, monkeypatch):
    model = make_model(connector="llamo")
    read = []
    find = processor_module.motif_features

    def counted(molecules):
        read.append([m.smiles for m in molecules])
        return find(molecules)

    monkeypatch.setattr(processor_module, "motif_features", counted)
    first = model.processor(["<mol>", "<mol> <mol>"], ["CCO", "C", "CCO"])["graph"]
    second = model.processor(["<mol>"], ["C"])["graph"]
    assert read == [["CCO", "C"], []]
    assert first.motifs.offsets.tolist() == [0, 2, 2, 4] and second.motifs.offsets.tolist() == [
        0,
        0,
    ]
    assert torch.equal(first.motifs.values[:2], first.motifs.values[2:])
    assert make_model(connector="qformer").processor(["<mol>"], ["C"])["graph"].motifs is None
