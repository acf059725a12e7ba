"""How fast a connector of published size is, beside the static Q-Former and fixed padding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edt_former.connectors import EDTFormer, QFormer
from edt_former.connectors.qformer import Rows
from edt_former.graph.encoder import GraphFeatures
from edt_former.report.padded import padded_read
from edt_kernels import Patches

PUBLISHED = {"width": 768, "layers": 12, "heads": 12, "ffn": 3072, "cross_attention_freq": 1}
ENCODER_WIDTH = 512
PUBLISHED_SLOTS = 96
STATIC_QUERIES = 32


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


@torch.inference_mode()
def connector_speed(
    offsets: Tensor, patches: dict[str, Patches], *, rounds: int = 5, seed: int = 0
) -> list[Speed]:
    """Time the connector of EDT-Former at published size against its baselines on one batch.

    Twelve layers of width 768 with random weights, shared by all contenders; atom features are
    random, sizes and patches those of real molecules. Contenders run interleaved in one process;
    before anything is timed the padded result is compared with the ragged one.

    Args:
        offsets: [B + 1] the atoms of B molecules.
        patches: their patches, by source; trimmed.
        rounds: timed rounds, after one that is not.

    Raises:
        RuntimeError: the padded and the ragged connector disagree.
    """
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(int(offsets[-1]), ENCODER_WIDTH, generator=generator)
    features = GraphFeatures(atoms, offsets)
    config = {**PUBLISHED, "encoder_width": ENCODER_WIDTH, "llm_width": PUBLISHED["width"]}
    torch.manual_seed(seed)
    dynamic = EDTFormer({**config, "num_queries": STATIC_QUERIES}).eval()
    static = QFormer({**config, "num_queries": STATIC_QUERIES}).eval()
    shared = dynamic.state_dict()
    static.load_state_dict({name: shared[name] for name in static.state_dict()}, assign=True)

    def padded(connector: QFormer, slots: int) -> tuple[Rows, Tensor]:
        queries, keys = connector.queries(features, patches), connector.keys(features)
        hidden = padded_read(connector, queries, keys, slots=slots)
        return queries, connector.llm_proj(hidden)

    contenders: dict[str, Callable[[], object]] = {
        "EDT-Former, ragged": lambda: dynamic(features, patches),
        f"static Q-Former, {STATIC_QUERIES} queries": lambda: padded(static, STATIC_QUERIES),
        f"EDT-Former, padded to {PUBLISHED_SLOTS}": lambda: padded(dynamic, PUBLISHED_SLOTS),
    }
    tokens = dynamic(features, patches)
    _compare(tokens.values, *padded(dynamic, PUBLISHED_SLOTS))
    counts = [int(tokens.offsets[-1]), STATIC_QUERIES * (len(offsets) - 1), int(tokens.offsets[-1])]

    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if round_ > 0:
                times[name].append(time.perf_counter() - start)
    ours = next(iter(times.values()))
    result = []
    for (name, seconds), count in zip(times.items(), counts, strict=True):
        median = statistics.median(seconds)
        ratio = statistics.median(s / o for s, o in zip(seconds, ours, strict=True))
        result.append(Speed(name, median, (len(offsets) - 1) / median, count / median, ratio))
    return result


def _compare(ragged: Tensor, queries: Rows, padded: Tensor) -> None:
    lengths = queries.offsets.diff()
    real = torch.arange(padded.shape[1]) < lengths[:, None]
    error = float((padded[real] - ragged).abs().max())
    if error > 1e-3:
        raise RuntimeError(
            f"padded and ragged connector must agree to 1e-3, they differ by {error}"
        )
