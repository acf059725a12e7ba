"""Files of weights as programs leave them: whole, sharded, pickled, damaged."""

from __future__ import annotations

import argparse
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from edt_former.weights import (
    StoredTensor,
    byte_count,
    open_weights,
    write_file,
    write_shards,
)

WEIGHTS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "a.half": torch.randn(5).half(),
    "b.brain": torch.randn(2, 3).bfloat16(),
    "count": torch.tensor(7),
    "mask": torch.tensor([[True, False]]),
    "empty": torch.zeros(0, 3),
}


def same(found: dict[str, StoredTensor], expected: dict[str, torch.Tensor] = WEIGHTS) -> bool:
    return found.keys() == expected.keys() and all(
        (found[n].shape, found[n].dtype) == (x.shape, x.dtype) and torch.equal(found[n].read(), x)
        for n, x in expected.items()
    )


def stored(weights: dict[str, torch.Tensor] = WEIGHTS) -> dict[str, StoredTensor]:
    return {n: StoredTensor.of(x) for n, x in weights.items()}


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pt", "w.pth", "w.ckpt"])
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
def test_one_file(tmp_path, name, whole):
    if name == "w.safetensors":
        save_file(WEIGHTS, tmp_path / name)
    else:
        torch.save(WEIGHTS, tmp_path / name)
    assert same(open_weights(tmp_path if whole else tmp_path / name))


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_file_of_a_training_program(tmp_path, key):
    options = argparse.Namespace(lr=0.1)
    torch.save({key: WEIGHTS, "args": options, "epoch": 3}, tmp_path / "w.pt")
    assert same(open_weights(tmp_path / "w.pt"))


def test_a_file_from_before_torch_1_6(tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert same(open_weights(tmp_path / "w.pt"))


def test_shards_and_their_index(tmp_path):
    big = {f"h.{i}": torch.randn(100, 100) for i in range(7)} | WEIGHTS
    written = list(write_shards(tmp_path, stored(big), 100_000))
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) == len(written) == 4 and files[0] == "model-00001-of-00004.safetensors"
    assert sum(written) == sum(x.nbytes for x in big.values())
    assert max((tmp_path / file).stat().st_size for file in files) < 102_000
    assert same(open_weights(tmp_path), big)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(written)
    assert index["weight_map"].keys() == big.keys()


def test_one_shard_needs_no_index(tmp_path):
    assert len(list(write_shards(tmp_path, stored(), 2_000_000_000))) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_several_files_without_an_index(tmp_path):
    halves = dict(list(WEIGHTS.items())[:3]), dict(list(WEIGHTS.items())[3:])
    for i, half in enumerate(halves):
        save_file(half, tmp_path / f"part{i}.safetensors")
    assert same(open_weights(tmp_path))
    save_file({"count": torch.tensor(1)}, tmp_path / "again.safetensors")
    with pytest.raises(ValueError, match="no index, and count is in several of its files"):
        open_weights(tmp_path)


def test_an_index_of_pickled_files(tmp_path):
    torch.save(WEIGHTS, tmp_path / "pytorch_model-00001-of-00001.bin")
    homes = dict.fromkeys(WEIGHTS, "pytorch_model-00001-of-00001.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": homes}))
    assert same(open_weights(tmp_path))


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    x = torch.randn(3, 4)
    shared = {"x": x, "tied": x, "turned": x.T, "slice": x[1]}
    write_file(tmp_path / "w.safetensors", stored(shared))
    assert same(open_weights(tmp_path), shared)


@pytest.mark.parametrize("cut", [4, 60, -8])
def test_a_truncated_file(tmp_path, cut):
    file = tmp_path / "w.safetensors"
    save_file(WEIGHTS, file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"w.safetensors is damaged"):
        open_weights(file)


def test_a_truncated_pickle(tmp_path):
    file = tmp_path / "w.bin"
    torch.save(WEIGHTS, file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"w.bin is damaged"):
        open_weights(file)


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"\x80?\x808", b"PK\x03\x04 no archive", b"text"]
)
def test_what_is_no_pickle(tmp_path, content):
    (tmp_path / "w.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"w.bin is damaged"):
        open_weights(tmp_path / "w.bin")


class Code:
    ran = False

    def __reduce__(self):
        return (exec, ("import test_weights_ran",))


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, new):
    torch.save({"a": Code()}, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"w.pt is damaged or holds more than weights"):
        open_weights(tmp_path / "w.pt")


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "w.bin").write_bytes(pickle.dumps({"a": Code()}))
    with pytest.raises(ValueError, match=r"w.bin is damaged or holds more than weights"):
        open_weights(tmp_path / "w.bin")


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 3}, {"state_dict": {"b": "text"}}])
def test_a_pickle_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="must hold named weights"):
        open_weights(tmp_path / "w.pt")


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*nothing.bin"):
        open_weights(tmp_path / "nothing.bin")
    with pytest.raises(FileNotFoundError, match="no file of weights in"):
        open_weights(tmp_path)
    (tmp_path / "w.onnx").touch()
    with pytest.raises(ValueError, match=r"w.onnx must be a folder or end in one of .safetensors"):
        open_weights(tmp_path / "w.onnx")


@pytest.mark.parametrize(
    ("homes", "error", "message"),
    [
        ({"a": "w.safetensors", "b": "w.safetensors"}, ValueError, "differ: b is in one but not"),
        ({}, ValueError, "is no index of weights"),
        ({"a": "other.safetensors"}, FileNotFoundError, "names other.safetensors, which is not"),
    ],
)
def test_an_index_that_is_wrong(tmp_path, homes, error, message):
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    with pytest.raises(error, match=message):
        open_weights(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', "{}"])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="is no index of weights"):
        open_weights(tmp_path)


def test_several_pickles_need_a_name(tmp_path):
    for name in ("a.bin", "b.pt"):
        torch.save(WEIGHTS, tmp_path / name)
    with pytest.raises(ValueError, match=r"several files, name one: a.bin, b.pt"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("text", "count"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("0.5KB", 500), ("1TB", 10**12)]
)
def test_sizes(text, count):
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "GB", "2", "2 apples", "-1GB", "2GiB"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match=f"must be a number and KB, MB, GB or TB, got {text}"):
        byte_count(text)


@pytest.mark.parametrize("place", ["../weights.safetensors", "/weights.safetensors", "a/../b"])
def test_an_index_leads_nowhere_else(tmp_path, place):
    folder = tmp_path / "inside"
    folder.mkdir()
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    index = {"weight_map": dict.fromkeys(WEIGHTS, place)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is not beside it"):
        open_weights(folder)
