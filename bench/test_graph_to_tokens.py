"""From the graphs of 64 known drugs to language-model tokens, at the published size.

GIN 5 x 300, Uni-Mol 15 x 512, 8 blocks of blending, entropies and patches, 12 layers of the query
transformer, and tokens of width 4096, against the same modules and weights run padded. BRICS
fragments are known beforehand, and both sides find the entropy patches alike.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

import edt_kernels
from bench.connectors import SIZE
from bench.contest import OURS, Contender, Task, Work
from bench.padded_encoders import in_eights, padded_blending, padded_unimol
from bench.workloads import SLOTS, rows
from edt_former.chem import Molecule, read_as_written
from edt_former.connectors import make_connector
from edt_former.connectors.padded import padded_read
from edt_former.connectors.published import PublishedEDTFormer
from edt_former.graph import Blended, GraphBatch, GraphFeatures
from edt_former.graph.blending import FLAT, SPATIAL
from edt_former.tasks.heldout import heldout_molecules
from edt_former.tokens import NextAtomPredictor, PublishedPatchOptions, pack_patches
from edt_kernels import Patches, offsets_from_lengths, ragged_cat, unpad

MOLECULES, ATOMS = 64, range(18, 46)
LLM_WIDTH = 4096
PADDED, FULL = "padded", "padded, fp32"
STAGES = ("SMILES", "graph encoders", "blending", "patches", "connector")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


@cache
def molecules() -> list[Molecule]:
    """The first drugs of the held-out list that have a drug's size."""
    read = (read_as_written(smiles) for _, smiles in heldout_molecules())
    return [molecule for molecule in read if molecule.num_atoms in ATOMS][:MOLECULES]


def read_again() -> tuple[Tensor, ...]:
    """Atoms and bonds of all molecules from their SMILES; conformers are known beforehand."""
    graph = GraphBatch.pack([read_as_written(molecule.smiles) for molecule in molecules()])
    return graph.atom_features, graph.bond_index, graph.bond_features


@cache
def batch() -> GraphBatch:
    places = [3 * rows(m.num_atoms, 3, seed=4).numpy() for m in molecules()]
    return GraphBatch.pack(molecules(), places)


@cache
def encoder(dtype: torch.dtype) -> Blended:
    torch.manual_seed(0)
    model = Blended(spatial={"hydrogens": False}, special_tokens=True)
    return model.to(dtype).eval().requires_grad_(False)


@cache
def connector(dtype: torch.dtype) -> PublishedEDTFormer:
    torch.manual_seed(1)
    size = {name: value for name, value in SIZE.items() if name != "num_queries"}
    size |= {"name": "edt_former_published", "llm_width": LLM_WIDTH}
    return make_connector(size).to(dtype).eval().requires_grad_(False)


@cache
def predictor() -> NextAtomPredictor:
    torch.manual_seed(2)
    return NextAtomPredictor({"vocabulary": "published"}).eval().requires_grad_(False)


@cache
def fragments() -> Patches:
    options = PublishedPatchOptions(sources=("brics",))
    return pack_patches(options.find(molecules(), None)["brics"])


def find_patches() -> dict[str, Patches]:
    options = PublishedPatchOptions(sources=("entropy",))
    found = options.find(molecules(), predictor())["entropy"]
    return {"brics": fragments(), "entropy": pack_patches(found)}


@cache
def token_offsets() -> Tensor:
    """[B + 1]."""
    counts = {source: p.patch_offsets.diff().tolist() for source, p in find_patches().items()}
    tokens = connector(torch.float32).token_counts(counts, len(molecules()))
    return offsets_from_lengths(torch.tensor(tokens))


def joined(flat: GraphFeatures, spatial: GraphFeatures) -> GraphFeatures:
    return GraphFeatures(
        *ragged_cat([flat.values, spatial.values], [flat.offsets, spatial.offsets])
    )


def ragged(dtype: torch.dtype) -> Tensor:
    return connector(dtype)(encoder(dtype)(batch()), find_patches()).values


def padded(dtype: torch.dtype) -> Tensor:
    """Tokens [B, 96, width]; GIN, which has no padding, and the patches are the ragged ones."""
    model, read = encoder(dtype), connector(dtype)
    unimol = model.graph_encoder[SPATIAL]
    flat = model.flat(batch())
    tokens = unimol._tokens(batch())
    ids, real = in_eights(tokens.ids[:, None], tokens.offsets)
    places, _ = in_eights(tokens.positions, tokens.offsets)
    spatial = model.ln_graph[SPATIAL](padded_unimol(unimol, ids[..., 0], places, real))
    rectangle, known = in_eights(flat.values, flat.offsets)
    views = padded_blending(model.blending_module, rectangle, spatial, (known, real))
    cuts = flat.offsets, tokens.offsets
    features = joined(
        *(GraphFeatures(unpad(view, cut), cut) for view, cut in zip(views, cuts, strict=True))
    )
    queries = read.queries(features, find_patches())
    return read.llm_proj(padded_read(read, queries, read.keys(features), slots=SLOTS))


