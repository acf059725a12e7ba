"""Low-rank adapters of a frozen language model, by peft: what they add, and what is below them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from edt_former.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
_WRAPPED, _INSIDE, _ADAPTER = "base_model.model.", ".base_layer.", ".lora_"


def add_lora(language_model: PreTrainedModel, options: Mapping[str, Any]) -> nn.Module:
    """The language model in peft's wrapper: its adapters train from zero, all else is frozen.

    Args:
        language_model: any causal LM.
        options: `rank`, `alpha`, `dropout` and `targets`: names of linear layers, or "all-linear"
            for all but the head.

    Raises:
        ImportError: peft is not installed.
        ValueError: no layer has such a name.
    """
    peft = need("peft", extra="train", purpose="LoRA adapters")
    targets = list(options["targets"])
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options["rank"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
    )
    return peft.get_peft_model(language_model, config)


def is_adapter(name: str) -> bool:
    """Whether the parameter of that name belongs to an adapter.

    >>> is_adapter("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight")
    True
    """
    return _ADAPTER in name


def plain_name(name: str) -> str:
    """The name of a language model's parameter as if it had no adapters.

    >>> plain_name("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return name.removeprefix(_WRAPPED).replace(_INSIDE, ".")


def plain_names(names: Iterable[str]) -> Iterator[str]:
    """`plain_name` of those that belong to no adapter."""
    return (plain_name(name) for name in names if not is_adapter(name))


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A language model's state as if it had no adapters."""
    return {plain_name(name): x for name, x in state.items() if not is_adapter(name)}


def base_of(language_model: nn.Module) -> nn.Module:
    """The language model inside peft's wrapper; itself where there is none."""
    inside = getattr(language_model, "get_base_model", None)
    return language_model if inside is None else inside()
