"""Adapters are merged as their definition says; what cannot be merged is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from edt_former.released import to_ours
from edt_former.released.lora import merged, ranks
from edt_former.weights import StoredTensor

AT, WRAPPER = "model.layers.{}.self_attn.{}_proj", "llm.base_model.model."


def adapted(tree, rank: int = 3) -> dict[str, torch.Tensor]:
    """The tree as PEFT writes it, with adapters of two matrices of every layer."""
    torch.manual_seed(5)
    modules = [AT.format(n, x) for n in range(2) for x in "qv"]
    wrapped = {}
    for name, value in tree.items():
        own = name.removeprefix("llm.")
        module = own.removesuffix(".weight")
        if not name.startswith("llm."):
            wrapped[name] = value
        elif module in modules:
            wrapped[f"{WRAPPER}{module}.base_layer.weight"] = value
            wrapped[f"{WRAPPER}{module}.lora_A.default.weight"] = torch.randn(rank, value.shape[1])
            wrapped[f"{WRAPPER}{module}.lora_B.default.weight"] = torch.randn(value.shape[0], rank)
        else:
            wrapped[f"{WRAPPER}{own}"] = value
    return wrapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_is_w_plus_the_scaled_product(make_stage2, save, gpt2, tmp_path, options, dtype):
    tree, llm = make_stage2()
    wrapped = {n: x.to(dtype) if "llm." in n else x for n, x in adapted(tree).items()}
    given = replace(options, language_model=llm, predictor=gpt2, lora_alpha=32.0)
    plan = to_ours(save(wrapped), given)
    assert "merged 4 LoRA adapters of rank 3, alpha 32" in plan.notes
    plan.write(tmp_path / "ours")
    found = load_file(tmp_path / "ours" / "language_model" / "model.safetensors")
    assert {f"llm.{n}" for n in found} == {n for n in tree if n.startswith("llm.")}
    for name, value in found.items():
        expected = tree[f"llm.{name}"].to(dtype).double()
        module = WRAPPER + name.removesuffix(".weight")
        if f"{module}.lora_A.default.weight" in wrapped:
            a, b = (wrapped[f"{module}.lora_{x}.default.weight"].double() for x in "AB")
            expected = expected + 32 / 3 * (b @ a)
            bound = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(value.double(), expected, rtol=bound, atol=bound)
            assert not torch.equal(value, tree[f"llm.{name}"].to(dtype))
        else:
            assert torch.equal(value.double(), expected)
        assert value.dtype == dtype


def test_without_alpha_it_says_what_to_do(make_stage2, save, gpt2, options):
    tree, llm = make_stage2()
    given = replace(options, language_model=llm, predictor=gpt2)
    message = r"holds LoRA adapters of 4 matrices .*--lora-alpha \(32 .*or convert with --no-lang"
    with pytest.raises(ValueError, match=message):
        to_ours(save(adapted(tree)), given)
    with pytest.raises(ValueError, match=r"--lora-alpha has no use: .* holds no adapters"):
        to_ours(save(tree), replace(given, lora_alpha=32.0))


def test_without_the_language_model_adapters_do_not_matter(make_stage2, save, options):
    tree, _ = make_stage2()
    plan = to_ours(save(adapted(tree)), options, language_model=False)
    assert "connector/model.safetensors" in plan.files


def test_what_is_no_lora_is_unexpected(make_stage2, save, gpt2, options):
    tree, llm = make_stage2()
    wrapped = adapted(tree)
    name = f"{WRAPPER}{AT.format(0, 'q')}.lora_magnitude_vector.default.weight"
    wrapped[name] = torch.ones(16)
    given = replace(options, language_model=llm, predictor=gpt2, lora_alpha=32.0)
    with pytest.raises(ValueError, match=f"do not fit: unexpected: {name}"):
        to_ours(save(wrapped), given)


def stored(**tensors: torch.Tensor) -> dict[str, StoredTensor]:
    names = {"base": "q.base_layer.weight", "a": "q.lora_A.x.weight", "b": "q.lora_B.x.weight"}
    names["second"] = "q.lora_A.y.weight"
    return {f"base_model.model.{names[n]}": StoredTensor.of(x) for n, x in tensors.items()}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (stored(base=torch.ones(2, 3), a=torch.ones(1, 3)), "lacks its matrix or one of A and B"),
        (stored(a=torch.ones(1, 3), b=torch.ones(2, 1)), "lacks its matrix or one of A and B"),
        (
            stored(base=torch.ones(2, 3), a=torch.ones(1, 2), b=torch.ones(2, 1)),
            r"must be of a matrix \[2, 3\], got B \[2, 1\] and A \[1, 2\]",
        ),
        (
            stored(a=torch.ones(1, 3), second=torch.ones(1, 3)),
            "q has several adapters, only one can be merged",
        ),
    ],
    ids=["no-b", "no-base", "shape", "several"],
)
def test_adapters_that_are_incomplete(weights, message):
    with pytest.raises(ValueError, match=message):
        merged(weights, 8.0)


def test_ranks():
    assert ranks(stored(a=torch.ones(4, 3), b=torch.ones(2, 4))) == {"q": 4}
