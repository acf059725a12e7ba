"""A call of every op, told by molecules: what is checked of it follows from that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import edt_kernels
from edt_kernels import offsets_from_lengths

Tensors = Mapping[str, Tensor]
MOLECULE = "molecule"
"""The cut of a tensor with one row per molecule."""


class Input(NamedTuple):
    """A tensor whose rows belong to molecules, by the offsets named `cut`; None: to all of them."""

    values: Tensor
    cut: str | None


class Output(NamedTuple):
    """Likewise an output; a float output gets a gradient."""

    values: Tensor
    cut: str | None


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        name: of the op and what is special.
        run: outputs by name, from the inputs and the offsets by name.
        inputs: by name, floats in float64, of which gradients are taken; the rest as they are.
        lengths: rows of every molecule, by the names of the offsets.
    """

    name: str
    run: Callable[[Tensors, Tensors], dict[str, Output]]
    inputs: Mapping[str, Input]
    lengths: Mapping[str, Sequence[int]]

    @property
    def molecules(self) -> int:
        """How many."""
        return len(next(iter(self.lengths.values())))

    def offsets(self) -> dict[str, Tensor]:
        """[B + 1] of every cut."""
        return {
            name: offsets_from_lengths(torch.tensor(of, dtype=torch.int64))
            for name, of in self.lengths.items()
        }

    def of(self, chosen: Sequence[int]) -> Case:
        """The call with some of the molecules, in another order, and nothing behind them."""
        offsets = self.offsets() | {MOLECULE: torch.arange(self.molecules + 1)}

        def rows(x: Input) -> Input:
            if x.cut is None:
                return x
            bounds = offsets[x.cut].tolist()
            parts = [x.values[bounds[m] : bounds[m + 1]] for m in chosen]
            return Input(torch.cat([x.values[:0], *parts]), x.cut)

        return replace(
            self,
            inputs={name: rows(x) for name, x in self.inputs.items()},
            lengths={name: [of[m] for m in chosen] for name, of in self.lengths.items()},
        )

    def rounded(self, dtype: torch.dtype) -> Case:
        """The call with the numbers that `dtype` has for its inputs."""
        return replace(
            self,
            inputs={
                name: Input(x.values.to(dtype).double(), x.cut) if _floats(x.values) else x
                for name, x in self.inputs.items()
            },
        )


class Call:
    """A case on a device and in a dtype, ready to run again and again."""

    def __init__(self, case: Case, device: torch.device | str, dtype: torch.dtype) -> None:
        self.case = case
        self.inputs = {
            name: x.values.to(device, dtype, copy=True).requires_grad_()
            if _floats(x.values)
            else x.values.to(device)
            for name, x in case.inputs.items()
        }
        self.offsets = {name: x.to(device) for name, x in case.offsets().items()}
        with torch.no_grad():
            outputs = case.run(self.inputs, self.offsets)
        cuts = case.offsets() | {MOLECULE: torch.arange(case.molecules + 1)}
        self.upstream = {
            name: _upstream(x.values.shape, cuts.get(x.cut)).to(x.values)
            for name, x in outputs.items()
            if _floats(x.values)
        }

    def __call__(self) -> dict[str, Output]:
        """Outputs, and gradients as "d" and the input's name."""
        outputs = self.case.run(self.inputs, self.offsets)
        leaves = {name: x for name, x in self.inputs.items() if x.requires_grad}
        ends = {name: x.values for name, x in outputs.items() if x.values.requires_grad}
        found = {name: Output(x.values.detach(), x.cut) for name, x in outputs.items()}
        if ends and leaves:
            grads = torch.autograd.grad(
                list(ends.values()),
                list(leaves.values()),
                [self.upstream[name] for name in ends],
                materialize_grads=True,
            )
            for (name, _), grad in zip(leaves.items(), grads, strict=True):
                found[f"d{name}"] = Output(grad, self.case.inputs[name].cut)
        return found


def _floats(x: Tensor) -> bool:
    return x.is_floating_point()


