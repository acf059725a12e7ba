"""What is in the folder of a checkpoint, without loading it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edt_former.language.frozen import content_hash, read_weights
from edt_former.language.manifest import MANIFEST, Manifest
from edt_former.report.table import table
from edt_former.train.provenance import read_provenance
from edt_former.weights import PICKLED, StoredTensor, open_weights

TRAINABLE = "trainable.json"
NOT_KNOWN = "the checkpoint does not say where it is"


def inspect_checkpoint(folder: Path | str, *, verify: bool = False) -> dict[str, Any]:
    """Parts, sizes, frozen parts, what was trained, provenance.

    Args:
        folder: of a checkpoint, of a run, or of a part.
        verify: read the frozen parts and compare their hashes.

    Returns:
        "folder"; "parts": per file of weights and first name its values, bytes and types;
        "frozen": per frozen part its folder, hash and state ("there", "verified", or what is
        wrong); "trained", values a run trained, None where it is not known; "provenance".

    Raises:
        ValueError: there is no weight and no manifest in the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} must be a folder")
    parts = [
        part for where in (folder, *sorted(folder.iterdir())) for part in _parts(where, folder)
    ]
    frozen = []
    if (folder / MANIFEST).is_file():
        manifest = Manifest.read(folder)
        for name, part in manifest.parts.items():
            state = _state(part.path, part.sha256, part.without, verify)
            frozen.append({"part": name, "path": part.path, "sha256": part.sha256, "state": state})
    if not parts and not frozen:
        raise ValueError(f"{folder} holds neither weights nor a {MANIFEST}")
    return {
        "folder": str(folder),
        "parts": parts,
        "frozen": frozen,
        "trained": _trained(folder),
        "provenance": read_provenance(folder),
    }


def _parts(where: Path, root: Path) -> Iterator[dict[str, Any]]:
    """The tensors of a folder's own files by the first part of their names."""
    suffixes = (".safetensors", *PICKLED)
    if not where.is_dir() or not any(f.suffix == suffixes[0] for f in where.iterdir()):
        return
    groups: dict[str, list[StoredTensor]] = {}
    for name, stored in open_weights(where).items():
        groups.setdefault(name.partition(".")[0], []).append(stored)
    for name, tensors in groups.items():
        yield {
            "where": str(where.relative_to(root)),
            "part": name,
            "values": sum(t.shape.numel() for t in tensors),
            "bytes": sum(t.nbytes for t in tensors),
            "types": sorted({str(t.dtype).removeprefix("torch.") for t in tensors}),
        }


def _state(path: str | None, sha256: str, without: tuple[str, ...], verify: bool) -> str:
    if path is None:
        return NOT_KNOWN
    if not Path(path).is_dir():
        return "missing"
    if not verify:
        return "there"
    found = content_hash(read_weights(path), without=without)
    return "verified" if found == sha256 else f"another one, its sha256 is {found}"


def _trained(folder: Path) -> int | None:
    """Values that the run of this folder trains, as it wrote them down."""
    for file in (folder / TRAINABLE, folder.parent / TRAINABLE):
        if file.is_file():
            return json.loads(file.read_text())["total"]
    return None


def lines(found: Mapping[str, Any]) -> list[str]:
    """What `inspect_checkpoint` found, for people."""
    parts = [
        (
            part["where"],
            part["part"],
            f"{part['values']:,}",
            f"{part['bytes'] / 1e6:.2f} MB",
            ", ".join(part["types"]),
        )
        for part in found["parts"]
    ]
    values, size = (sum(part[key] for part in found["parts"]) for key in ("values", "bytes"))
    parts.append(("in all", "", f"{values:,}", f"{size / 1e6:.2f} MB", ""))
    text = [found["folder"], "", table(["folder", "part", "values", "size", "types"], parts)]
    if found["trained"] is not None:
        text += ["", f"trained by its run: {found['trained']:,} values"]
    if found["frozen"]:
        rows = [(p["part"], p["state"], p["path"] or "", p["sha256"][:12]) for p in found["frozen"]]
        text += ["", table(["frozen part", "state", "folder", "sha256"], rows)]
    if found["provenance"] is not None:
        text += ["", *_provenance(found["provenance"])]
    return text


def _provenance(content: Mapping[str, Any]) -> list[str]:
    data = [f"{one['folder']} ({one['usable']} of {one['rows']} rows)" for one in content["data"]]
    text = [
        f"stage: {content['stage']}, step {content['step']}, {content['rows']} rows of "
        f"{', '.join(data)}",
        f"versions: {', '.join(f'{n} {v}' for n, v in content['versions'].items())}",
        "told:",
    ]
    return text + [f"  {line}" for line in json.dumps(content["config"], indent=1).splitlines()]
