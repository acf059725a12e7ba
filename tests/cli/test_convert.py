"""`edt convert` as its users meet it: the report, what is written, and how it refuses."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from edt_former.graph import make_encoder
from edt_former.language import load_part
from edt_former.released import plan
from tests.released.conftest import encoder_tree, gpt2_folder, mixed, whole_tree

HEADS = ("--heads", "2", "--blending-heads", "2")


@pytest.fixture
def source(tmp_path):
    save_file(mixed(encoder_tree(text=True)), tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def listing(folder) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()
    }


def test_the_report_and_the_way_back(edt, source, tmp_path):
    status, out, err = edt("convert", source, tmp_path / "ours", *HEADS)
    assert (status, err) == (0, [])
    assert out[0] == (
        "found encoder of EDT-Former: GIN 2 x 12 and Uni-Mol 2 x 16, blended 2 x 20; 3 x 16 query "
        "transformer, cross-attention in 2 of 3 layers, 5 anchors, text of 30 words"
    )
    tree = load_file(source)
    assert out[1].startswith(f"{len(tree) - 2} tensors named encoder.*, 0.2 MB")
    rows = {line.split()[0]: line for line in out[4:8]}
    parts = ("graph_encoder", "connector", "heads", "released")
    assert list(rows) == [f"{part}/model.safetensors" for part in parts]
    assert "float32" in rows[f"{parts[0]}/model.safetensors"]
    assert "bfloat16" in rows[f"{parts[1]}/model.safetensors"]
    assert out[8].startswith("note: tied copies, equal: encoder.Qformer.cls.predictions.decoder.")
    assert out[-1] == f"wrote {tmp_path / 'ours'}"
    load_part(make_encoder, tmp_path / "ours" / "graph_encoder")

    back = tmp_path / "back.safetensors"
    status, out, err = edt("convert", tmp_path / "ours", back, "--to", "released")
    assert (status, err) == (0, [])
    assert out[0] == "found encoder of EDT-Former in graph_encoder, connector, heads"
    found = load_file(back)
    assert found.keys() == tree.keys()
    assert all(torch.equal(found[n], x) and found[n].dtype == x.dtype for n, x in tree.items())


def test_a_whole_model_in_shards_with_another_prefix(edt, tmp_path):
    tree, llm = whole_tree(tmp_path / "llm")
    gpt2 = gpt2_folder(tmp_path / "gpt2")
    save_file({f"model.{n}": x.contiguous() for n, x in tree.items()}, tmp_path / "m.safetensors")
    more = ("--language-model", llm, "--predictor", gpt2, "--shard-size", "10KB", *HEADS)
    status, out, err = edt("convert", tmp_path / "m.safetensors", tmp_path / "ours", *more)
    assert (status, err) == (0, [])
    assert "note: added to the tokenizer: [PAD], <mol>" in out
    status, _, err = edt(
        *("convert", tmp_path / "ours", tmp_path / "back", "--to", "released"),
        *("--prefix", "mol_llama.", "--shard-size", "10KB"),
    )
    assert (status, err) == (0, [])
    files = list((tmp_path / "back").glob("*.safetensors"))
    found = {n: x for file in files for n, x in load_file(file).items()}
    assert len(files) > 3 and found.keys() == {f"mol_llama.{n}" for n in tree}
    assert all(torch.equal(found[f"mol_llama.{n}"], x) for n, x in tree.items())


def test_a_dry_run_writes_nothing(edt, source, tmp_path):
    status, out, err = edt("convert", source, tmp_path / "ours", *HEADS, "--dry-run")
    assert (status, err) == (0, []) and out[0].startswith("found encoder of EDT-Former")
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_what_is_there_is_replaced_with_force_only(edt, fails, source, tmp_path):
    out = tmp_path / "ours"
    edt("convert", source, out, *HEADS)
    before = listing(out)
    message = fails("convert", source, out, *HEADS)
    assert message == f"{out} exists: name another place, or replace it with --force"
    (out / "heads" / "config.json").write_text("changed")
    status, _, err = edt("convert", source, out, *HEADS, "--force")
    assert (status, err) == (0, []) and listing(out) == before


def test_other_files_are_never_replaced(fails, source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    out = tmp_path / "mine"
    message = fails("convert", source, out, *HEADS, "--force")
    assert message == f"{out} holds thesis.tex, which no conversion writes: it is not replaced"
    (tmp_path / "file").write_text("text")
    assert "is not what --force would replace" in fails(
        "convert", source, tmp_path / "file", *HEADS, "--force"
    )
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_nothing_is_left_of_a_conversion_that_fails(edt, source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(plan, "write_json", full)
    status, _, err = edt("convert", source, tmp_path / "ours", *HEADS)
    assert (status, err) == (2, ["edt convert: error: no space left on device"])
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_all_names_that_do_not_fit_are_in_one_line(fails, source, tmp_path):
    tree = load_file(source)
    for name in ("encoder.query_tokens", "encoder.gtm_head.bias"):
        del tree[name]
    save_file({**tree, "lm_head.weight": torch.ones(1)}, source)
    message = fails("convert", source, tmp_path / "ours", *HEADS)
    assert message.startswith(f"the weights in {source} do not fit: missing: ")
    for name in ("encoder.query_tokens", "encoder.gtm_head.bias", "unexpected: lm_head.weight"):
        assert name in message
    assert not (tmp_path / "ours").exists()


def test_patterns(edt, source, tmp_path):
    tree = load_file(source)
    del tree["encoder.gtm_head.bias"]
    save_file({**tree, "lm_head.weight": torch.ones(1)}, source)
    allowed = ("--allow-missing", "*.gtm_head.*", "--allow-unexpected", "lm_head.*")
    status, out, err = edt("convert", source, tmp_path / "ours", *HEADS, *allowed)
    assert (status, err) == (0, [])
    assert "note: left out: lm_head.weight" in out
    assert "note: initialised anew: encoder.gtm_head.bias" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "out"), "there is no nothing"),
        (("empty", "out"), "no file of weights in empty"),
        (("empty", "out", "--to", "released"), "empty must be a checkpoint, or a folder with"),
        (("source.safetensors", "out", "--to", "theirs"), "--to must be ours or released"),
        (("source.safetensors", "out", "--to", "released"), "SOURCE must be a folder with --to"),
        (("source.safetensors", "out.safetensors"), "OUT must be a folder, got out.safetensors"),
        (("source.safetensors", "source.safetensors"), "OUT must be a folder"),
        (("empty", "empty"), "OUT must be apart from SOURCE"),
        (("empty", "empty/inside"), "OUT must be apart from SOURCE"),
        (("source.safetensors", "."), "OUT must be apart from SOURCE"),
        (("source.safetensors", "no/where"), "OUT must be in a folder that exists, got no/where"),
        (("source.safetensors", "out", "--prefix", ""), "--prefix needs --to released"),
        (("empty", "out", "--to", "released", "--heads", "2"), "--heads needs --to ours"),
        (("empty", "out", "--to", "released", "--prefix", "x."), "--prefix must be '', model."),
        (("other.safetensors", "out"), "the weights must be of a released EDT-Former"),
        (("cut.safetensors", "out"), "cut.safetensors is damaged"),
        (("code.bin", "out"), "code.bin is damaged or holds more than weights"),
        (
            ("source.safetensors", "out", "--language-model", "a", "--no-language-model"),
            "--language-model and --no-language-model exclude one another",
        ),
        (("source.safetensors", "out"), "width must be a multiple of heads"),
        (("source.safetensors", "out", *HEADS, "--shard-size", "2 apples"), "got 2 apples"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes(edt, source, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    save_file({"lm_head.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(source.read_bytes()[:-100])
    torch.save({"a": print}, tmp_path / "code.bin")
    before = sorted(os.listdir(tmp_path))
    status, _, err = edt("convert", *arguments)
    assert status == 2 and len(err) == 1, err
    assert message in err[0]
    assert sorted(os.listdir(tmp_path)) == before
