"""Results as sections of a report."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

import torch

from edt_former.report.answers import AnsweredRow
from edt_former.report.drawing import describe_patches
from edt_former.report.page import Card, Picture, Section
from edt_former.report.patches import PatchedRow
from edt_former.report.speed import PUBLISHED_SLOTS, Speed
from edt_former.report.speed_plot import speed_plot
from edt_former.tasks.accuracy import Accuracy
from edt_former.tasks.questions import FACT_BY_KEY, FACTS, QUESTION_TYPES
from edt_kernels import build_info

PACKAGES = ("edt-kernels", "torch", "transformers", "rdkit", "matplotlib")


def answers_section(rows: Iterable[AnsweredRow], keys: Sequence[str], text: str) -> Section:
    """What the model answers about molecules, each answer beside the truth."""
    header = ["molecule", "atoms", "patches", f"tokens (not {PUBLISHED_SLOTS})", *keys]
    lines = []
    for row in rows:
        if row.reason:
            lines.append([row.name[:30], "-", "-", "-", row.reason[:60], *[""] * (len(keys) - 1)])
        else:
            marks = [_mark(row.answers[key], row.truth[key]) for key in keys]
            lines.append([row.name[:30], row.atoms, row.patches, row.tokens, *marks])
    notes = [
        f"tokens: what the molecule takes; in arXiv:2602.02742, {PUBLISHED_SLOTS} slots each",
        *(f"{key}: {FACT_BY_KEY[key].phrasings[0]}" for key in keys),
        "✓ agrees with RDKit; ✗ does not, and RDKit's answer follows",
    ]
    return Section("Answers", text, notes, [(header, lines)])


def _mark(answer: str, truth: str) -> str:
    return f"{answer} ✓" if answer == truth.lower() else f"{answer} ✗ {truth}"


def accuracy_section(
    results: Mapping[str, Mapping[str, Accuracy]], *, count: int, listed: int
) -> Section:
    """Accuracies of a model and its baselines.

    Args:
        results: by who answers, the model first, and by type of question; see
            `edt_former.tasks.evaluation.compare`.
        count: of the molecules asked about, drawn from `listed`.
    """
    ours, *others = results.values()
    text = (
        f"Right answers on {count} of {listed} held-out drugs, {len(FACTS)} questions each, "
        f"mean over {len(QUESTION_TYPES)} types of question [95 % interval]:"
    )
    by_type = [
        (kind, ours[kind], f"{max(other[kind].value for other in others):.3f}")
        for kind in QUESTION_TYPES
    ]
    tables = [
        (["who answers", "right"], [(who, by_kind["macro"]) for who, by_kind in results.items()]),
        (["type of question", "right", "best baseline"], by_type),
    ]
    return Section("Accuracy", text, tables=tables)


def connectors_section(
    results: Mapping[str, Mapping[str, Accuracy]], reads: Mapping[str, str], *, asked: str
) -> Section:
    """Accuracies of connectors beside one another, the best first.

    Args:
        results: by connector and by type of question.
        reads: what the graph encoder of each reads.
        asked: about which molecules.
    """
    text = (
        f"Every connector that ships, between frozen parts, right answers on {asked}, mean over "
        f"{len(QUESTION_TYPES)} types of question [95 % interval]:"
    )
    ranked = sorted(results, key=lambda name: -results[name]["macro"].value)
    header = ["connector", "graph encoder reads", "right", "functional groups", "rings"]
    kinds = ("macro", "functional groups", "ring count")
    lines = [(name, reads[name], *(results[name][kind] for kind in kinds)) for name in ranked]
    return Section("Connectors", text, tables=[(header, lines)])


def speed_section(speeds: Sequence[Speed], *, molecules: int) -> Section:
    """Times of connectors over a batch of so many drugs."""
    threads = torch.get_num_threads()
    text = (
        f"Connector of published size (12 layers, width 768, random weights, fp32) on "
        f"{molecules} drugs, {threads} thread{'s' if threads > 1 else ''}, interleaved, medians:"
    )
    header = ["connector", "molecules/s", "query tokens/s", "ms", "time over ours (paired)"]
    lines = [
        (
            s.name,
            f"{s.molecules:.1f}",
            f"{s.queries:.0f}",
            f"{1000 * s.seconds:.0f}",
            f"{s.ratio:.2f}",
        )
        for s in speeds
    ]
    return Section("Speed", text, tables=[(header, lines)])


def speed_card(speeds: Sequence[Speed]) -> Card:
    """The picture that belongs to `speed_section`."""
    alt = "; ".join(f"{s.name}: {s.molecules:.1f} molecules per second" for s in speeds)
    return Card("Molecules per second", "", [Picture.of(speed_plot(speeds), alt)])


def patches_section(rows: Iterable[PatchedRow]) -> Section:
    """Pictures of molecules in their patches, and of the entropies that cut them."""
    text = (
        "The next-atom predictor reads a molecule atom by atom; where its uncertainty "
        "peaks, a patch opens, and every patch is a query to the graph encoder. Numbers tell which "
        "patch an atom belongs to, in both pictures: a patch is a run of atoms in the SMILES, so "
        "it may lie in several places of the molecule."
    )
    cards = []
    for row in rows:
        patched = row.patched
        if patched is None:
            continue
        heights = ", ".join(f"{entropy:.2f}" for entropy in patched.entropies)
        pictures = [
            Picture(
                patched.svg(), f"{row.name}, {describe_patches(patched.molecule, patched.ids)}"
            ),
            Picture.of(patched.curve(), f"Entropies of its atoms in {patched.unit}: {heights}"),
        ]
        cards.append(Card(row.name, patched.molecule.smiles, pictures))
    return Section("Patches", text, cards=cards)


def circumstances_section(facts: Iterable[tuple[str, object]]) -> Section:
    """When, where and with what a report was made; `facts` are its own."""
    info = build_info()
    lines = [
        ("date", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
        *facts,
        ("kernels", f"native, {info['cpu_isa']}" if info["native"] else info["reason"]),
        ("threads", torch.get_num_threads()),
        ("machine", f"{platform.system()} {platform.machine()}"),
        ("Python", platform.python_version()),
    ]
    for package in PACKAGES:
        try:
            lines.append((package, version(package)))
        except PackageNotFoundError:
            lines.append((package, "not installed"))
    text = (
        "The truth of an answer is computed by RDKit. Intervals are percentiles of a bootstrap "
        "over molecules. Speeds are medians over rounds in which the connectors take turns, after "
        "their outputs were found to agree; a ratio compares times of one round."
    )
    return Section("How it was measured", text, tables=[(["", ""], lines)])
