"""Parts that stay as they are: how their weights are told apart, stored and read back."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edt_former.language.adapters import base_of, plain_state
from edt_former.weights import SHARED, WEIGHTS, shared_folders

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
HASHED_AT_A_TIME = 2**24
"""Values; in float32 a large language model's table alone takes gigabytes."""


def content_hash(tensors: Iterable[tuple[str, Tensor]], *, without: Collection[str] = ()) -> str:
    """SHA-256 of the names, shapes and values of tensors.

    Floating-point values are hashed in float32, so a bfloat16 file and the float32 module that was
    read from it have one hash. The order of the tensors does not matter.

    Args:
        tensors: pairs of name and value.
        without: names to leave out.

    Example:
        >>> import torch
        >>> weights = {"a": torch.ones(2), "b": torch.zeros(1)}
        >>> halves = {name: x.bfloat16() for name, x in reversed(weights.items())}
        >>> content_hash(weights.items()) == content_hash(halves.items())
        True
    """
    digests = {}
    for name, tensor in tensors:
        if name not in without:
            digest = hashlib.sha256(f"{list(tensor.shape)}".encode())
            for part in tensor.detach().reshape(-1).split(HASHED_AT_A_TIME):
                values = part.float() if part.is_floating_point() else part
                digest.update(values.cpu().numpy())
            digests[name] = digest.hexdigest()
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def module_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a module as a checkpoint holds them: what is tied comes once, and what
    belongs to an adapter not at all."""
    state = plain_state(module.state_dict())
    tied = getattr(base_of(module), "all_tied_weights_keys", {})
    for name, tensor in state.items():
        source = state.get(tied.get(name))
        if source is None or source.data_ptr() != tensor.data_ptr():
            yield name, tensor


def read_weights(folder: Path | str) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of every safetensors file in `folder`, one at a time.

    Those that it shares with other folders come last, see `edt_former.weights.shared_folders`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no .safetensors file in {folder}")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping: it has keys() only)
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    for prefix, shared in shared_folders(folder).items():
        yield from ((prefix + name, tensor) for name, tensor in read_weights(shared))


def share_weights(folder: Path | str, shared: Mapping[str, Path | str]) -> None:
    """Takes weights out of a part's file that other folders hold, and notes where they are.

    The part is read as before, and has the same hash.

    Args:
        folder: of the part.
        shared: by what stands before the names of the weights, the folder that holds them.

    Raises:
        ValueError: the weights there have other names or bits.

    Example:
        >>> import tempfile
        >>> from edt_former.graph import make_encoder
        >>> encoder = make_encoder({"name": "gin", "layers": 1, "width": 8})
        >>> with tempfile.TemporaryDirectory() as root:
        ...     flat, whole = Path(root, "flat"), Path(root, "whole")
        ...     save_part(encoder, flat)
        ...     pair = nn.ModuleDict({"one": encoder, "two": nn.Linear(1, 1)})
        ...     pair.config = {}
        ...     save_part(pair, whole)
        ...     share_weights(whole, {"one.": flat})
        ...     (whole / "shared.json").read_text().split()
        ['{', '"one.":', '"../flat"', '}']
    """
    folder = Path(folder)
    own = dict(read_weights(folder))
    for prefix, other in shared.items():
        theirs = {prefix + name: tensor for name, tensor in read_weights(other)}
        mine = {name for name in own if name.startswith(prefix)}
        different = sorted(mine ^ theirs.keys()) or [
            name for name in sorted(mine) if not _same_bits(own[name], theirs[name])
        ]
        if different:
            raise ValueError(
                f"{folder} and {other} must share their weights, {different[0]} differs"
            )
        own = {name: tensor for name, tensor in own.items() if name not in mine}
    write_weights(folder / WEIGHTS, own, None)
    places = {prefix: os.path.relpath(other, folder) for prefix, other in shared.items()}
    write_json(folder / SHARED, {p: Path(where).as_posix() for p, where in places.items()})


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def save_part(module: nn.Module, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
    """Writes a graph encoder or a predictor: `config.json` (its `config`) and its weights.

    Args:
        dtype: of the floating-point weights on disk; None keeps them.

    Example:
        >>> import tempfile
        >>> from edt_former.graph import make_encoder
        >>> encoder = make_encoder({"name": "gin", "layers": 1, "width": 8})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_part(encoder, folder, dtype=torch.bfloat16)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['config.json', 'model.safetensors']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SHARED).unlink(missing_ok=True)
    write_json(folder / CONFIG, module.config)
    write_weights(folder / WEIGHTS, module.state_dict(), dtype)