def _upstream(shape: Sequence[int], cut: Tensor | None) -> Tensor:
    """A gradient that depends on the place within the molecule, not on the batch."""
    row = torch.arange(shape[0] if shape else 1)
    if cut is not None and shape:
        row = row - cut[(torch.searchsorted(cut, row, right=True) - 1).clamp(max=len(cut) - 2)]
    columns = int(torch.tensor(shape[1:]).prod()) if len(shape) > 1 else 1
    angle = 0.7 * row.double().unsqueeze(1) + 0.3 * torch.arange(columns).double() + 1
    return angle.cos().reshape(shape)


ATOMS = (30, 0, 1, 17, 64, 8, 150, 40)
QUERIES = (40, 3, 0, 36, 70, 33, 70, 41)


def cases() -> Iterator[Case]:
    """Of every op, with empty molecules, tails and molecules beyond every tile."""
    yield from _entropies()
    yield from _patches()
    yield from _pools()
    yield from _attentions()
    yield from _packs()
    yield from _adapters()


def _draw(rows: int, *shape: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *shape, generator=draws, dtype=torch.float64)


def _atoms(*shape: int, lengths: Sequence[int] = ATOMS, cut: str = "atoms", seed: int = 0) -> Input:
    """Rows of molecules, and of a tail full of NaN."""
    values = _draw(sum(lengths) + 3, *shape, seed=seed)
    values[sum(lengths) :] = torch.nan
    return Input(values, cut)


def _entropies() -> Iterator[Case]:
    def entropy(x: Tensors, _: Tensors) -> dict[str, Output]:
        return {"h": Output(edt_kernels.entropy(x["logits"]), "rows")}

    for v in (38, 122, 1000, 32000):
        rows = [4, 1, 3] if v > 5000 else [30, 0, 17]
        logits = Input(3 * _draw(sum(rows), v), "rows")
        yield Case(f"entropy, V={v}", entropy, {"logits": logits}, {"rows": rows})

    def linear(x: Tensors, _: Tensors) -> dict[str, Output]:
        h = edt_kernels.linear_entropy(x["hidden"], x["weight"], x["bias"], unit="bits")
        return {"h": Output(h, "rows")}

    for v in (38, 500, 3000):
        yield Case(
            f"linear_entropy, V={v}",
            linear,
            {
                "hidden": Input(_draw(47, 64), "rows"),
                "weight": Input(_draw(v, 64, seed=1) / 4, None),
                "bias": Input(_draw(v, seed=2), None),
            },
            {"rows": [30, 0, 17]},
        )


RULES = {
    "local_max": {},
    "published": {"rule": "published"},
    "threshold": {"rule": "threshold", "threshold": 0.6, "max_size": 5},
    "monotonic": {"rule": "monotonic", "threshold": 0.1, "min_size": 2, "max_patches": 4},
}


def _cut(patches: edt_kernels.Patches) -> dict[str, Output]:
    return {
        "ids": Output(patches.ids, "atoms"),
        "counts": Output(patches.patch_offsets.diff(), MOLECULE),
        "sizes": Output(patches.atom_offsets.diff(), None),
        "threshold": Output(patches.threshold.detach(), MOLECULE),
    }


def _patches() -> Iterator[Case]:
    for name, rule in RULES.items():

        def find(x: Tensors, o: Tensors, rule: dict = rule) -> dict[str, Output]:
            return _cut(edt_kernels.find_patches(x["entropy"].detach(), o["atoms"], **rule))

        # In steps that every dtype has: no two dtypes see other peaks.
        entropy = (16 * _draw(sum(ATOMS) + 3).abs()).round() / 16
        yield Case(
            f"find_patches, {name}", find, {"entropy": Input(entropy, "atoms")}, {"atoms": ATOMS}
        )

        def fused(x: Tensors, o: Tensors, rule: dict = rule) -> dict[str, Output]:
            h, patches = edt_kernels.entropy_patches(x["logits"], o["atoms"], **rule)
            return {"h": Output(h, "atoms"), **_cut(patches)}

        # One row of logits for every step of entropy, so that equal ones are equal bits.
        kinds = torch.tensor([[0.0, 0, 0, 0], [2, 0, 0, 0], [5, 0, 0, 0], [2, 2, 0, 0]])
        chosen = torch.randint(4, (sum(ATOMS) + 3,), generator=torch.Generator().manual_seed(1))
        logits = kinds[chosen].double()
        logits[sum(ATOMS) :] = torch.nan
        yield Case(
            f"entropy_patches, {name}", fused, {"logits": Input(logits, "atoms")}, {"atoms": ATOMS}
        )


