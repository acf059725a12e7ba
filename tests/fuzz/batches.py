"""Random calls of every op: ragged shapes, dtypes, layouts; and calls with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

import edt_kernels as ek

Tensors = dict[str, Tensor]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Call:
    """One call of an op.

    Attributes:
        op: the name of the public function.
        run: outputs by name, from the tensors by name.
        tensors: its arguments.
        grads: names of the inputs that require a gradient.
        options: what else it was called with, to print.
    """

    op: str
    run: Callable[[Tensors], Tensors]
    tensors: Tensors
    grads: tuple[str, ...] = ()
    options: str = ""

    def __str__(self) -> str:
        lines = [f"{self.op}({self.options})"]
        for name, x in self.tensors.items():
            what = f"{tuple(x.shape)} {x.dtype} strides {x.stride()} at {x.storage_offset()}"
            values = "" if x.is_floating_point() else f" = {x.tolist()}"
            lines.append(f"  {name}: {what}{' with gradient' * (name in self.grads)}{values}")
        return "\n".join(lines)


def draw(rng: Random, op: str | None = None) -> Call:
    """A legal call, of one op if it is named."""
    call = OPS[op or rng.choice(list(OPS))](rng)
    floats = [name for name, x in call.tensors.items() if x.is_floating_point()]
    chance = rng.choice((0, 0.6, 0.6))
    return replace(call, grads=tuple(name for name in floats if rng.random() < chance))


def spoil(rng: Random, call: Call) -> Call:
    """The call with one tensor changed: an entry, its size or its dtype. Some stay legal."""
    name = rng.choice(list(call.tensors))
    x = call.tensors[name]
    changes = [_resized, _recast]
    if not x.is_floating_point() and x.numel():
        changes += [_changed] * 4
    return replace(call, tensors={**call.tensors, name: rng.choice(changes)(rng, x)})


def _changed(rng: Random, x: Tensor) -> Tensor:
    """One entry is another."""
    flat = x.flatten().clone()
    place = rng.randrange(len(flat))
    if x.dtype == torch.bool:
        flat[place] = ~flat[place]
    else:
        limits = torch.iinfo(x.dtype)
        near = int(flat[place])
        steps = (near - 1, near + 1, -near, 0, -1, 1 << 20, limits.min, limits.max, limits.max // 2)
        flat[place] = min(max(rng.choice(steps), limits.min), limits.max)
    return flat.view(x.shape)


def _resized(rng: Random, x: Tensor) -> Tensor:
    """One row or column more or less, a dimension more or less."""
    if x.dim() == 0:
        return x.expand(2)
    dim = rng.randrange(x.dim())
    kind = rng.randrange(4)
    if kind == 0 and x.shape[dim]:
        return x.narrow(dim, 0, x.shape[dim] - 1)
    if kind == 1 and x.shape[dim]:
        return torch.cat([x, x.narrow(dim, 0, 1)], dim)
    return x.unsqueeze(0) if kind == 2 else x.flatten()[: rng.randrange(1 + x.numel())]


def _recast(rng: Random, x: Tensor) -> Tensor:
    others = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.bool, torch.complex64)
    return x.to(rng.choice([dtype for dtype in others if dtype != x.dtype]))


def _lengths(rng: Random, molecules: int | None = None) -> list[int]:
    """Of molecules: empty, single atoms, about the edges of tiles, rarely huge."""
    if molecules is None:
        molecules = rng.choice((0, 1, 1, 2, 3, 5, 20))
    kinds = ((0, 0), (1, 1), (2, 9), (2, 9), (14, 18), (30, 34), (62, 66), (10, 50))
    huge = rng.randrange(100)
    lengths = [rng.randint(*rng.choice(kinds)) for _ in range(molecules)]
    if molecules and huge == 0:
        lengths[rng.randrange(molecules)] = rng.randint(200, 1500)
    return lengths


def _offsets(rng: Random, lengths: list[int]) -> Tensor:
    offsets = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return _placed(rng, offsets.to(rng.choice((torch.int32, torch.int64))), fill=-(1 << 30))


def _values(
    rng: Random, dtype: torch.dtype, rows: int, *shape: int, tail: int = 0, scale: float = 1.0
) -> Tensor:
    """Normal numbers, NaN in the tail, somewhere in a memory full of NaN."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    x = scale * torch.randn(rows + tail, *shape, generator=generator)
    if rng.random() < 0.1:
        x = x.round()  # ties
    x[rows:] = torch.nan
    return _placed(rng, x.to(dtype), fill=torch.nan)