def load_part(build: Callable[[dict[str, Any]], nn.Module], folder: Path | str) -> nn.Module:
    """Reads what `save_part` wrote, in float32; `build` makes the module from its config.

    The module remembers its `part_folder`, so that a checkpoint can say where its part is.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights do not fit the module.

    Example:
        >>> import tempfile
        >>> from edt_former.graph import make_encoder
        >>> encoder = make_encoder({"name": "gin", "layers": 1, "width": 8})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_part(encoder, folder)
        ...     read = load_part(make_encoder, folder)
        >>> content_hash(read.state_dict().items()) == content_hash(encoder.state_dict().items())
        True
    """
    module = build(json.loads((Path(folder) / CONFIG).read_text()))
    load_strictly(module, dict(read_weights(folder)), source=folder)
    module.part_folder = Path(folder).resolve()
    return module


def load_strictly(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    source: Path | str,
    names: Collection[str] | None = None,
) -> None:
    """Copies `weights` into `module`, which must have these names and shapes and no others.

    Args:
        source: where the weights are from, for the error.
        names: the entries of the module's state that are expected; None for all.

    Raises:
        ValueError: names are missing or unexpected, or shapes differ; it lists them.
    """
    state = module.state_dict()
    expected = set(state if names is None else names)
    problems = [
        _listed("missing", sorted(expected - set(weights))),
        _listed("unexpected", sorted(set(weights) - expected)),
        _listed(
            "of another shape",
            [
                f"{name} {list(weights[name].shape)} instead of {list(state[name].shape)}"
                for name in sorted(expected & set(weights))
                if weights[name].shape != state[name].shape
            ],
        ),
    ]
    if any(problems):
        raise ValueError(f"the weights in {source} do not fit: {'; '.join(filter(None, problems))}")
    module.load_state_dict(weights, strict=False)


def _listed(what: str, names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what}: {', '.join(names[:most])}{more}" if names else ""


def write_weights(file: Path, weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Writes a safetensors file, floating-point values as `dtype`."""
    cast = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in weights.items()
    }
    save_file(cast, file, metadata={"format": "pt"})


def read_json(file: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON for people, indented; whole or not at all, whenever the run is killed."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, file)


@torch.no_grad()
def input_scale(language_model: PreTrainedModel) -> float:
    """The factor between what the embedding module computes and what `inputs_embeds` expects.

    Most models take the embedding module's output as it is, and so the factor is 1; those that
    scale inside the module (Gemma) or scale `inputs_embeds` too (Granite) are among them. Some
    (Falcon-H1, MiniCPM3) scale only where they look up ids themselves. The factor is found by
    asking: the model's logits for a few ids must be those for their embeddings.

    Raises:
        ValueError: no factor makes them equal, the model reads more of an id than its embedding.
    """
    table, config = language_model.get_input_embeddings(), language_model.config
    width = table.embedding_dim
    ids = torch.arange(min(4, table.num_embeddings), device=table.weight.device)[None]
    mask = torch.ones_like(ids)
    named = (getattr(config, key, None) for key in ("embedding_multiplier", "scale_emb"))
    training = language_model.training
    if training:
        language_model.eval()
    try:
        expected = language_model(input_ids=ids, attention_mask=mask).logits
        for scale in (1.0, *filter(None, named), math.sqrt(width)):
            embeds = table(ids) * scale
            logits = language_model(inputs_embeds=embeds, attention_mask=mask).logits
            if (logits - expected).abs().max() <= 1e-3 * expected.abs().max():
                return float(scale)
    finally:
        if training:
            language_model.train()
    raise ValueError(
        f"language_model must answer to inputs_embeds as to input_ids, {config.model_type!r} does "
        "not: it reads more of a token than its embedding"
    )
