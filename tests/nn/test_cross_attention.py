from __future__ import annotations

import pytest
import torch
from torch import nn

from edt_kernels import ragged_attention
from edt_kernels.nn import CrossAttention
from edt_kernels.testing import assert_within_budget, ragged

Q_LENGTHS, K_LENGTHS = (3, 2, 0, 5, 1), (4, 0, 2, 6, 1)
OPTIONS = {
    "one width": {},
    "other widths": {"kdim": 6, "vdim": 10},
    "no bias": {"bias": False},
    "other widths, no bias": {"kdim": 6, "vdim": 8, "bias": False},
}


def pair(options, dtype=torch.float64, **ours):
    """Our module and torch's, with the same weights; biases are not 0."""
    torchs = nn.MultiheadAttention(8, 2, batch_first=True, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in torchs.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5)
    module = CrossAttention(8, 2, dtype=dtype, **options, **ours)
    module.load_state_dict(torchs.state_dict())
    return module, torchs


def batch(options, dtype=torch.float64, tail=0):
    query, q_offsets = ragged(Q_LENGTHS, 8, tail=tail, dtype=dtype, seed=1)
    key, k_offsets = ragged(K_LENGTHS, options.get("kdim", 8), tail=tail, dtype=dtype, seed=2)
    value, _ = ragged(K_LENGTHS, options.get("vdim", 8), tail=tail, dtype=dtype, seed=3)
    return [query, key, value], [q_offsets, k_offsets]


def one_by_one(torchs, tensors, offsets, causal=False):
    """torch's module on every molecule alone; without keys it has no answer but its bias."""
    outs = []
    for m in range(len(offsets[0]) - 1):
        bounds = [slice(int(x[m]), int(x[m + 1])) for x in (offsets[0], offsets[1], offsets[1])]
        q, k, v = (x[rows].unsqueeze(0) for x, rows in zip(tensors, bounds, strict=True))
        if q.shape[1] == 0 or k.shape[1] == 0:
            bias = torchs.out_proj.bias
            empty = q.new_zeros(q.shape[1], 8)
            outs.append(empty if bias is None else empty + bias)
            continue
        hidden = None
        if causal:
            lq, lk = q.shape[1], k.shape[1]
            hidden = torch.ones(lq, lk, dtype=torch.bool).triu(lk - lq + 1)
        outs.append(torchs(q, k, v, attn_mask=hidden, need_weights=False)[0][0])
    return torch.cat(outs)


