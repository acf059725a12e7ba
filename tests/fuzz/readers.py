"""Readers of files and SMILES under hostile bytes: a result, or a `ValueError` that says what.

`python -m tests.fuzz.readers TARGET [libFuzzer options]` runs one of the `TARGETS` under atheris
(`pip install atheris`), guided by coverage, until it is stopped (`-max_total_time=60`).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from edt_former.chem import Invalid, Molecule, read_as_written, read_molecule
from edt_former.chem.molecule_file import read_file
from edt_former.data.format import MANIFEST, Part, PreparedMolecule, Row, read_manifest, write_part
from edt_former.data.raw import read_rows
from edt_former.language.manifest import Manifest
from edt_former.weights import open_weights

SUFFIXES = (".smi", ".csv", ".tsv", ".txt", ".json", ".jsonl", ".csv.gz", ".jsonl.gz", ".sdf")
LONGEST = 300
"""Characters of a SMILES: RDKit's own time on longer nonsense is not ours to measure."""


@cache
def folder() -> Path:
    """Where the files lie while this process runs."""
    made = tempfile.TemporaryDirectory(prefix="edt-fuzz-")
    folder.kept = made
    return Path(made.name)


def _file(name: str, data: bytes) -> Path:
    path = folder() / name
    path.write_bytes(data)
    return path


def smiles(data: bytes) -> None:
    """Any text is a molecule or invalid, with a reason."""
    text = data.decode("utf-8", "replace")[:LONGEST]
    for read in (read_molecule, read_as_written):
        found = read(text)
        assert isinstance(found, Molecule | Invalid)
        if isinstance(found, Invalid):
            assert found.reason
        else:
            assert found.bond_index.size == 0 or found.bond_index.max() < len(found.atom_features)


def table(data: bytes) -> None:
    """Any file is rows, some with a reason against them, or refused by name."""
    suffix = SUFFIXES[data[0] % len(SUFFIXES)] if data else ".csv"
    path = _file(f"table{suffix}", data[1:])
    for read in (read_rows, read_file):
        try:
            for _ in read(path):
                pass
        except ValueError as error:
            assert path.name in str(error), error


def part(data: bytes) -> None:
    """A part of prepared data is rows, or refused by name."""
    path = _file("part-00000.arrow", data)
    try:
        read = Part(path)
    except ValueError as error:
        assert path.name in str(error), error
        return
    read.usable(), read.has_targets(), read.atoms(), read.characters(), read.blocks()
    for i in range(len(read)):
        for prepared in read.row(i).molecules:
            molecule = prepared.molecule
            atoms, bonds = len(molecule.atom_features), molecule.bond_index
            assert bonds.size == 0 or bonds.max() < atoms
            assert bonds.shape[1] == len(molecule.bond_features)
            assert prepared.coordinates is None or len(prepared.coordinates) == atoms
            assert all(len(ids) == atoms for ids in prepared.patches.values())


def weights(data: bytes) -> None:
    """A file of weights is tensors, or refused by name; nothing in it is run."""
    path = _file("weights.safetensors" if data[:1] != b"\x80" else "weights.bin", data)
    try:
        found = open_weights(path)
    except ValueError as error:
        assert path.name in str(error), error
        return
    for stored in found.values():
        assert stored.read().shape == stored.shape


def manifest(data: bytes) -> None:
    """The files that tell what is in a folder: read, or refused by name."""
    for name, read in ((MANIFEST, read_manifest), ("manifest.json", Manifest.read)):
        _file(name, data)
        try:
            read(folder())
        except ValueError as error:
            assert name in str(error), error
    index = _file("model.safetensors.index.json", data)
    try:
        open_weights(folder())
    except (ValueError, FileNotFoundError) as error:
        assert index.name in str(error), error
    index.unlink()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "smiles": smiles,
    "table": table,
    "part": part,
    "weights": weights,
    "manifest": manifest,
}


@cache
def seeds(target: str) -> list[bytes]:
    """Good files, from which bad ones are made."""
    if target == "smiles":
        texts = ("CC(=O)Oc1ccccc1C(=O)O", "C/C=C\\C[C@H](N)[13CH3]", "[Na+].[Cl-]", "CC->N |C:1.1|")
        return [text.encode() for text in texts]
    if target == "table":
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
        record = json.dumps({"id": 1, "smiles": "CCO", "messages": turns})
        texts = ("CCO ethanol\nC", 'smiles,text\nCCO,"a, b"\n', "CID\tSMILES\ttext\n7\tCC\tx\n")
        plain = [bytes([i]) + text.encode() for i, text in enumerate(texts)]
        return [*plain, b"\x04[" + record.encode() + b"]", b"\x05" + record.encode()]
    if target == "part":
        molecules = [read_molecule(s) for s in ("CCO", "c1ccccc1", "[Na+].[Cl-]")]
        path = folder() / "good.arrow"
        rows = [Row(i, molecules=(PreparedMolecule(m),), text="x") for i, m in enumerate(molecules)]
        write_part(path, [*rows, Row(3, reason="bad"), Row(4, turns=(("user", "?"),))])
        return [path.read_bytes()]
    if target == "weights":
        import torch
        from safetensors.torch import save

        return [save({"a": torch.ones(2, 3), "b": torch.zeros(1)})]
    texts = (
        '{"parts": 1}',
        '{"parts": {"predictor": {"sha256": "0", "path": "x", "without": []}}}',
    )
    return [text.encode() for text in (*texts, '{"weight_map": {"a": "model.safetensors"}}')]


def main() -> None:
    """Hand a target to atheris."""
    import atheris

    name = sys.argv.pop(1)
    corpus = folder() / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(seeds(name)):
        (corpus / str(i)).write_bytes(seed)
    atheris.instrument_all()
    atheris.Setup([*sys.argv, str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