def _placed(rng: Random, x: Tensor, fill: float) -> Tensor:
    """The same numbers in another layout; the memory around them holds `fill`."""
    kind = rng.randrange(6)
    if kind < 2 or x.dim() == 0:
        return x
    if kind == 2:  # an address that is not aligned
        shift = rng.randint(1, 5)
        memory = x.new_full((x.numel() + 2 * shift,), fill)
        return memory[shift : shift + x.numel()].view(x.shape).copy_(x)
    if kind == 3 and x.dim() > 1:  # columns of a wider tensor
        before, after = rng.randint(0, 3), rng.randint(1, 9)
        memory = x.new_full((*x.shape[:-1], before + x.shape[-1] + after), fill)
        return memory[..., before : before + x.shape[-1]].copy_(x)
    if kind == 4 and x.dim() > 1:  # another order of the dimensions
        order = list(range(x.dim()))
        rng.shuffle(order)
        back = [order.index(dim) for dim in range(x.dim())]
        return x.permute(order).contiguous().permute(back)
    memory = x.new_full((2 * x.shape[0] + 1, *x.shape[1:]), fill)  # every second row
    return memory[1::2][: x.shape[0]].copy_(x)


def _dtype(rng: Random) -> torch.dtype:
    return rng.choice(FLOATS)


def _width(rng: Random) -> int:
    return rng.choice((1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 130))


def _tail(rng: Random) -> int:
    return rng.choice((0, 0, 1, 5))


def _entropy(rng: Random) -> Call:
    dtype, unit = _dtype(rng), rng.choice(("nats", "bits"))
    v = rng.choice((1, 2, 7, 8, 9, 16, 31, 32, 38, 64, 65, 122, 500, 3000))
    x = _values(rng, dtype, sum(_lengths(rng, 2)) % 90, v, scale=rng.choice((0, 1, 10)))
    if v > 1 and rng.random() < 0.2:
        x[:, rng.randrange(v)] = -torch.inf
    return Call(
        "entropy", lambda t: {"h": ek.entropy(t["logits"], unit=unit)}, {"logits": x}, options=unit
    )


def _linear_entropy(rng: Random) -> Call:
    dtype, unit = _dtype(rng), rng.choice(("nats", "bits"))
    d, v = _width(rng), rng.choice((1, 2, 31, 32, 38, 65, 130, 700))
    tensors = {
        "hidden": _values(rng, dtype, sum(_lengths(rng, 3)) % 220, d),
        "weight": _values(rng, dtype, v, d, scale=d**-0.5),
    }
    if rng.random() < 0.5:
        tensors["bias"] = _values(rng, dtype, v)

    def run(t: Tensors) -> Tensors:
        return {"h": ek.linear_entropy(t["hidden"], t["weight"], t.get("bias"), unit=unit)}

    return Call("linear_entropy", run, tensors, options=unit)


def _cut(rng: Random) -> dict[str, object]:
    """Options of a cut into patches."""
    rule = rng.choice(("local_max", "rising_edge", "published", "threshold", "monotonic"))
    options: dict[str, object] = {"rule": rule}
    if rule == "rising_edge":
        options["q"] = rng.choice((0, 0.3, 0.75, 1))
    if rule in ("threshold", "monotonic"):
        options["threshold"] = rng.choice((-1.0, 0.0, 0.5, 2.0))
    options["min_size"] = rng.choice((1, 1, 2, 5))
    if rng.random() < 0.3:
        options["max_size"] = options["min_size"] + rng.choice((0, 1, 7))
    if rng.random() < 0.3:
        options["max_patches"] = rng.choice((1, 2, 9))
    return options


def _patches(found: ek.Patches) -> Tensors:
    """All of a cut but its order, which is its ids, sorted."""
    kept = ("ids", "atom_offsets", "patch_offsets", "count", "threshold")
    return {name: getattr(found, name) for name in kept}


def _find_patches(rng: Random) -> Call:
    lengths, options = _lengths(rng), _cut(rng)
    tensors = {
        "entropy": _values(rng, _dtype(rng), sum(lengths), tail=_tail(rng)),
        "offsets": _offsets(rng, lengths),
    }

    def run(t: Tensors) -> Tensors:
        return _patches(ek.find_patches(t["entropy"], t["offsets"], **options))

    return Call("find_patches", run, tensors, options=str(options))


