"""LLaMo's projector, its padded twin and a plain MLP, on random levels of random molecules.

`python -m bench.projectors levels 60` prints by how many bytes the resident memory of a forward and
backward over molecules of 60 atoms rises above what holds weights and gradients.
"""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch import Tensor, nn

import edt_kernels
from bench.memory import measured, rise
from bench.workloads import rows
from edt_former.connectors.llamo import LLaMo
from edt_former.graph import GraphFeatures

LEVELS, WIDTH, QUERIES, HEADS = 6, 300, 4, 4
LLM_WIDTH, DEPTH = 512, 2
"""Of the curves over size; the published MLP (4096, six layers) would be all of their time."""
ATOMS = 3000
"""In all, of the curves over size."""


@cache
def projector(dtype: torch.dtype) -> LLaMo:
    """The published projector without motifs, random."""
    torch.manual_seed(0)
    return LLaMo({"llm_width": LLM_WIDTH, "depth": DEPTH, "motif_queries": 0}).to(dtype).eval()


@cache
def plain(dtype: torch.dtype) -> nn.Module:
    """An MLP of the same depth and width that makes a token of every atom."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LLM_WIDTH)]
    for _ in range(DEPTH - 1):
        layers += [nn.SiLU(), nn.Linear(LLM_WIDTH, LLM_WIDTH)]
    return nn.Sequential(*layers).to(dtype).eval()


def levels(atoms: int, dtype: torch.dtype) -> list[Tensor]:
    """What the encoder gives of so many atoms."""
    return [rows(atoms, WIDTH, dtype=dtype, seed=20 + i) for i in range(LEVELS)]


def ragged_read(model: LLaMo, given: tuple[Tensor, ...], offsets: Tensor) -> Tensor:
    """What the queries read [B, 24, 300], before the MLP."""
    return model.read(GraphFeatures(given[-1], offsets, None, given))


def tokens(model: LLaMo, given: tuple[Tensor, ...], offsets: Tensor) -> Tensor:
    """The tokens of every molecule."""
    return model(GraphFeatures(given[-1], offsets, None, given), {}).values


def projected_read(model: LLaMo, given: tuple[Tensor, ...], offsets: Tensor) -> Tensor:
    """The same, ragged, with the keys and values of every atom projected."""
    molecules = len(offsets) - 1
    ends = QUERIES * torch.arange(molecules + 1)
    read = [
        model.cross_attention[0](query.repeat(molecules, 1), level, level, ends, offsets)
        for query, level in zip(model.query_tokens, given, strict=True)
    ]
    return torch.cat([x.unflatten(0, (molecules, QUERIES)) for x in read], 1)


def padded_read(model: LLaMo, given: tuple[Tensor, ...], real: Tensor) -> Tensor:
    """The same on rectangles [B, L, 300], with torch's attention as published programs call it."""
    twin = _torchs(model)
    return torch.cat(
        [
            twin(
                query.to(level.dtype).expand(len(level), -1, -1),
                level,
                level,
                key_padding_mask=~real,
                need_weights=False,
            )[0]
            for query, level in zip(model.query_tokens, given, strict=True)
        ],
        1,
    )


@cache
def _torchs(model: LLaMo) -> nn.MultiheadAttention:
    dtype = model.query_tokens.dtype
    twin = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=dtype)
    twin.load_state_dict(model.cross_attention[0].state_dict())
    return twin.eval()


def peak(kind: str, size: int) -> int | None:
    """Bytes of a training step of "levels" or "plain"; None where the system does not tell."""
    return measured("bench.projectors", kind, str(size))


def offsets_of(size: int) -> Tensor:
    """`ATOMS` atoms in molecules of one size."""
    return edt_kernels.offsets_from_lengths(torch.full((ATOMS // size,), size))


def _measure(kind: str, size: int) -> int:
    model = (projector if kind == "levels" else plain)(torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    offsets = offsets_of(size)
    given = levels(int(offsets[-1]), torch.float32)

    def step(count: int) -> None:
        ends = offsets[: count + 1]
        some = tuple(level[: int(ends[-1])] for level in given)
        made = tokens(model, some, ends) if kind == "levels" else model(some[-1])
        made.backward(torch.ones_like(made))

    return rise(lambda: step(1), lambda: step(len(offsets) - 1))


if __name__ == "__main__":
    sys.stdout.write(str(_measure(sys.argv[1], int(sys.argv[2]))))
