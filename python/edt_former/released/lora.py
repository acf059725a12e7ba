"""Low-rank adapters in a language model's weights, added to the matrices that they adapt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from edt_former.weights import StoredTensor

WRAPPER = "base_model.model."
_BASE = ".base_layer."
_ADAPTER = re.compile(r"(.+)\.lora_([AB])\.[^.]+\.weight$")


def is_adapted(names: Mapping[str, object]) -> bool:
    """Whether the weights are of a model that PEFT has wrapped."""
    return any(name.startswith(WRAPPER) for name in names)


def ranks(weights: Mapping[str, StoredTensor]) -> dict[str, int]:
    """The rank of the adapter of every adapted module."""
    found = {}
    for name, stored in weights.items():
        match = _ADAPTER.match(name)
        if match and match[2] == "A":
            found[match[1].removeprefix(WRAPPER)] = stored.shape[0]
    return found


def merged(weights: Mapping[str, StoredTensor], alpha: float) -> dict[str, StoredTensor]:
    """The weights without a wrapper, W + (alpha / r) B A in place of W, A and B.

    The product is computed in float32 and rounded to the dtype of W before it is added, as PEFT
    does on a CPU. What is no adapter of LoRA keeps its name.

    Args:
        weights: of a wrapped model, by its names.
        alpha: of LoRA; weights do not tell it.

    Raises:
        ValueError: a matrix has several adapters, half a one, or none of its shape.

    Example:
        >>> at = "base_model.model.q"
        >>> tensors = {
        ...     f"{at}.base_layer.weight": torch.ones(2, 2),
        ...     f"{at}.lora_A.default.weight": torch.ones(1, 2),
        ...     f"{at}.lora_B.default.weight": torch.ones(2, 1),
        ... }
        >>> found = merged({n: StoredTensor.of(x) for n, x in tensors.items()}, alpha=3.0)
        >>> found["q.weight"].read()
        tensor([[4., 4.],
                [4., 4.]])
    """
    plain: dict[str, StoredTensor] = {}
    adapters: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in weights.items():
        own = name.removeprefix(WRAPPER)
        match = _ADAPTER.match(own)
        if match is None:
            plain[own.replace(_BASE, ".")] = stored
            continue
        pair = adapters.setdefault(match[1], {})
        if match[2] in pair:
            raise ValueError(f"{match[1]} has several adapters, only one can be merged")
        pair[match[2]] = stored
    for module, pair in adapters.items():
        base = plain.get(f"{module}.weight")
        if base is None or len(pair) < 2:
            raise ValueError(f"the adapter of {module} lacks its matrix or one of A and B")
        a, b = pair["A"], pair["B"]
        if (b.shape[0], a.shape[1]) != tuple(base.shape) or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"the adapter of {module} must be of a matrix {list(base.shape)}, got B "
                f"{list(b.shape)} and A {list(a.shape)}"
            )
        read = partial(_add, base, a, b, alpha / a.shape[0])
        plain[f"{module}.weight"] = StoredTensor(base.shape, base.dtype, read)
    return plain


def _add(base: StoredTensor, a: StoredTensor, b: StoredTensor, scale: float) -> Tensor:
    weight = base.read()
    delta = scale * torch.mm(b.read().float(), a.read().float())
    return weight + delta.to(weight.dtype)
