"""Molecules in bulk: from packed atoms and bonds to connector tokens, all on the device."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

import edt_kernels
from bench import connectors
from bench.contest import relative_error
from bench.gpu.checks import no_waiting
from bench.gpu.run import CheckError, Run, Section
from bench.workloads import ENCODER_WIDTH, SCREEN_SMALL, Workload
from edt_former.connectors import MoleculeTokens
from edt_former.graph import GIN, GraphBatch
from edt_former.tokens import NextAtomPredictor, PatchOptions, cut_on_device
from edt_kernels import Patches

ELEMENTS = (6, 6, 6, 7, 8)
CHECKED, TOLERANCE = 4, 1e-1


class Embedder(nn.Module):
    """What `MoleculeLM.embed_graph` runs: predictor, patches, graph encoder, connector."""

    def __init__(self, dtype: torch.dtype, **changed: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.predictor = NextAtomPredictor()
        self.encoder = GIN(width=ENCODER_WIDTH)
        self.connector = connectors.build(dtype, **changed)[0]

    def forward(self, graph: GraphBatch, longest: int) -> MoleculeTokens:
        """The tokens, at capacity."""
        return self.read(graph, self.cut(graph, longest))

    def cut(self, graph: GraphBatch, longest: int) -> dict[str, Patches]:
        """The patches of entropy, at capacity."""
        return cut_on_device(graph, PatchOptions(), self.predictor, longest=longest)

    def read(self, graph: GraphBatch, patches: dict[str, Patches]) -> MoleculeTokens:
        """The tokens, from the patches on."""
        return self.connector(self.encoder(graph), patches)


def chains(workload: Workload) -> GraphBatch:
    """Molecules that are chains of carbon, nitrogen and oxygen."""
    offsets = workload.atom_offsets.cpu()
    atoms = int(offsets[-1])
    draws = torch.Generator().manual_seed(0)
    elements = torch.tensor(ELEMENTS)[torch.randint(len(ELEMENTS), (atoms,), generator=draws)]
    features = torch.zeros(atoms, 9, dtype=torch.int64)
    features[:, 0] = elements - 1
    atom = torch.arange(atoms)
    first = torch.zeros(atoms + 1, dtype=torch.bool)
    first[offsets] = True
    bonded = ~first[1:atoms]  # atom i and i + 1
    before, after = atom[: atoms - 1][bonded], atom[1:][bonded]
    bonds = torch.cat([torch.stack([before, after]), torch.stack([after, before])], 1)
    bonds = bonds[:, bonds[1].argsort(stable=True)]
    incoming = torch.bincount(bonds[1], minlength=atoms)
    return GraphBatch(
        atom_features=features,
        bond_index=bonds,
        bond_features=torch.zeros(bonds.shape[1], 3, dtype=torch.int64),
        bond_offsets=edt_kernels.offsets_from_lengths(incoming),
        offsets=offsets,
        elements=elements,
    ).to(workload.atoms.device)


def run(run: Run, section: Section) -> None:
    """Without a wait, with eager calls and in a graph."""
    section.all({"molecules in bulk": partial(_bulk, run, section)})


def _correct(run: Run, section: Section, changed: dict[str, object]) -> None:
    """The same patches give the tokens that the CPU gives in float32."""
    workload = SCREEN_SMALL.first(CHECKED)
    longest = int(workload.atoms.max())
    plain = Embedder(torch.float32, **changed).eval()
    model = Embedder(torch.bfloat16, **changed).to(run.device).eval()
    graph = chains(workload.to(run.device))
    patches = model.cut(graph, longest)["entropy"]
    there = Patches(*(x if x is None else x.cpu() for x in patches))
    wanted = plain.read(chains(workload), {"entropy": there})
    found = model.read(graph, {"entropy": patches})
    used = int(wanted.offsets[-1])
    if not torch.equal(found.offsets.cpu(), wanted.offsets):
        raise CheckError("molecules in bulk have other numbers of tokens than on the CPU")
    error = relative_error(found.values[:used].cpu(), wanted.values[:used].double())
    if not error <= TOLERANCE:
        raise CheckError(f"tokens of molecules in bulk are off by {error:.3g}")
    section.add("tokens of molecules in bulk", **{"largest error": error})


@torch.no_grad()
def _bulk(run: Run, section: Section) -> None:
    changed = {"layers": 1, "ffn": 64} if run.tiny else {}
    _correct(run, section, changed)
    workload = (SCREEN_SMALL.first(2) if run.tiny else SCREEN_SMALL).to(run.device)
    longest = int(workload.atoms.max())
    graph = chains(workload)
    model = Embedder(torch.bfloat16, **changed).to(run.device).eval()
    used = int(model(graph, longest).offsets[-1])
    if run.on_gpu:
        with no_waiting():
            model(graph, longest)
        section.add("molecules in bulk wait for nothing", holds=True)
    else:
        section.add("molecules in bulk wait for nothing", skipped="a CPU queues nothing")
    seconds = {
        "a call": run.clock.launched(lambda: model(graph, longest)),
        "in a graph": run.clock.replayed(lambda: model(graph, longest)),
    }
    molecules = len(workload.atoms)
    section.add(
        f"molecules in bulk, {molecules}",
        **{f"{name}, molecules/s": molecules / value for name, value in seconds.items()},
        tokens=used,
    )