def with_grads(run, module, tensors):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = run(*tensors)
    weight = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    grads = torch.autograd.grad((out * weight).sum(), [*tensors, *module.parameters()])
    return [out.detach(), *grads]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_state_dict_and_first_values_are_torchs(options):
    torch.manual_seed(7)
    torchs = nn.MultiheadAttention(8, 2, **options)
    torch.manual_seed(7)
    module = CrossAttention(8, 2, **options)
    ours, theirs = module.state_dict(), torchs.state_dict()
    assert list(ours) == list(theirs)
    assert all(map(torch.equal, ours.values(), theirs.values()))
    torchs.load_state_dict(module.state_dict(), strict=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_gradients(options):
    module, torchs = pair(options)
    tensors, offsets = batch(options)
    found = with_grads(lambda *x: module(*x, *offsets), module, tensors)
    expected = with_grads(lambda *x: one_by_one(torchs, x, offsets), torchs, tensors)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_self_attention():
    module, torchs = pair({})
    x, offsets = ragged((4, 0, 1, 6), 8, dtype=torch.float64)
    found = with_grads(lambda x: module(x, x, x, offsets, offsets), module, [x])
    expected = with_grads(lambda x: one_by_one(torchs, (x, x, x), (offsets, offsets)), torchs, [x])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_causal():
    module, torchs = pair({}, causal=True)
    x, offsets = ragged((4, 1, 6), 8, dtype=torch.float64)
    found = module(x, x, x, offsets, offsets)
    expected = one_by_one(torchs, (x, x, x), (offsets, offsets), causal=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_grouped_heads_are_heads_that_share_keys():
    grouped = CrossAttention(12, 4, num_kv_heads=2, kdim=5, vdim=7, dtype=torch.float64)
    whole = CrossAttention(12, 4, kdim=5, vdim=7, dtype=torch.float64)

    def repeat(weight):
        return weight.unflatten(0, (2, 3)).repeat_interleave(2, 0).flatten(0, 1)

    state = grouped.state_dict()
    state["in_proj_bias"] = torch.randn(24, dtype=torch.float64)
    grouped.load_state_dict(state)
    q, k, v = state["in_proj_bias"].split([12, 6, 6])
    state["in_proj_bias"] = torch.cat([q, repeat(k), repeat(v)])
    for name in ("k_proj_weight", "v_proj_weight"):
        state[name] = repeat(state[name])
    whole.load_state_dict(state)
    query, q_offsets = ragged(Q_LENGTHS, 12, dtype=torch.float64)
    key, k_offsets = ragged(K_LENGTHS, 5, dtype=torch.float64)
    value, _ = ragged(K_LENGTHS, 7, dtype=torch.float64)
    arguments = (query, key, value, q_offsets, k_offsets)
    torch.testing.assert_close(grouped(*arguments), whole(*arguments), rtol=1e-12, atol=1e-12)
    fused = CrossAttention(12, 4, num_kv_heads=2)
    assert fused.in_proj_weight.shape == (24, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    module, torchs = pair(OPTIONS["other widths"], dtype=dtype)
    tensors, offsets = batch(OPTIONS["other widths"], dtype=dtype)
    expected = with_grads(lambda *x: one_by_one(torchs, x, offsets), torchs, tensors)
    found = with_grads(lambda *x: module(*x, *offsets), module, tensors)
    torchs.double()
    doubled = [x.double() for x in tensors]
    truth = with_grads(lambda *x: one_by_one(torchs, x, offsets), torchs, doubled)
    for ours, theirs, exact in zip(found, expected, truth, strict=True):
        eps = torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())
        assert_within_budget(ours, theirs, exact, eps=eps)


def test_tail_and_queries_without_keys_hold_the_bias():
    module, _ = pair({})
    tensors, offsets = batch({}, tail=2)
    clean = module(*tensors, *offsets)
    for x in tensors:
        x[-2:] = torch.nan
    found = module(*tensors, *offsets)
    assert torch.equal(found[:-2], clean[:-2])
    bias = module.out_proj.bias.expand(2, -1)
    assert torch.equal(found[3:5], bias) and torch.equal(clean[-2:], bias)


def test_dropout_is_seeded_by_torch_and_off_in_eval():
    module, _ = pair({"dropout": 0.5})
    tensors, offsets = batch({})

    def seeded(seed):
        torch.manual_seed(seed)
        return module(*tensors, *offsets)

    assert torch.equal(seeded(0), seeded(0))
    assert not torch.equal(seeded(0), seeded(1))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = module(*tensors, *offsets)
        assert not torch.equal(first, module(*tensors, *offsets))  # a new seed in every call
    module.eval()
    assert torch.equal(seeded(0), seeded(1))
    without, _ = pair({})
    without.load_state_dict(module.state_dict())
    assert torch.equal(seeded(0), without(*tensors, *offsets))


def test_dropout_is_that_of_the_op():
    module, _ = pair({"dropout": 0.4})
    tensors, offsets = batch({})
    torch.manual_seed(5)
    found = module(*tensors, *offsets)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,))
    w, b = module.in_proj_weight.split(8), module.in_proj_bias.split(8)
    q, k, v = ((tensors[i] @ w[i].T + b[i]).view(-1, 2, 4) for i in range(3))
    read = ragged_attention(q, k, v, *offsets, dropout_p=0.4, seed=seed)
    torch.testing.assert_close(found, module.out_proj(read.flatten(1)))