def _entropy_patches(rng: Random) -> Call:
    lengths, options = _lengths(rng), _cut(rng)
    v = rng.choice((1, 2, 8, 31, 38, 70))
    # Entropies that are no ties but by their numbers: rows that a rounding cannot reorder.
    heights = torch.tensor([rng.randrange(40) / 8 for _ in range(sum(lengths))])
    logits = torch.zeros(len(heights), v)
    logits[:, 0] = heights
    logits = torch.cat([logits, torch.full((_tail(rng), v), torch.nan)]).to(_dtype(rng))
    tensors = {"logits": _placed(rng, logits, torch.nan), "offsets": _offsets(rng, lengths)}
    if options["rule"] in ("threshold", "monotonic"):
        options["threshold"] += 0.0123  # no entropy is as near as a rounding

    def run(t: Tensors) -> Tensors:
        h, found = ek.entropy_patches(t["logits"], t["offsets"], **options)
        cut = _patches(found)
        return {"h": h, **cut}

    return Call("entropy_patches", run, tensors, options=str(options))


def _pooled(rng: Random, dtype: torch.dtype, rows: int, tail: int) -> tuple[Tensors, str]:
    shape = rng.choice(((_width(rng),), (), (2, 3)))
    tensors = {"values": _values(rng, dtype, rows, *shape, tail=tail)}
    reduce = rng.choice(("mean", "sum", "max", "min"))
    if reduce in ("mean", "sum") and rng.random() < 0.4:
        # Positive, so that a mean is no quotient of two differences.
        weight = _values(rng, dtype, rows + tail).abs() + 0.1
        tensors["weight"] = weight
    return tensors, reduce


def _segment_pool(rng: Random) -> Call:
    lengths, tail = _lengths(rng), _tail(rng)
    rows = sum(lengths)
    tensors, reduce = _pooled(rng, _dtype(rng), rows, tail)
    tensors["offsets"] = _offsets(rng, lengths)
    if rng.random() < 0.4:
        order = list(range(rows))
        rng.shuffle(order)
        tensors["order"] = _placed(rng, torch.tensor([*order, *[-9] * tail], dtype=torch.int64), -9)

    def run(t: Tensors) -> Tensors:
        pooled = ek.segment_pool(
            t["values"],
            t["offsets"],
            order=t.get("order"),
            weight=t.get("weight"),
            reduce=reduce,
        )
        return {"pooled": pooled}

    return Call("segment_pool", run, tensors, options=reduce)


def _pool_by_id(rng: Random) -> Call:
    rows, segments = sum(_lengths(rng)), rng.choice((0, 1, 3, 40))
    tensors, reduce = _pooled(rng, _dtype(rng), rows, 0)
    ids = [rng.randint(-1, segments) for _ in range(rows)]
    tensors["ids"] = _placed(rng, torch.tensor(ids, dtype=torch.int64), -9)

    def run(t: Tensors) -> Tensors:
        pooled = ek.pool_by_id(
            t["values"], t["ids"], segments, weight=t.get("weight"), reduce=reduce
        )
        return {"pooled": pooled}

    return Call("pool_by_id", run, tensors, options=f"{segments}, {reduce}")


def _segment_softmax(rng: Random) -> Call:
    lengths = _lengths(rng)
    shape = rng.choice(((_width(rng),), (), (2, 3)))
    tensors = {
        "values": _values(rng, _dtype(rng), sum(lengths), *shape, tail=_tail(rng), scale=3),
        "offsets": _offsets(rng, lengths),
    }
    return Call(
        "segment_softmax", lambda t: {"y": ek.segment_softmax(t["values"], t["offsets"])}, tensors
    )


