"""Files of weights: opened without reading their numbers, and written a few gigabytes at a time."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARED = "shared.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
WRAPPERS = ("state_dict", "model")
"""Keys under which a training program puts the weights beside other things."""


class StoredTensor(NamedTuple):
    """A tensor in a file: what it is, and how to get it."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.shape.numel() * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        """A tensor that is in memory."""
        return cls(tensor.shape, tensor.dtype, lambda: tensor)


def open_weights(source: Path | str) -> dict[str, StoredTensor]:
    """The tensors of a file, or of all weight files of a folder, by name; no number is read.

    Weights that a folder shares with others are among them, see `shared_folders`. A folder is read
    as its index says (`model.safetensors.index.json`,
    `pytorch_model.bin.index.json`); without one, all its safetensors files are, or else its one
    file of another kind. Files of torch (.bin, .pt, .pth, .ckpt) are unpickled as weights only:
    nothing in them is run.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: a file is damaged, holds more than weights, or is not what its index says.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"a": torch.ones(2, 3)}, Path(folder, "model.safetensors"))
        ...     weights = open_weights(folder)
        ...     weights["a"].shape, weights["a"].nbytes, weights["a"].read().sum()
        (torch.Size([2, 3]), 24, tensor(6.))
    """
    source = Path(source)
    if source.is_dir():
        return _open_folder(source) | {
            prefix + name: stored
            for prefix, folder in shared_folders(source).items()
            for name, stored in open_weights(folder).items()
        }
    if not source.exists():
        raise FileNotFoundError(f"there is no {source}")
    if source.suffix == ".safetensors":
        return _open_safetensors(source)
    if source.suffix in PICKLED:
        return {name: StoredTensor.of(tensor) for name, tensor in _unpickled(source).items()}
    known = ", ".join((".safetensors", *PICKLED))
    raise ValueError(f"{source} must be a folder or end in one of {known}")


def shared_folders(folder: Path | str) -> dict[str, Path]:
    """Where weights are that a folder does not hold itself, by what stands before their names.

    `shared.json` says so, as `{"graph_encoder.unimol.": "../graph_encoder_3d"}`: the weights in
    that folder, relative to this one, are the part's of those names.
    """
    file = Path(folder) / SHARED
    if not file.is_file():
        return {}
    told = json.loads(file.read_text())
    return {prefix: file.parent / where for prefix, where in told.items()}


def _open_folder(folder: Path) -> dict[str, StoredTensor]:
    indices = sorted(folder.glob("*.index.json"))
    if len(indices) > 1:
        raise ValueError(f"{folder} has several indices: {', '.join(i.name for i in indices)}")
    if indices:
        return _open_indexed(indices[0])
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        files = sorted(file for file in folder.iterdir() if file.suffix in PICKLED)
        if len(files) > 1:
            raise ValueError(f"{folder} has several files, name one: {_listed(files)}")
    if not files:
        raise FileNotFoundError(f"no file of weights in {folder}")
    weights: dict[str, StoredTensor] = {}
    for file in files:
        found = open_weights(file)
        twice = sorted(weights.keys() & found.keys())
        if twice:
            raise ValueError(f"{folder} has no index, and {twice[0]} is in several of its files")
        weights |= found
    return weights


def _open_indexed(index: Path) -> dict[str, StoredTensor]:
    try:
        homes = json.loads(index.read_text())["weight_map"]
        files = sorted(set(homes.values()))
        if not files:
            raise ValueError("it names no file")
        elsewhere = [file for file in files if Path(file).name != file]
        if elsewhere:
            raise ValueError(f"it names {elsewhere[0]!r}, which is not beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of weights: {error}") from error
    weights: dict[str, StoredTensor] = {}
    for file in files:
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index} names {file}, which is not there")
        found = open_weights(index.parent / file)
        named = {name for name, home in homes.items() if home == file}
        different = sorted(named ^ found.keys())
        if different:
            where = "but not in it" if different[0] in named else "and is not in the index"
            raise ValueError(f"{index} and {file} differ: {different[0]} is in one {where}")
        weights |= found
    return weights


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            # What `get_tensor` returns is mapped, not read.
            return {
                name: StoredTensor(tensor.shape, tensor.dtype, partial(_read, file, name))
                for name in tensors.keys()  # noqa: SIM118 (no mapping: it has keys() only)
                for tensor in [tensors.get_tensor(name)]
            }
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _read(file: Path, name: str) -> Tensor:
    # A file that stays open keeps in memory what was read of it.
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        # The options of a training program are plain data. What a warning says of a pickle that
        # torch did not write, the error below says too.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore", UserWarning)
            content = _load(file)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error:")[2].split("\n")[0].strip()
        raise ValueError(
            f"{file} is damaged or holds more than weights, and nothing else is read"
            f"{f': {reason}' if reason else ''}"
        ) from error
    except OSError:
        raise
    except Exception as error:  # torch checks little of what it reads, so anything may come
        said = str(error).partition("\n")[0]
        raise ValueError(f"{file} is damaged: {type(error).__name__} {said}".rstrip()) from error
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{file} must hold named weights, got {type(content).__name__}")
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{file} must hold named weights, {others[0]!r} is none")
    return dict(content)


def _load(file: Path) -> object:
    options = {"map_location": "cpu", "weights_only": True}
    try:
        return torch.load(file, mmap=True, **options)
    except RuntimeError as error:
        # Files from before torch 1.6 cannot be mapped.
        if "mmap" not in str(error):
            raise
        return torch.load(file, **options)


def write_file(file: Path, weights: Mapping[str, StoredTensor]) -> None:
    """Writes a safetensors file; what comes from one is copied through a map, not held."""
    tensors = {name: stored.read().detach().contiguous() for name, stored in weights.items()}
    save_file(_apart(tensors), file, metadata={"format": "pt"})


def write_shards(
    folder: Path, weights: Mapping[str, StoredTensor], max_shard_size: int
) -> Iterator[int]:
    """Writes safetensors files of at most `max_shard_size` bytes and, of several, their index.

    Yields the bytes of each file after it is written.
    """
    from huggingface_hub.serialization import split_state_dict_into_shards_factory

    shards = split_state_dict_into_shards_factory(
        dict(weights),
        get_storage_size=lambda stored: stored.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, inside in shards.filename_to_tensors.items():
        part = {tensor: weights[tensor] for tensor in inside}
        write_file(folder / name, part)
        yield total_bytes(part.values())
    if shards.is_sharded:
        content = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(content, indent=1) + "\n")


def byte_count(text: str) -> int:
    """Bytes in a size such as 500MB or 2GB, in powers of 1000.

    Raises:
        ValueError: it is no size.

    >>> byte_count("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text.strip().upper())
    if match is None:
        raise ValueError(f"a size must be a number and KB, MB, GB or TB, got {text}")
    return int(float(match[1]) * 1000 ** (1 + ["KB", "MB", "GB", "TB"].index(match[2])))


def total_bytes(weights: Iterable[StoredTensor]) -> int:
    """The size of tensors in files."""
    return sum(stored.nbytes for stored in weights)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where two share memory: safetensors refuses those."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        if tensor.numel():
            seen.add(memory)
    return apart


def _listed(files: Iterable[Path]) -> str:
    return ", ".join(file.name for file in files)