def test_compiles():
    module, _ = pair({}, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for tail in (0, 3):
        tensors, offsets = batch({}, dtype=torch.float32, tail=tail)
        out = compiled(*tensors, *offsets)
        out.sum().backward()
        torch.testing.assert_close(out, module(*tensors, *offsets))
    assert all(parameter.grad is not None for parameter in module.parameters())


@torch.no_grad()
def test_compiled_dropout_draws_in_every_call():
    module, _ = pair({"dropout": 0.5}, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    tensors, offsets = batch({}, dtype=torch.float32)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs += [compiled(*tensors, *offsets), compiled(*tensors, *offsets)]
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[4])


def test_what_it_prints():
    text = repr(CrossAttention(8, 4, kdim=6, num_kv_heads=2, causal=True))
    expected = "embed_dim=8, kdim=6, vdim=8, num_heads=4, num_kv_heads=2, dropout=0.0, causal=True"
    assert expected in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 9, "num_heads": 2}, "embed_dim must be a multiple of num_heads 2, got 9"),
        ({"embed_dim": 8, "num_heads": 0}, "embed_dim must be a multiple of num_heads 0"),
        (
            {"embed_dim": 8, "num_heads": 4, "num_kv_heads": 3},
            "num_kv_heads must be a divisor of num_heads 4, got 3",
        ),
        ({"embed_dim": 8, "num_heads": 2, "dropout": 1.0}, "dropout must be at least 0 and less"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossAttention(**arguments)


def test_wrong_inputs_are_named():
    module = CrossAttention(8, 2, kdim=6, vdim=10, dtype=torch.float64)
    tensors, offsets = batch({"kdim": 6, "vdim": 10})
    for i, name in enumerate(("query", "key", "value")):
        wrong = [x[:, :-1] if j == i else x for j, x in enumerate(tensors)]
        with pytest.raises(ValueError, match=f"{name} must have shape .T, {tensors[i].shape[1]}."):
            module(*wrong, *offsets)
    with pytest.raises(ValueError, match=r"k_offsets\[-1\] must be at most"):
        module(*tensors, offsets[0], offsets[1] * 2)


POOLED = {
    "one width": {},
    "other width": {"kdim": 6, "vdim": 6},
    "no bias": {"bias": False},
    "shared keys": {"num_kv_heads": 1},
}


@pytest.mark.parametrize("options", POOLED.values(), ids=POOLED)
def test_pool_is_forward_with_repeated_queries(options):
    module = CrossAttention(8, 2, dtype=torch.float64, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    rows, offsets = ragged(K_LENGTHS, module.kdim, tail=2, dtype=torch.float64, seed=2)
    rows[offsets[-1] :] = torch.nan
    query = torch.randn(3, 8, dtype=torch.float64)
    ends = 3 * torch.arange(len(offsets))

    def repeated(query, rows):
        real = rows[: int(offsets[-1])]
        flat = query.expand(len(K_LENGTHS), -1, -1).flatten(0, 1)
        return module(flat, real, real, ends, offsets).unflatten(0, (-1, 3))

    ours = with_grads(lambda q, x: module.pool(q, x, offsets), module, [query, rows])
    expected = with_grads(repeated, module, [query, rows])
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_pool_refuses_what_it_cannot_do():
    rows, offsets = ragged(K_LENGTHS, 6, seed=2)
    with pytest.raises(
        ValueError, match="needs kdim = vdim and no causal mask, got kdim=6, vdim=8"
    ):
        CrossAttention(8, 2, kdim=6).pool(torch.zeros(3, 8), rows, offsets)
    with pytest.raises(ValueError, match="no causal mask"):
        CrossAttention(6, 2, causal=True).pool(torch.zeros(3, 6), rows, offsets)