def _ragged_attention(rng: Random) -> Call:
    molecules = rng.choice((0, 1, 1, 2, 3, 6))
    queries, keys = _lengths(rng, molecules), _lengths(rng, molecules)
    kv_heads, group = rng.choice((1, 2, 3)), rng.choice((1, 1, 2, 4))
    heads, dtype = kv_heads * group, _dtype(rng)
    width = rng.choice((1, 3, 8, 16, 17, 31, 32, 33, 64, 64, 65))
    options: dict[str, object] = {"causal": rng.random() < 0.3, "return_lse": rng.random() < 0.3}
    options["return_scores"] = rng.random() < 0.2
    if rng.random() < 0.2:
        options["scale"] = rng.choice((0.0, 0.3, -1.0))
    tensors = {
        "q": _values(rng, dtype, sum(queries), heads, width, tail=_tail(rng)),
        "k": _values(rng, dtype, sum(keys), kv_heads, width, tail=(after := _tail(rng))),
        "v": _values(rng, dtype, sum(keys), kv_heads, width, tail=after),
        "q_offsets": _offsets(rng, queries),
        "k_offsets": _offsets(rng, keys),
    }
    pairs = sum(a * b for a, b in zip(queries, keys, strict=True))
    if rng.random() < 0.3 and pairs < 40000:
        bias = _values(rng, dtype, pairs, heads, tail=_tail(rng))
        if pairs and rng.random() < 0.3:
            bias[:pairs][torch.rand(pairs) < 0.3] = -torch.inf
        tensors["bias"] = bias
    if rng.random() < 0.2:
        options["dropout_p"] = rng.choice((0.1, 0.9))
        seeds = [rng.getrandbits(62) for _ in range(rng.choice((1, molecules)))]
        tensors["seed"] = torch.tensor(seeds, dtype=torch.int64)

    def run(t: Tensors) -> Tensors:
        places = t["q"], t["k"], t["v"], t["q_offsets"], t["k_offsets"]
        found = ek.ragged_attention(*places, bias=t.get("bias"), seed=t.get("seed"), **options)
        found = found if isinstance(found, tuple) else (found,)
        names = ["out", *(name for name in ("lse", "scores") if options[f"return_{name}"])]
        return dict(zip(names, found, strict=True))

    return Call("ragged_attention", run, tensors, options=str(options))


def _ragged_cat(rng: Random) -> Call:
    molecules, dtype, shape = (
        rng.choice((0, 1, 2, 5)),
        _dtype(rng),
        rng.choice(((_width(rng),), ())),
    )
    tensors = {}
    parts = rng.randint(1, 4)
    ragged = [rng.random() < 0.7 for _ in range(parts)]
    ragged[rng.randrange(parts)] = True
    for i, own in enumerate(ragged):
        lengths = _lengths(rng, molecules) if own else [rng.randint(0, 9)]
        tensors[f"part{i}"] = _values(rng, dtype, sum(lengths), *shape, tail=_tail(rng) * own)
        if own:
            tensors[f"offsets{i}"] = _offsets(rng, lengths)

    def run(t: Tensors) -> Tensors:
        values, offsets = ek.ragged_cat(
            [t[f"part{i}"] for i in range(parts)], [t.get(f"offsets{i}") for i in range(parts)]
        )
        return {"values": values, "offsets": offsets}

    return Call("ragged_cat", run, tensors)


def _splice(rng: Random) -> Call:
    packed, dtype, width = rng.random() < 0.3, _dtype(rng), _width(rng)
    rows, length = (1 if packed else rng.choice((0, 1, 2, 5))), rng.choice((0, 1, 7, 40))
    slots = torch.tensor(
        [[rng.random() < 0.4 for _ in range(length)] for _ in range(rows)], dtype=torch.bool
    ).view(rows, length)
    counts = slots.sum(1).tolist()
    shape = (length,) if packed else (rows, length)
    tensors = {
        "embeds": _values(rng, dtype, shape[0], *shape[1:], width),
        "tokens": _values(rng, dtype, sum(counts), width, tail=_tail(rng)),
        "token_offsets": _offsets(rng, counts),
        "slots": _placed(rng, slots.view(shape), True),
    }
    if rng.random() < 0.4:
        added = rng.choice((1, 2, 30))
        ids = torch.tensor([rng.randint(-2, added - 1) for _ in range(rows * length)])
        tensors["new_rows"] = _values(rng, dtype, added, width)
        tensors["new_ids"] = _placed(rng, ids.to(torch.int64).view(shape), 1 << 40)

    def run(t: Tensors) -> Tensors:
        places = t["embeds"], t["tokens"], t["token_offsets"], t["slots"]
        out = ek.splice(*places, new_rows=t.get("new_rows"), new_ids=t.get("new_ids"))
        return {"out": out}

    return Call("splice", run, tensors)


