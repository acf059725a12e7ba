"""The published program's numbers for 20 molecules, shipped so that every run checks parity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rdkit import Chem
from safetensors.torch import load_file

import edt_kernels
from edt_former.chem import brics_fragments

FOLDER = Path(__file__).parent / "golden"
MOLECULES = json.loads((FOLDER / "published.json").read_text())
NAMES = [molecule["name"] for molecule in MOLECULES]


@pytest.fixture(scope="module")
def logits() -> list[torch.Tensor]:
    """Per molecule [n + 1, 39]."""
    rows = load_file(FOLDER / "published.safetensors")["logits"]
    return list(rows.split([len(molecule["entropies_bits"]) for molecule in MOLECULES]))


def test_entropies(logits):
    for molecule, rows in zip(MOLECULES, logits, strict=True):
        expected = torch.tensor(molecule["entropies_bits"])
        found = edt_kernels.entropy(rows, unit="bits")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("q", [0.5, 0.75, 0.9])
def test_thresholds_and_patches(logits, q):
    after = [rows[1:] for rows in logits]  # the uncertainty after each atom
    offsets = edt_kernels.offsets_from_lengths(torch.tensor([len(rows) for rows in after]))
    _, patches = edt_kernels.entropy_patches(
        torch.cat(after), offsets, unit="bits", rule="rising_edge", q=q
    )
    thresholds = torch.tensor([molecule["thresholds"][str(q)] for molecule in MOLECULES])
    torch.testing.assert_close(patches.threshold, thresholds, rtol=0, atol=1e-5)
    for molecule, ids in zip(MOLECULES, patches.ids.split(offsets.diff().tolist()), strict=True):
        assert ids.tolist() == molecule["patch_ids"][str(q)], molecule["name"]


@pytest.mark.parametrize("molecule", MOLECULES, ids=NAMES)
def test_brics_fragments(molecule):
    found = brics_fragments(Chem.MolFromSmiles(molecule["smiles"]))
    assert found.tolist() == molecule["brics_ids"]
