"""What the calls of neighbouring libraries become: every line of the migration notes, executed.

torch-scatter and flash-attn are not needed: plain torch computes what they document.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edt_kernels
from edt_kernels.testing import ragged

LENGTHS = (3, 0, 1, 5)
REDUCTIONS = ["mean", "sum", "max", "min"]


def rows(offsets):
    return list(itertools.pairwise(offsets.tolist()))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def scatter(src, index, dim_size, reduce):
    """torch_scatter.scatter(src, index, dim=0, dim_size=dim_size, reduce=reduce)."""
    if reduce == "sum":
        return src.new_zeros(dim_size, *src.shape[1:]).index_add(0, index, src)
    if reduce == "mean":
        count = torch.bincount(index, minlength=dim_size).clamp(min=1)
        return scatter(src, index, dim_size, "sum") / count.unsqueeze(1)
    index = index.unsqueeze(1).expand_as(src)
    empty = src.new_zeros(dim_size, *src.shape[1:])
    return empty.scatter_reduce(0, index, src, f"a{reduce}", include_self=False)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_torch_scatter_scatter(reduce):
    src, index = torch.randn(9, 4).double(), torch.tensor([2, 0, 2, 2, 0, 3, 0, 2, 3])
    expected = scatter(src, index, 5, reduce)
    close(edt_kernels.pool_by_id(src, index, 5, reduce=reduce), expected)
    # Along another dimension: move it to the front and back.
    turned = edt_kernels.pool_by_id(src.T.movedim(1, 0), index, 5, reduce=reduce).movedim(0, 1)
    close(turned, expected.T)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_torch_scatter_segment_csr_and_segment_coo(reduce):
    src, indptr = ragged(LENGTHS, 4, dtype=torch.float64)
    index = torch.repeat_interleave(torch.arange(4), indptr.diff())
    expected = scatter(src, index, 4, reduce)
    close(edt_kernels.segment_pool(src, indptr, reduce=reduce), expected)
    offsets = edt_kernels.offsets_from_batch(index, 4)
    close(edt_kernels.segment_pool(src, offsets, reduce=reduce), expected)


def test_torch_scatter_gather_csr():
    src, indptr = torch.randn(4, 2), torch.tensor([0, 3, 3, 4, 9])
    index = torch.repeat_interleave(torch.arange(4), indptr.diff())
    assert torch.equal(src.repeat_interleave(indptr.diff(), 0), src[index])


def test_torch_scatter_of_weighted_rows():
    src, indptr = ragged(LENGTHS, 4, dtype=torch.float64)
    weight = torch.rand(9).double()
    index = torch.repeat_interleave(torch.arange(4), indptr.diff())
    expected = scatter(src * weight.unsqueeze(1), index, 4, "sum")
    close(edt_kernels.segment_pool(src, indptr, weight=weight, reduce="sum"), expected)


def test_torch_scatter_softmax():
    src, index = torch.randn(9, 2).double(), torch.tensor([2, 0, 2, 2, 0, 3, 0, 2, 3])
    expected = torch.empty_like(src)
    for group in range(5):
        expected[index == group] = src[index == group].softmax(0)
    # Rows of a group must stand together: sort, and put the result back.
    index, order = index.sort(stable=True)
    found = edt_kernels.segment_softmax(src[order], edt_kernels.offsets_from_batch(index, 5))
    close(torch.empty_like(found).index_copy(0, order, found), expected)


def test_pyg_global_mean_pool():
    x, ptr = ragged(LENGTHS, 4, dtype=torch.float64)
    batch = torch.repeat_interleave(torch.arange(4), ptr.diff())
    expected = scatter(x, batch, 4, "mean")
    close(edt_kernels.segment_pool(x, ptr), expected)  # PyTorch Geometric: global_mean_pool
    close(edt_kernels.segment_pool(x, edt_kernels.offsets_from_batch(batch, 4)), expected)


HEADS, KV_HEADS, WIDTH = 4, 2, 8


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=False, softmax_scale=None):
    """Output [T, H, D] and softmax_lse [H, T] of flash_attn_varlen_func, sequence by sequence."""
    scale = 1 / math.sqrt(q.shape[2]) if softmax_scale is None else softmax_scale
    outs, lses = [], []
    for (q0, q1), (k0, k1) in zip(rows(cu_seqlens_q), rows(cu_seqlens_k), strict=True):
        repeats = q.shape[1] // k.shape[1]
        keys, values = (x[k0:k1].repeat_interleave(repeats, 1).transpose(0, 1) for x in (k, v))
        logits = q[q0:q1].transpose(0, 1) @ keys.mT * scale
        if causal:
            hidden = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).triu(k1 - k0 - q1 + q0 + 1)
            logits = logits.masked_fill(hidden, -torch.inf)
        outs.append((logits.softmax(-1) @ values).transpose(0, 1))
        lses.append(logits.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def attention_inputs(kv_heads=HEADS):
    q, cu_q = ragged((3, 2, 1, 4), HEADS, WIDTH, dtype=torch.float64, seed=1)
    k, cu_k = ragged((4, 2, 3, 6), kv_heads, WIDTH, dtype=torch.float64, seed=2)
    v, _ = ragged((4, 2, 3, 6), kv_heads, WIDTH, dtype=torch.float64, seed=3)
    return q, k, v, cu_q.int(), cu_k.int()


@pytest.mark.parametrize("kv_heads", [HEADS, KV_HEADS], ids=["all heads", "grouped heads"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_flash_attn_varlen_func(causal, kv_heads):
    q, k, v, cu_q, cu_k = attention_inputs(kv_heads)
    expected, lse = flash_attn_varlen_func(q, k, v, cu_q, cu_k, causal=causal, softmax_scale=0.3)
    # No max_seqlen; softmax_scale is scale; the lse is [T, H].
    found = edt_kernels.ragged_attention(
        q, k, v, cu_q, cu_k, causal=causal, scale=0.3, return_lse=True
    )
    close(found, (expected, lse.T))


def test_flash_attn_varlen_qkvpacked_func():
    qkv, cu = ragged(LENGTHS, 3, HEADS, WIDTH, dtype=torch.float64)
    expected, _ = flash_attn_varlen_func(*(qkv[:, i] for i in range(3)), cu, cu)
    close(edt_kernels.ragged_attention(*qkv.unbind(1), cu, cu), expected)


def test_flash_attn_dropout():
    q, k, v, cu_q, cu_k = attention_inputs()
    # flash-attn draws inside; here the seed comes from torch's generator.
    torch.manual_seed(0)
    seed = torch.randint(2**63 - 1, (1,))
    first, again = (
        edt_kernels.ragged_attention(q, k, v, cu_q, cu_k, dropout_p=0.5, seed=seed)
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, edt_kernels.ragged_attention(q, k, v, cu_q, cu_k))


def pair_bias(cu_q, cu_k, function):
    """[sum Lq Lk, H] from function(i, j) -> [Lq, Lk, H], i counted from the last key."""
    parts = []
    for (q0, q1), (k0, k1) in zip(rows(cu_q), rows(cu_k), strict=True):
        i = torch.arange(q1 - q0).unsqueeze(1) + (k1 - k0) - (q1 - q0)
        parts.append(function(i, torch.arange(k1 - k0)).flatten(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("option", ["alibi_slopes", "window_size"])
def test_flash_attn_options_that_are_a_bias(option):
    q, k, v, cu_q, cu_k = attention_inputs()
    slopes = 2.0 ** -torch.arange(1, HEADS + 1).double()
    functions = {
        "alibi_slopes": lambda i, j: -(i - j).abs().unsqueeze(-1) * slopes,
        "window_size": lambda i, j: (
            torch.where((i - j).abs() <= 1, 0.0, -torch.inf)
            .double()
            .unsqueeze(-1)
            .expand(-1, -1, HEADS)
        ),
    }
    bias = pair_bias(cu_q, cu_k, functions[option])
    found = edt_kernels.ragged_attention(q, k, v, cu_q, cu_k, bias=bias)
    pair = 0
    for (q0, q1), (k0, k1) in zip(rows(cu_q), rows(cu_k), strict=True):
        count = (q1 - q0) * (k1 - k0)
        mask = bias[pair : pair + count].view(q1 - q0, k1 - k0, HEADS).permute(2, 0, 1)
        expected = F.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1])), attn_mask=mask
        )
        close(found[q0:q1], expected.transpose(0, 1))
        pair += count


def test_flash_attn_unpad_input_and_pad_input():
    padded = torch.randn(4, 5, 2)
    lengths = torch.tensor(LENGTHS)
    mask = torch.arange(5) < lengths.unsqueeze(1)
    hidden_states = padded[mask]  # bert_padding.unpad_input: rows and cu_seqlens
    cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0))
    offsets = edt_kernels.offsets_from_lengths(mask.sum(1))
    assert torch.equal(offsets, cu_seqlens)
    assert torch.equal(edt_kernels.unpad(padded, offsets), hidden_states)
    again, real = edt_kernels.pad(hidden_states, offsets, length=5)  # bert_padding.pad_input
    assert torch.equal(again, padded * mask.unsqueeze(-1)) and torch.equal(real, mask)


def molecules(*shape):
    values, offsets = ragged((3, 2, 1, 5), *shape, dtype=torch.float64)
    return [values[start:stop] for start, stop in rows(offsets)]


def nested(tensors):
    return torch.nested.nested_tensor(tensors, layout=torch.jagged)


def test_nested_tensor_there_and_back():
    tensors = molecules(4)
    jagged = nested(tensors)
    values, offsets = edt_kernels.from_nested(jagged)
    assert torch.equal(values, torch.cat(tensors))
    lengths = torch.tensor([len(x) for x in tensors])
    assert torch.equal(offsets, edt_kernels.offsets_from_lengths(lengths))
    again = edt_kernels.to_nested(values, offsets)
    pieces = edt_kernels.ragged_split(values, offsets)  # jagged.unbind()
    assert all(map(torch.equal, pieces, jagged.unbind()))
    assert all(map(torch.equal, pieces, again.unbind()))


def test_nested_to_padded_tensor():
    jagged = nested(molecules(4))
    padded, _ = edt_kernels.pad(*edt_kernels.from_nested(jagged), fill=-1.0)
    assert torch.equal(padded, torch.nested.to_padded_tensor(jagged, -1.0))


def test_nested_reductions_over_the_ragged_dimension():
    jagged = nested(molecules(4))
    values, offsets = edt_kernels.from_nested(jagged)
    close(edt_kernels.segment_pool(values, offsets, reduce="sum"), jagged.sum(dim=1))
    close(edt_kernels.segment_pool(values, offsets), jagged.mean(dim=1))


def test_nested_softmax_over_the_ragged_dimension():
    jagged = nested(molecules(4))
    close(
        edt_kernels.segment_softmax(*edt_kernels.from_nested(jagged)),
        jagged.softmax(dim=1).values(),
    )


def test_nested_scaled_dot_product_attention():
    queries, keys, values = (nested(molecules(HEADS, WIDTH)) for _ in range(3))
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (queries, keys, values))
    ).transpose(1, 2)
    q, q_offsets = edt_kernels.from_nested(queries)
    k, k_offsets = edt_kernels.from_nested(keys)
    v, _ = edt_kernels.from_nested(values)
    close(edt_kernels.ragged_attention(q, k, v, q_offsets, k_offsets), expected.values())


def test_nested_cat():
    first, second = molecules(2), molecules(2)
    expected = torch.cat([torch.cat(pair) for pair in zip(first, second, strict=True)])
    parts = [edt_kernels.from_nested(nested(x)) for x in (first, second)]
    joined, _ = edt_kernels.ragged_cat([v for v, _ in parts], [o for _, o in parts])
    assert torch.equal(joined, expected)


def padded_batch(width):
    values, offsets = ragged((3, 2, 1, 5), width, dtype=torch.float64)
    return *edt_kernels.pad(values, offsets), values, offsets


@pytest.mark.parametrize("kdim", [8, 6])
def test_multihead_attention_with_a_key_padding_mask(kdim):
    theirs = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=True).double()
    ours = edt_kernels.nn.CrossAttention(8, 2, kdim=kdim, vdim=kdim).double()
    ours.load_state_dict(theirs.state_dict())
    query, real, q, q_offsets = padded_batch(8)
    key, seen, k, k_offsets = padded_batch(kdim)
    expected, _ = theirs(query, key, key, key_padding_mask=~seen, need_weights=False)
    found = ours(q, k, k, q_offsets, k_offsets)
    close(found, expected[real])
    close(edt_kernels.pad(found, q_offsets)[0], expected * real.unsqueeze(-1))


def test_multihead_attention_with_a_causal_mask():
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).double()
    ours = edt_kernels.nn.CrossAttention(8, 2, causal=True).double()
    ours.load_state_dict(theirs.state_dict())
    padded, real, x, offsets = padded_batch(8)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected, _ = theirs(padded, padded, padded, attn_mask=later, need_weights=False)
    close(ours(x, x, x, offsets, offsets), expected[real])


def test_scaled_dot_product_attention_with_a_padding_mask():
    q, real, packed, offsets = padded_batch(8)
    heads = q.unflatten(-1, (2, 4)).transpose(1, 2)
    expected = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=real[:, None, None])
    rows_of_heads = packed.unflatten(-1, (2, 4))
    found = edt_kernels.ragged_attention(*[rows_of_heads] * 3, offsets, offsets)
    close(found, expected.transpose(1, 2)[real])