def _insert(rng: Random) -> Call:
    dtype, width = _dtype(rng), _width(rng)
    texts, groups = _lengths(rng, rng.choice((1, 2, 5))), _lengths(rng, rng.choice((0, 1, 3, 6)))
    ends = torch.tensor([0, *texts]).cumsum(0).tolist()
    rows = sorted(rng.randrange(len(texts)) for _ in groups)
    at = sorted(rng.randint(ends[row], ends[row + 1]) for row in rows)
    tensors = {
        "embeds": _values(rng, dtype, sum(texts), width, tail=_tail(rng)),
        "embed_offsets": _offsets(rng, texts),
        "tokens": _values(rng, dtype, sum(groups), width, tail=_tail(rng)),
        "token_offsets": _offsets(rng, groups),
        "at": _placed(rng, torch.tensor(at, dtype=torch.int64), -9),
    }
    if rng.random() < 0.5:
        tensors["rows"] = _placed(rng, torch.tensor(rows, dtype=torch.int64), -9)
    if rng.random() < 0.5:
        tensors["labels"] = torch.arange(len(tensors["embeds"]))

    def run(t: Tensors) -> Tensors:
        places = t["embeds"], t["embed_offsets"], t["tokens"], t["token_offsets"], t["at"]
        found = ek.insert(*places, rows=t.get("rows"), labels=t.get("labels"))
        return {name: x for name, x in found._asdict().items() if x is not None}

    return Call("insert", run, tensors)


def _adapter(rng: Random, lengths: list[int], dtype: torch.dtype, layer: str = "") -> Tensors:
    """x, a, b and sometimes a base of one layer, their names with `layer` behind."""
    d_in, d_out, rank = _width(rng), _width(rng), rng.choice((1, 2, 8, 15, 16, 17, 40))
    rows, tail = sum(lengths), _tail(rng) if layer == "" else 0
    tensors = {
        "x": _values(rng, dtype, rows, d_in, tail=tail),
        "a": _values(rng, dtype, len(lengths), d_in, rank, scale=d_in**-0.5),
        "b": _values(rng, dtype, d_out, rank, scale=rank**-0.5),
    }
    if rng.random() < 0.6:
        tensors["base"] = _values(rng, dtype, rows, d_out, tail=tail)
    return {f"{name}{layer}": x for name, x in tensors.items()}


def _instance_lora(rng: Random) -> Call:
    lengths, scale = _lengths(rng), rng.choice((1.0, 0.25, -2.0, 0.0))
    tensors = _adapter(rng, lengths, _dtype(rng)) | {"offsets": _offsets(rng, lengths)}

    def run(t: Tensors) -> Tensors:
        places = t["x"], t["a"], t["b"], t["offsets"]
        return {"out": ek.instance_lora(*places, scale=scale, base=t.get("base"))}

    return Call("instance_lora", run, tensors, options=f"{scale}")


def _instance_lora_many(rng: Random) -> Call:
    lengths, scale, count = _lengths(rng), rng.choice((1.0, 0.25)), rng.randint(1, 4)
    dtype, tensors = _dtype(rng), {"offsets": _offsets(rng, lengths)}
    for k in range(count):
        tensors |= _adapter(rng, lengths, dtype, layer=f"{k}")

    def run(t: Tensors) -> Tensors:
        x, a, b = ([t[f"{name}{k}"] for k in range(count)] for name in "xab")
        base = [t.get(f"base{k}") for k in range(count)]
        found = ek.instance_lora_many(x, a, b, t["offsets"], scale=scale, base=base)
        return {f"out{k}": out for k, out in enumerate(found)}

    return Call("instance_lora_many", run, tensors, options=f"{scale}")


OPS: dict[str, Callable[[Random], Call]] = {
    "entropy": _entropy,
    "linear_entropy": _linear_entropy,
    "find_patches": _find_patches,
    "entropy_patches": _entropy_patches,
    "segment_pool": _segment_pool,
    "pool_by_id": _pool_by_id,
    "segment_softmax": _segment_softmax,
    "ragged_attention": _ragged_attention,
    "ragged_cat": _ragged_cat,
    "splice": _splice,
    "insert": _insert,
    "instance_lora": _instance_lora,
    "instance_lora_many": _instance_lora_many,
}
