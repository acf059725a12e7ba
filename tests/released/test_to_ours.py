"""A released file becomes parts that load, compute the recorded numbers, and lead back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edt_former.chem import read_as_written
from edt_former.connectors import make_connector
from edt_former.graph import make_encoder
from edt_former.language import load_part
from edt_former.model import MoleculeLM
from edt_former.processor import as_molecule
from edt_former.released import Options, Told, to_ours, to_released
from edt_former.tokens import NextAtomPredictor, pack_patches
from edt_former.train.objectives import RepresentationLearning
from edt_former.weights import open_weights
from tests.graph.conftest import recorded_batch
from tests.released.conftest import encoder_tree, mixed
from tests.train import published_reference as published

SMILES = ["OC(=O)c1ccccc1OC(C)=O", "[Na+].[Cl-]", "CCO"]


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """The same names, dtypes and bits."""
    return found.keys() == expected.keys() and all(
        found[n].dtype == x.dtype and torch.equal(found[n], x) for n, x in expected.items()
    )


def read(folder) -> dict[str, torch.Tensor]:
    return {name: stored.read().clone() for name, stored in open_weights(folder).items()}


def without(tree, *parts: str):
    return {n: x for n, x in tree.items() if not any(part in n for part in parts)}


@pytest.fixture
def converted(save, tmp_path, options):
    def convert(tree, name: str = "ours", **changed):
        to_ours(save(tree), replace(options, **changed)).write(tmp_path / name)
        return tmp_path / name

    return convert


class TestEncoder:
    @pytest.mark.parametrize("prefix", ["", "model.", "mol_llama."])
    def test_there_and_back_every_bit_is_the_same(self, converted, tmp_path, stage1, prefix):
        tree = {prefix + name: value for name, value in mixed(stage1).items()}
        to_released(converted(tree)).write(tmp_path / "back.safetensors")
        assert equal(load_file(tmp_path / "back.safetensors"), tree)

    @pytest.mark.parametrize("prefix", ["", "model.", "mol_llama."])
    def test_back_with_another_prefix(self, converted, tmp_path, stage1, prefix):
        to_released(converted(stage1), prefix=prefix).write(tmp_path / "back")
        assert equal(read(tmp_path / "back"), {prefix + n: x for n, x in stage1.items()})

    def test_the_parts_load_and_hold_what_the_file_holds(self, converted, stage1):
        folder = converted(stage1)
        encoder = load_part(make_encoder, folder / "graph_encoder")
        task = RepresentationLearning.from_pretrained(folder)
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, stage1[f"encoder.{name}"]), name
        for name, value in task.state_dict().items():
            own = name.removeprefix("connector.")
            own = f"Qformer.{own}" if own.startswith("cls.") else own
            assert torch.equal(value, stage1[f"encoder.{own}"]), name
        assert task.config == {
            "embed_dim": 6,
            "begin_id": 29,
            "caption_position": 69,
            "temperature": 0.1,
            "label_smoothing": 0.1,
            "matching": "anchors",
        }
        again = folder.with_name("again")
        task.save_pretrained(again)
        assert equal(read(again / "heads"), read(folder / "heads"))

    def test_without_a_text_branch(self, converted, tmp_path):
        tree = encoder_tree(text=False)
        folder = converted(tree)
        assert not (folder / "heads").exists()
        assert load_part(make_connector, folder / "connector").options.text_vocab_size is None
        to_released(folder).write(tmp_path / "back")
        assert equal(read(tmp_path / "back"), tree)

    def test_buffers_and_copies_may_be_absent(self, converted, tmp_path, stage1):
        less = without(stage1, "static_q_mask", "position_ids", "decoder.", "graph_pred_linear")
        folder = converted(less)
        assert equal(read(folder / "connector"), read(converted(stage1, "whole") / "connector"))
        to_released(folder).write(tmp_path / "back")
        found = read(tmp_path / "back")
        assert found.keys() == stage1.keys() and equal({n: found[n] for n in less}, less)
        assert found["encoder.static_q_mask"].all()
        ids = found["encoder.Qformer.bert.embeddings.position_ids"]
        assert torch.equal(ids, torch.arange(90)[None])

    def test_uni_mol_alone(self, converted, tmp_path, stage1):
        tree = without(stage1, "moleculestm", "blending_module")
        layer = "encoder.Qformer.bert.encoder.layer.{}.crossattention.self.{}.weight"
        for n, name in [(0, "key"), (0, "value"), (2, "key"), (2, "value")]:
            tree[layer.format(n, name)] = torch.randn(16, 16)
        tree["encoder.local_q_proj.weight"] = torch.randn(16, 16)
        folder = converted(tree)
        connector = load_part(make_connector, folder / "connector")
        assert connector.patch_options.encoder == "3d"
        assert torch.equal(connector.ln_graph.bias, tree["encoder.ln_graph.unimol.bias"])
        assert load_part(make_encoder, folder / "graph_encoder").config["name"] == "unimol"
        to_released(folder).write(tmp_path / "back")
        assert equal(read(tmp_path / "back"), tree)

    def test_encoders_from_their_own_files(self, converted, tmp_path, stage1):
        at = {n: f"encoder.graph_encoder.{n}." for n in ("moleculestm", "unimol")}
        own = {
            name: {n.removeprefix(prefix): x for n, x in stage1.items() if n.startswith(prefix)}
            for name, prefix in at.items()
        }
        files = {"moleculestm": tmp_path / "molecule_model.pth", "unimol": tmp_path / "no_h.pt"}
        torch.save(own["moleculestm"], files["moleculestm"])
        heads = {"lm_head.dense.weight": torch.ones(2), "dist_head.out.bias": torch.ones(1)}
        torch.save({"model": {**own["unimol"], **heads}}, files["unimol"])
        less = without(stage1, *at.values())
        to_released(converted(less, **files)).write(tmp_path / "back")
        assert equal(read(tmp_path / "back"), stage1)
        with pytest.raises(ValueError, match=r"holds no weights of moleculestm: --moleculestm"):
            converted(less)
        with pytest.raises(ValueError, match=r"--unimol has no use: .* holds those weights"):
            converted(stage1, unimol=files["unimol"])

    def test_sharded_and_pickled_sources(self, save, tmp_path, options, stage1):
        to_ours(save(stage1), options).write(tmp_path / "ours")
        to_released(tmp_path / "ours").write(tmp_path / "shards", shard_size=20_000)
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
        torch.save(stage1, tmp_path / "source.bin")
        for source in ("shards", "source.bin"):
            to_ours(tmp_path / source, options).write(tmp_path / f"from {source}")
            for part in ("graph_encoder", "connector", "heads", "released"):
                found = read(tmp_path / f"from {source}" / part)
                assert equal(found, read(tmp_path / "ours" / part))


class TestRefusals:
    def refused(self, save, options, tree) -> str:
        with pytest.raises(ValueError) as caught:
            to_ours(save(tree), options)
        return str(caught.value)

    def test_all_that_differs_is_named_at_once(self, save, options, stage1):
        gone = ["encoder.query_tokens", "encoder.ln_graph.unimol.bias", "encoder.gtm_head.bias"]
        tree = {n: x for n, x in stage1.items() if n not in gone}
        tree["encoder.local_q_proj.bias"] = torch.ones(17)
        tree |= {"encoder.Qformer.bert.pooler.weight": torch.ones(1), "extra": torch.ones(2)}
        message = self.refused(save, replace(options, told=Told(2, 2)), tree)
        for name in gone:
            assert name in message.partition("unexpected:")[0]
        unexpected = message.partition("unexpected:")[2].partition("of another shape:")[0]
        assert "encoder.Qformer.bert.pooler.weight" in unexpected and "extra" in unexpected
        assert "encoder.local_q_proj.bias [17] instead of " in message

    def test_one_layer_less_of_every_kind(self, save, options, stage1):
        tree = without(stage1, "layer.1.output_query.dense.bias", "layer.0.output_query.dense.bias")
        message = self.refused(save, options, tree)
        name = "encoder.Qformer.bert.encoder.layer.{0-1}.output_query.dense.bias"
        assert message.endswith(f"do not fit: missing: {name}")

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_copies_that_differ(self, save, options, stage1, name):
        at = f"encoder.Qformer.cls.predictions.decoder.{name}"
        stage1[at] = stage1[at] + 1
        message = self.refused(save, options, stage1)
        assert message.startswith(f"{at} in ") and message.endswith("it differs")

    def test_heads_without_a_text_branch(self, save, options, stage1):
        tree = without(stage1, "word_embeddings", "position_embeddings", "decoder", "intermediate.")
        tree = {n: x for n, x in tree.items() if ".output." not in n or "attention" in n}
        assert "heads of the first stage and no text branch" in self.refused(save, options, tree)

    def test_heads_that_do_not_divide_the_width(self, save, options, stage1):
        message = self.refused(save, replace(options, told=Told(3, 2)), stage1)
        assert message == "width must be a multiple of heads 3, got 16"

    def test_what_is_allowed(self, converted, tmp_path, stage1):
        gone = "encoder.text_proj.bias"
        tree = {**without(stage1, gone), "optimizer.step": torch.ones(1)}
        allowed = {"allow_missing": ("*.text_proj.*",), "allow_unexpected": ("optimizer.*",)}
        folder = converted(tree, **allowed)
        task = RepresentationLearning.from_pretrained(folder)
        assert torch.equal(task.graph_proj.bias, stage1["encoder.graph_proj.bias"])
        to_released(folder).write(tmp_path / "back")
        assert equal(without(read(tmp_path / "back"), gone), without(stage1, gone))
        again = converted(tree, "again", **allowed)
        assert equal(read(folder / "heads"), read(again / "heads"))

    @pytest.mark.parametrize("pattern", ["*.text_proj.weight", "text_proj"])
    def test_a_pattern_allows_what_it_matches(self, save, options, stage1, pattern):
        tree = without(stage1, "encoder.text_proj.bias")
        message = self.refused(save, replace(options, allow_missing=(pattern,)), tree)
        assert message.endswith("missing: encoder.text_proj.bias")


class TestWholeModel:
    @pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
    @pytest.mark.parametrize("prefix", ["model.", "mol_llama.", ""])
    def test_there_and_back(self, make_stage2, converted, gpt2, tmp_path, prefix, tie):
        tree, llm = make_stage2(tie=tie)
        tree = {prefix + n: x for n, x in mixed(tree).items()}
        if tie:
            copy = f"{prefix}llm.lm_head.weight"
            tree[copy] = tree[f"{prefix}llm.model.embed_tokens.weight"].clone()
        folder = converted(tree, language_model=llm, predictor=gpt2)
        to_released(folder).write(tmp_path / "back", shard_size=30_000)
        assert equal(read(tmp_path / "back"), tree)

    def test_it_loads_and_reads_molecules(self, make_stage2, converted, gpt2):
        tree, llm = make_stage2()
        folder = converted(tree, language_model=llm, predictor=gpt2)
        model = MoleculeLM.from_pretrained(folder)
        names = {
            "graph_encoder": "encoder.",
            "connector": "encoder.",
            "language_model": "llm.",
        }
        for part, prefix in names.items():
            for name, value in getattr(model, part).state_dict().items():
                own = name if name.startswith("llm_proj.") else prefix + name
                assert torch.equal(value, tree[own]), own
        assert model.config.text_config.vocab_size == 11
        assert model.config.mol_token_id == 10 == model.processor.mol_token_id
        assert model.processor.tokenizer.pad_token_id == 9

        inputs = model.processor(["what is <mol> ?"] * 3, SMILES)
        logits = model(**inputs).logits
        tokens = model.embed_molecules(SMILES)
        counts = model.processor.token_counts([as_molecule(s, as_written=True) for s in SMILES])
        assert tokens.offsets.diff().tolist() == counts
        for row, smiles in enumerate(SMILES):
            one = model.processor("what is <mol> ?", smiles)
            alone = model(**one).logits[0]
            torch.testing.assert_close(logits[row, -len(alone) :], alone, rtol=0, atol=1e-4)
        assert [m.smiles for m in map(read_as_written, SMILES)] == SMILES

    def test_the_language_model_is_one_for_transformers_too(self, make_stage2, converted, gpt2):
        tree, llm = make_stage2()
        folder = converted(tree, language_model=llm, predictor=gpt2)
        model = AutoModelForCausalLM.from_pretrained(folder / "language_model")
        for name, value in model.state_dict().items():
            assert torch.equal(value, tree[f"llm.{name}"])

    def test_shards_of_the_language_model(self, make_stage2, save, gpt2, tmp_path, options):
        tree, llm = make_stage2()
        plan = to_ours(save(tree), replace(options, language_model=llm, predictor=gpt2))
        written = []
        plan.write(tmp_path / "ours", shard_size=4000, progress=written.append)
        files = list((tmp_path / "ours" / "language_model").glob("*.safetensors"))
        assert len(files) > 3 and sum(written) == plan.nbytes
        assert MoleculeLM.from_pretrained(tmp_path / "ours").config.text_config.vocab_size == 11

    def test_a_predictor_of_ours(self, make_stage2, converted, gpt2, tmp_path):
        to_ours(gpt2, Options()).write(tmp_path / "predictor")
        tree, llm = make_stage2()
        folder = converted(tree, language_model=llm, predictor=tmp_path / "predictor")
        model = MoleculeLM.from_pretrained(folder)
        expected = load_part(NextAtomPredictor, tmp_path / "predictor")
        assert equal(model.predictor.state_dict(), expected.state_dict())

    def test_without_the_language_model(self, make_stage2, save, tmp_path, options):
        tree, _ = make_stage2()
        to_ours(save(tree), options, language_model=False).write(tmp_path / "ours")
        connector = load_part(make_connector, tmp_path / "ours" / "connector")
        assert torch.equal(connector.llm_proj.weight, tree["llm_proj.weight"])
        to_released(tmp_path / "ours").write(tmp_path / "back")
        assert equal(read(tmp_path / "back"), without(tree, "llm.model", "llm.lm_head"))

    def test_a_model_back_without_the_language_model(self, make_stage2, converted, gpt2, tmp_path):
        tree, llm = make_stage2()
        folder = converted(tree, language_model=llm, predictor=gpt2)
        to_released(folder, language_model=False).write(tmp_path / "back")
        assert equal(read(tmp_path / "back"), without(tree, "llm.model", "llm.lm_head"))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ((), r"--language-model DIR, with its config.json and tokenizer, is needed, or --no-"),
            (("language_model",), r"--predictor PATH, its next-atom predictor, is needed"),
        ],
    )
    def test_what_is_needed_beside_it(self, make_stage2, save, gpt2, options, given, message):
        tree, llm = make_stage2()
        places = {"language_model": llm, "predictor": gpt2}
        with pytest.raises(ValueError, match=message):
            to_ours(save(tree), replace(options, **{name: places[name] for name in given}))

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
    def test_what_the_language_models_folder_must_hold(
        self, make_stage2, save, gpt2, options, name
    ):
        tree, llm = make_stage2()
        (llm / name).unlink()
        with pytest.raises(ValueError, match=f"--language-model must be a folder with {name}"):
            to_ours(save(tree), replace(options, language_model=llm, predictor=gpt2))

    @pytest.mark.parametrize("name", ["language_model", "predictor", "lora_alpha"])
    def test_options_of_a_whole_model_for_an_encoder(self, save, options, stage1, tmp_path, name):
        given = replace(options, **{name: 1.0 if name == "lora_alpha" else tmp_path})
        match = f"--{name.replace('_', '-')} has no use: no language model is converted"
        with pytest.raises(ValueError, match=match):
            to_ours(save(stage1), given)

    def test_a_language_model_of_another_size(self, make_stage2, save, gpt2, options):
        tree, llm = make_stage2()
        tree["llm.model.layers.1.mlp.up_proj.weight"] = torch.ones(33, 16)
        del tree["llm.model.norm.weight"]
        tree["llm.model.norm.bias"] = torch.ones(16)
        given = replace(options, language_model=llm, predictor=gpt2)
        with pytest.raises(ValueError) as caught:
            to_ours(save(tree), given)
        assert str(caught.value).endswith(
            "do not fit: missing: llm.model.norm.weight; unexpected: llm.model.norm.bias; of "
            "another shape: llm.model.layers.1.mlp.up_proj.weight [33, 16] instead of [32, 16]"
        )
        with pytest.raises(ValueError, match=r"language_model cannot be completed, it lacks model"):
            tree["llm.model.layers.1.mlp.up_proj.weight"] = torch.ones(32, 16)
            to_ours(save(without(tree, "norm.bias")), replace(given, allow_missing=("*",)))

    def test_a_tokenizer_with_more_words_than_rows(self, make_stage2, save, gpt2, options):
        tree, llm = make_stage2(rows=10)
        with pytest.raises(ValueError, match=r"has 11 tokens with .*, the .* table 10 rows"):
            to_ours(save(tree), replace(options, language_model=llm, predictor=gpt2))

    def test_tied_copies_of_the_language_model_that_differ(self, make_stage2, save, gpt2, options):
        tree, llm = make_stage2(tie=True)
        tree["llm.lm_head.weight"] = tree["llm.lm_head.weight"] + 1
        with pytest.raises(ValueError, match=r"llm.lm_head.weight in .* tied to, it differs"):
            to_ours(save(tree), replace(options, language_model=llm, predictor=gpt2))


@pytest.fixture(scope="module")
def recorded_folder(recorded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    state = without(recorded("edt_encoder_state"), "coords.")
    save_file(state, folder / "source.safetensors")
    options = Options(Told(heads=4, blending_heads=4))
    to_ours(folder / "source.safetensors", options).write(folder / "ours")
    return folder


class TestRecorded:
    """The reduced published encoder."""

    def test_back_every_bit_is_the_same(self, recorded_folder, tmp_path):
        to_released(recorded_folder / "ours").write(tmp_path / "back.safetensors")
        source = load_file(recorded_folder / "source.safetensors")
        assert equal(load_file(tmp_path / "back.safetensors"), source)

    @torch.no_grad()
    @pytest.mark.parametrize("m", range(8))
    def test_a_molecule_alone_gives_the_recorded_numbers(self, recorded_folder, recorded, m):
        """Rows, patches and hidden states, by the converted encoder and connector."""
        record, state = (
            recorded("edt_encoder_blend"),
            load_file(recorded_folder / "source.safetensors"),
        )
        encoder = load_part(make_encoder, recorded_folder / "ours" / "graph_encoder").eval()
        connector = load_part(make_connector, recorded_folder / "ours" / "connector").eval()
        features = encoder(recorded_batch(record, [m]))
        expected = record["node"][m][record["node_mask"][m]]
        torch.testing.assert_close(features.values, expected, rtol=0, atol=1e-4)

        front = published.blend(state, alone(record, m))
        count = int(front.query_mask.sum())
        allowed = front.query_mask[:, None]
        read = (front.queries, front.node, front.node_mask, None, allowed)
        hidden = published.transformer(state, *read)[0, :count]
        found = connector.read(features, cut(record, m, len(features.values) - 2))
        torch.testing.assert_close(found.values, hidden, rtol=0, atol=1e-4)
        # Of the longest molecule nothing that is pooled was padding in the recorded batch.
        if record["enc.moleculestm.mask"][m].all():
            slots = record["query_mask"][m]
            torch.testing.assert_close(
                found.values, record["last_hidden_state"][m][slots], rtol=0, atol=1e-4
            )

    def test_the_longest_molecule_is_among_them(self, recorded):
        assert recorded("edt_encoder_blend")["enc.moleculestm.mask"].all(1).sum() == 1


def alone(record: dict[str, torch.Tensor], m: int) -> dict[str, torch.Tensor]:
    """What the encoders gave for one molecule, unpadded, and its patches."""
    one = {}
    for name in ("moleculestm", "unimol"):
        mask = record[f"enc.{name}.mask"][m]
        one[f"enc.{name}.node"] = record[f"enc.{name}.node"][m][mask][None]
        one[f"enc.{name}.mask"] = mask[mask][None]
    for source in ("brics", "entropy"):
        lengths = record[f"in.{source}_gids.len"]
        one[f"in.{source}_gids.len"] = lengths[m : m + 1]
        one[f"in.{source}_gids.flat"] = record[f"in.{source}_gids.flat"].split(lengths.tolist())[m]
    return one


def cut(record: dict[str, torch.Tensor], m: int, rows: int):
    """The patches of one molecule, of all rows that are pooled."""
    patches = {}
    for source in ("brics", "entropy"):
        lengths = record[f"in.{source}_gids.len"].tolist()
        ids = record[f"in.{source}_gids.flat"].split(lengths)[m].tolist() or [0]
        patches[source] = pack_patches([(ids + [ids[-1]] * rows)[:rows]])
    return patches