def _pools() -> Iterator[Case]:
    for reduce in ("mean", "sum", "max", "min"):

        def pool(x: Tensors, o: Tensors, reduce: str = reduce) -> dict[str, Output]:
            pooled = edt_kernels.segment_pool(x["x"], o["atoms"], reduce=reduce)
            return {"pooled": Output(pooled, MOLECULE)}

        for width in (7, 512):
            inputs = {"x": _atoms(width)}
            yield Case(f"segment_pool, {reduce}, D={width}", pool, inputs, {"atoms": ATOMS})

    def weighted(x: Tensors, o: Tensors) -> dict[str, Output]:
        pooled = edt_kernels.segment_pool(x["x"], o["atoms"], weight=x["weight"])
        return {"pooled": Output(pooled, MOLECULE)}

    weight = Input(_atoms(seed=1).values.abs() + 0.1, "atoms")
    yield Case(
        "segment_pool, weight", weighted, {"x": _atoms(96), "weight": weight}, {"atoms": ATOMS}
    )

    def by_id(x: Tensors, _: Tensors) -> dict[str, Output]:
        return {"pooled": Output(edt_kernels.pool_by_id(x["x"], x["ids"], 40), None)}

    ids = torch.randint(44, (300,), generator=torch.Generator().manual_seed(2)) - 2
    yield Case(
        "pool_by_id",
        by_id,
        {"x": Input(_draw(300, 64), None), "ids": Input(ids, None)},
        {"all": [300]},
    )

    def softmax(x: Tensors, o: Tensors) -> dict[str, Output]:
        return {"p": Output(edt_kernels.segment_softmax(x["x"], o["atoms"]), "atoms")}

    for shape in ((), (12,)):
        yield Case(f"segment_softmax, {shape}", softmax, {"x": _atoms(*shape)}, {"atoms": ATOMS})


def _attentions() -> Iterator[Case]:
    lengths = {"queries": QUERIES, "atoms": ATOMS}
    pairs = [a * b for a, b in zip(QUERIES, ATOMS, strict=True)]

    def operands(heads: int, kv_heads: int, width: int) -> dict[str, Input]:
        return {
            "q": _atoms(heads, width, lengths=QUERIES, cut="queries", seed=1),
            "k": _atoms(kv_heads, width, seed=2),
            "v": _atoms(kv_heads, width, seed=3),
        }

    def attend(x: Tensors, o: Tensors, **options: object) -> dict[str, Output]:
        read = edt_kernels.ragged_attention(
            *(x[name] for name in "qkv"), o["queries"], o["atoms"], return_lse=True, **options
        )
        cuts = ("queries", "queries", "pairs")
        names = ("out", "lse", "scores")
        return {
            name: Output(value, cut) for name, value, cut in zip(names, read, cuts, strict=False)
        }

    def causal(x: Tensors, o: Tensors) -> dict[str, Output]:
        return attend(x, o, causal=True, scale=0.3)

    yield Case("ragged_attention", attend, operands(12, 12, 64), lengths)
    yield Case("ragged_attention, D=20", attend, operands(3, 3, 20), lengths)
    yield Case("ragged_attention, D=128", attend, operands(4, 4, 128), lengths)
    yield Case("ragged_attention, causal, grouped", causal, operands(4, 2, 32), lengths)

    def biased(x: Tensors, o: Tensors) -> dict[str, Output]:
        return attend(x, o, bias=x["bias"], return_scores=True)

    bias = Input(_draw(sum(pairs), 8, seed=4), "pairs")
    yield Case(
        "ragged_attention, bias and scores",
        biased,
        operands(8, 8, 16) | {"bias": bias},
        lengths | {"pairs": pairs},
    )

    def dropped(x: Tensors, o: Tensors) -> dict[str, Output]:
        return attend(x, o, dropout_p=0.25, seed=x["seed"])

    seed = Input(torch.arange(len(ATOMS)) * 977 + 5, MOLECULE)
    yield Case("ragged_attention, dropout", dropped, operands(4, 4, 32) | {"seed": seed}, lengths)