def stages(dtype: torch.dtype) -> list[Contender]:
    """Ours by stage, each from what the stage before it gives."""
    model, read = encoder(dtype), connector(dtype)
    views = model.flat(batch()), model.spatial(batch())
    features = joined(*model.blending_module(*views))
    patches = find_patches()
    queries, keys = read.queries(features, patches), read.keys(features)
    calls = {
        "SMILES": read_again,
        "graph encoders": lambda: tuple(
            view.values for view in (model.flat(batch()), model.spatial(batch()))
        ),
        "blending": lambda: tuple(view.values for view in model.blending_module(*views)),
        "patches": lambda: read.queries(features, find_patches()).values,
        "connector": lambda: read.llm_proj(read.Qformer(*queries, *keys).queries),
    }
    found = {name: calls[name]() for name in calls}
    return [
        Contender(name, calls[name], _double(found[name]), aside=True, packed=tuple)
        for name in STAGES
    ]


def _double(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    found = (found,) if isinstance(found, Tensor) else found
    return tuple(x.double() for x in found)


def flops() -> float:
    """Of dense products and attention over the rows that exist."""
    atoms = batch().offsets.diff().double()
    queries = token_offsets().diff().double()
    flat, spatial, keys = atoms + 1, atoms + 2, 2 * atoms + 3
    model, read = encoder(torch.float32), connector(torch.float32)

    def dense(module: nn.Module, rows: Tensor) -> float:
        weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
        return 2 * weights * float(rows.sum())

    def attend(width: int, rows: Tensor, others: Tensor) -> float:
        return 4 * width * float((rows * others).sum())

    unimol, blocks = model.graph_encoder[SPATIAL], model.blending_module.cross_attn_blocks
    layers = read.Qformer.bert.encoder.layer
    total = dense(model.graph_encoder[FLAT], flat) + dense(unimol.encoder, spatial)
    total += dense(unimol.gbf_proj, spatial.square())
    total += len(unimol.encoder.layers) * attend(unimol.width, spatial, spatial)
    total += dense(blocks, (flat + spatial) / 2)
    total += len(blocks) * sum(
        attend(model.width, a, b) for a in (flat, spatial) for b in (flat, spatial)
    )
    for layer in layers:
        cross = layer.crossattention.self
        total += dense(layer, queries) + dense(cross.key, keys) + dense(cross.value, keys)
        total -= dense(cross.key, queries) + dense(cross.value, queries)
        total += attend(read.options.width, queries, queries + keys)
    return total + dense(read.llm_proj, queries)


def without_amx() -> str:
    """Why the goal in bfloat16, which is for tiles, is not judged here; "" where it is."""
    isa = edt_kernels.build_info()["cpu_isa"]
    return "" if isa == "amx" else f"AMX: this processor has none ({isa})"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_graph_to_tokens(contest, goal, dtype):
    offsets = token_offsets()

    def packed(found: tuple[Tensor, ...]) -> list[Tensor]:
        return [unpad(found[0], offsets)]

    truth = (unpad(padded(torch.float32), offsets).double(),)
    contenders = [
        Contender(OURS, lambda: ragged(dtype), truth),
        Contender(PADDED, lambda: padded(dtype), truth, packed=packed),
        *stages(dtype),
    ]
    if dtype != torch.float32:
        contenders.append(
            Contender(
                FULL, lambda: padded(torch.float32), truth, packed=packed, caveat=without_amx()
            )
        )
    weights = (*encoder(dtype).parameters(), *connector(dtype).parameters())
    outcome = contest(
        "graph to tokens",
        f"{len(molecules())} drugs",
        Task((rows(1, 1, dtype=dtype),), (), truth, 1),
        contenders,
        work=Work(sum(p.nbytes for p in weights), flops()),
        goals={PADDED: 1.9} if dtype == torch.float32 else {FULL: 8.0},
        tolerance=TOLERANCE[dtype],
        budget=1,
    )
    seconds = {name: outcome.entries[name].median for name in STAGES}
    outcome.extra["molecules/s"] = len(molecules()) / outcome.entries[OURS].median
    for name in STAGES:
        outcome.extra[f"% of the time, {name}"] = 100 * seconds[name] / sum(seconds.values())
    if dtype == torch.float32:
        title = f"graph to tokens, {outcome.title}: connector over predictor, entropy and patches"
        goal(title, seconds["connector"] / seconds["patches"], 100.0)
