"""Checkpoints: what was trained, and a manifest of the frozen parts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from edt_former.config import MoleculeConfig
from edt_former.graph import make_encoder
from edt_former.language.adapters import base_of, plain_names, plain_state
from edt_former.language.frozen import (
    WEIGHTS,
    content_hash,
    load_part,
    load_strictly,
    module_weights,
    read_weights,
    save_part,
    write_weights,
)
from edt_former.language.manifest import FrozenPart, Manifest
from edt_former.processor import PROCESSOR_FILE, TOKENIZER_FILE, MoleculeProcessor
from edt_former.tokens import NextAtomPredictor

if TYPE_CHECKING:
    from edt_former.model import MoleculeLM

FROZEN_PARTS = ("language_model", "graph_encoder", "predictor")
HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt")


def save_checkpoint(
    model: MoleculeLM,
    folder: Path,
    *,
    save_frozen: bool,
    frozen_folder: Path | None,
    frozen_names: Mapping[str, str],
    dtype: torch.dtype | None,
    state_dict: Mapping[str, Tensor] | None,
) -> None:
    """See `MoleculeLM.save_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = (frozen_folder or folder).resolve()
    folders = {name: shared / frozen_names.get(name, name) for name in present_parts(model)}
    if save_frozen:
        _save_frozen(model, folders, dtype)
    if save_frozen or frozen_folder is not None:
        parts = {name: part_in(model, name, where) for name, where in folders.items()}
    else:
        parts = {name: _known_part(model, name) for name in present_parts(model)}
    model.frozen_parts = parts
    Manifest(folder.resolve(), parts).write()
    state = model.state_dict() if state_dict is None else state_dict
    write_weights(folder / WEIGHTS, {n: state[n] for n in trained_names(model)}, dtype)
    portable(model.config).save_pretrained(folder)
    if model.processor is not None:
        beside = parts["language_model"].path
        has_tokenizer = beside is not None and Path(beside, TOKENIZER_FILE).exists()
        model.processor.save_pretrained(folder, save_tokenizer=not has_tokenizer)


def load_checkpoint(
    cls: type[MoleculeLM],
    folder: Path | str,
    given: Mapping[str, nn.Module | Path | str | None],
    *,
    config: MoleculeConfig | None,
    dtype: torch.dtype | None,
    verify: bool,
) -> MoleculeLM:
    """See `MoleculeLM.from_pretrained`; `given` holds the frozen parts by name."""
    folder = local_folder(folder)
    manifest = Manifest.read(folder)
    config = config or MoleculeConfig.from_pretrained(folder)
    modules, parts = {}, {}
    for name, part in manifest.parts.items():
        source = given[name] if given[name] is not None else manifest.folder(name)
        if not isinstance(source, nn.Module):
            source = local_folder(source)
        if verify:
            _verify(name, source, part)
        if isinstance(source, nn.Module):
            modules[name], path = source, None
        else:
            modules[name], path = _load_frozen(name, source, dtype), str(source.resolve())
        parts[name] = FrozenPart(part.sha256, path, part.name, part.without)
    model = cls(config, **modules)
    model.frozen_parts = parts
    weights = dict(read_weights(folder))
    load_strictly(model, weights, source=folder, names=trained_names(model))
    model.processor = _load_processor(folder, manifest, model)
    return model.eval()


def local_folder(source: Path | str) -> Path:
    """A folder as it is; anything else is the name of a repository on the Hugging Face Hub.

    Raises:
        FileNotFoundError: it can be neither.
    """
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or not 1 <= len(str(source).split("/")) <= 2:
        raise FileNotFoundError(f"no such folder, and no name of a repository: {source}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), allow_patterns=list(HUB_FILES)))


def present_parts(model: MoleculeLM) -> list[str]:
    """The names of the model's frozen parts."""
    return [name for name in FROZEN_PARTS if getattr(model, name) is not None]


def trained_names(model: MoleculeLM) -> list[str]:
    """The entries of the model's state that a checkpoint holds.

    All of the connector (its buffers too), the new rows, and whatever else is trainable.
    """
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    kept = ("connector.", "new_rows")
    return [n for n in model.state_dict() if n in trainable or n.startswith(kept)]


def _trained_inside(model: MoleculeLM, part: str) -> tuple[str, ...]:
    """The weights of a frozen part that are trained after all: the table."""
    prefix = f"{part}."
    names = (n.removeprefix(prefix) for n in trained_names(model) if n.startswith(prefix))
    return tuple(plain_names(names))


def part_in(model: MoleculeLM, name: str, folder: Path) -> FrozenPart:
    """A frozen part that is in `folder`, as a manifest names it."""
    without = _trained_inside(model, name)
    sha256 = content_hash(read_weights(folder), without=without)
    return FrozenPart(sha256, str(folder), folder.name, without)


def _known_part(model: MoleculeLM, name: str) -> FrozenPart:
    """A frozen part from where it was read, or one that is in memory only."""
    known = model.frozen_parts.get(name)
    without = _trained_inside(model, name)
    if known is not None and known.without == without:
        return known
    module = getattr(model, name)
    sha256 = content_hash(module_weights(module), without=without)
    folder = getattr(module, "part_folder", None)
    if folder is None or not folder.is_dir():
        return FrozenPart(sha256, None, getattr(module, "name_or_path", ""), without)
    unchanged = content_hash(read_weights(folder), without=without) == sha256
    return FrozenPart(sha256, str(folder) if unchanged else None, folder.name, without)


def _save_frozen(model: MoleculeLM, folders: Mapping[str, Path], dtype: torch.dtype | None) -> None:
    for name, folder in folders.items():
        module = base_of(getattr(model, name))
        if not isinstance(module, PreTrainedModel):
            save_part(module, folder, dtype=dtype)
            continue
        if dtype is not None and dtype != module.dtype:
            module = copy.deepcopy(module).to(dtype)
        module.save_pretrained(folder, state_dict=plain_state(module.state_dict()))
    if model.processor is not None:
        model.processor.tokenizer.save_pretrained(folders["language_model"])


def portable(config: MoleculeConfig) -> MoleculeConfig:
    """A copy without the folder that the language model was read from: the manifest has it."""
    config = copy.deepcopy(config)
    if Path(config.text_config.name_or_path or "").is_dir():
        config.text_config.name_or_path = ""
    return config


def _verify(name: str, source: nn.Module | Path, part: FrozenPart) -> None:
    weights = module_weights(source) if isinstance(source, nn.Module) else read_weights(source)
    found = content_hash(weights, without=part.without)
    if found != part.sha256:
        where = f"in {source}" if isinstance(source, Path) else "given"
        raise ValueError(
            f"the {name} {where} is not the one that the checkpoint was trained with: "
            f"sha256 of its weights is {found}, the manifest says {part.sha256}"
        )


def _load_frozen(name: str, folder: Path, dtype: torch.dtype | None) -> nn.Module:
    if name == "graph_encoder":
        return load_part(make_encoder, folder)
    if name == "predictor":
        return load_part(NextAtomPredictor, folder)
    model, loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    problems = {
        what: sorted(map(str, loaded[f"{what}_keys"]))
        for what in ("missing", "unexpected", "mismatched")
        if loaded[f"{what}_keys"]
    }
    if problems:
        listed = "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in problems.items())
        raise ValueError(f"the weights in {folder} do not fit: {listed}")
    return model


def _load_processor(
    folder: Path, manifest: Manifest, model: MoleculeLM
) -> MoleculeProcessor | None:
    if not (folder / PROCESSOR_FILE).exists():
        return None
    beside = (model.frozen_parts["language_model"], manifest.parts["language_model"])
    places = [folder, *(Path(part.path) for part in beside if part.path is not None)]
    tokenizer = next((place for place in places if (place / TOKENIZER_FILE).exists()), None)
    if tokenizer is None:
        return None
    return MoleculeProcessor.from_pretrained(folder, tokenizer=tokenizer, predictor=model.predictor)
