"""How fast a connector of published size is, beside the static Q-Former and fixed padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edt_former.connectors import EDTFormer
from edt_former.graph.encoder import GraphFeatures
from edt_former.report.contenders import (
    PUBLISHED_SLOTS,
    STATIC_QUERIES,
    Contender,
    checked_tokens,
    padded,
    ragged,
    static,
)
from edt_former.report.timing import Spread, Stopwatch, interleaved, paired
from edt_kernels import Patches

PUBLISHED = {"width": 768, "layers": 12, "heads": 12, "ffn": 3072, "cross_attention_freq": 1}
ENCODER_WIDTH = 512


@dataclass(frozen=True)
class Speed:
    """Median seconds of a contender over a batch, and its paired ratio to EDT-Former's.

    Attributes:
        name: of the contender.
        seconds: median over rounds.
        molecules: per second.
        queries: query tokens that reach the language model, per second.
        ratio: median over rounds of its seconds over EDT-Former's in the same round.
    """

    name: str
    seconds: float
    molecules: float
    queries: float
    ratio: float


def published_connector(llm_width: int, *, seed: int = 0) -> EDTFormer:
    """EDT-Former of published size with random weights: twelve layers of width 768."""
    torch.manual_seed(seed)
    sizes = {**PUBLISHED, "encoder_width": ENCODER_WIDTH, "llm_width": llm_width}
    return EDTFormer({**sizes, "num_queries": STATIC_QUERIES}).eval().requires_grad_(False)


@torch.inference_mode()
def connector_speed(
    offsets: Tensor, patches: dict[str, Patches], *, rounds: int = 5, seed: int = 0
) -> list[Speed]:
    """Time the connector of EDT-Former at published size against its baselines on one batch.

    Twelve layers of width 768 with random weights, shared by all contenders; atom features are
    random, sizes and patches those of real molecules. Contenders run interleaved in one process;
    before anything is timed the padded results are compared with the ragged ones.

    Args:
        offsets: [B + 1] the atoms of B molecules.
        patches: their patches, by source; trimmed.
        rounds: timed rounds, after one that is not.

    Raises:
        RuntimeError: a padded and a ragged connector disagree.
    """
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(int(offsets[-1]), ENCODER_WIDTH, generator=generator)
    features = GraphFeatures(atoms, offsets)
    dynamic = published_connector(PUBLISHED["width"], seed=seed)
    field = [
        ragged(dynamic),
        static(dynamic, STATIC_QUERIES),
        padded(dynamic, PUBLISHED_SLOTS),
    ]
    checked_tokens(field, features, patches)

    def seconds(contender: Contender) -> float:
        watch = Stopwatch("cpu")
        contender.encode(features, patches)
        return watch.lap()

    runs = {c.name: lambda c=c: seconds(c) for c in field}
    times = interleaved(runs, rounds)
    ours = times[field[0].name]
    molecules = len(offsets) - 1
    speeds = []
    for contender in field:
        median = Spread.of(times[contender.name]).median
        queries = contender.connector.queries(features, patches).offsets[-1]
        ratio = paired(times[contender.name], ours).median
        speeds.append(
            Speed(contender.name, median, molecules / median, int(queries) / median, ratio)
        )
    return speeds