def _packs() -> Iterator[Case]:
    def cat(x: Tensors, o: Tensors) -> dict[str, Output]:
        rows, offsets = edt_kernels.ragged_cat(
            [x["anchors"], x["a"], x["b"]], [None, o["queries"], o["atoms"]]
        )
        return {"rows": Output(rows, "joined"), "lengths": Output(offsets.diff(), MOLECULE)}

    joined = [5 + a + b for a, b in zip(QUERIES, ATOMS, strict=True)]
    yield Case(
        "ragged_cat",
        cat,
        {
            "anchors": Input(_draw(5, 64, seed=3), None),
            "a": _atoms(64, lengths=QUERIES, cut="queries", seed=1),
            "b": _atoms(64, seed=2),
        },
        {"queries": QUERIES, "atoms": ATOMS, "joined": joined},
    )

    def splice(x: Tensors, o: Tensors) -> dict[str, Output]:
        place = torch.arange(x["text"].shape[1], device=x["text"].device)
        count = o["queries"].diff().unsqueeze(1)
        slots = (place >= 2) & (place < 2 + count)
        new_ids = torch.where(place == 1, 0, torch.where(place == 2 + count, 1, -1))
        out = edt_kernels.splice(
            x["text"], x["tokens"], o["queries"], slots, new_rows=x["new"], new_ids=new_ids
        )
        return {"prompt": Output(out, MOLECULE)}

    tokens = _atoms(256, lengths=QUERIES, cut="queries", seed=1)
    yield Case(
        "splice",
        splice,
        {
            "text": Input(_draw(len(QUERIES), 80, 256), MOLECULE),
            "tokens": tokens,
            "new": Input(_draw(2, 256, seed=5), None),
        },
        {"queries": QUERIES},
    )

    def insert(x: Tensors, o: Tensors) -> dict[str, Output]:
        found = edt_kernels.insert(
            x["text"], o["text"], x["tokens"], o["queries"], o["text"][:-1] + 1
        )
        return {
            "rows": Output(found.embeds, "joined"),
            "positions": Output(found.positions, "joined"),
            "lengths": Output(found.offsets.diff(), MOLECULE),
        }

    text = [2 + m % 3 for m in range(len(QUERIES))]
    yield Case(
        "insert",
        insert,
        {
            "text": _atoms(128, lengths=text, cut="text", seed=4),
            "tokens": _atoms(128, lengths=QUERIES, cut="queries", seed=1),
        },
        {
            "text": text,
            "queries": QUERIES,
            "joined": [a + b for a, b in zip(text, QUERIES, strict=True)],
        },
    )


def _adapters() -> Iterator[Case]:
    def adapt(x: Tensors, o: Tensors) -> dict[str, Output]:
        out = edt_kernels.instance_lora(
            x["x"], x["a"], x["b"], o["atoms"], scale=0.5, base=x["base"]
        )
        return {"out": Output(out, "atoms")}

    for d_in, d_out, rank in ((64, 96, 16), (1100, 40, 5), (256, 256, 80)):
        yield Case(
            f"instance_lora, {d_in} to {d_out}, r={rank}",
            adapt,
            {
                "x": _atoms(d_in),
                "a": Input(_draw(len(ATOMS), d_in, rank, seed=1) / d_in**0.5, MOLECULE),
                "b": Input(_draw(d_out, rank, seed=2), None),
                "base": _atoms(d_out, seed=3),
            },
            {"atoms": ATOMS},
        )

    def step(x: Tensors, o: Tensors) -> dict[str, Output]:
        names = ("q", "k")
        a, b = ([x[f"{of}_{name}"].detach() for name in names] for of in ("a", "b"))
        found = edt_kernels.instance_lora_many([x["x"].detach()] * 2, a, b, o["texts"])
        return {name: Output(out, "texts") for name, out in zip(names, found, strict=True)}

    texts, operands = [1, 0, 1, 1], {"x": Input(_draw(3, 96), "texts")}
    for seed, (name, width, rank) in enumerate((("q", 64, 8), ("k", 32, 20))):
        operands[f"a_{name}"] = Input(_draw(len(texts), 96, rank, seed=seed), MOLECULE)
        operands[f"b_{name}"] = Input(_draw(width, rank, seed=seed + 5), None)
    yield Case("instance_lora_many", step, operands, {"texts": texts})
