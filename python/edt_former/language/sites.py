"""Where in a stock language model adapters go: its linear layers, found by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj", "out_proj", "attn.c_proj"),
    "m": ("mlp", "feed_forward"),
    "d": ("down_proj", "fc2", "mlp.c_proj"),
}
"""By kind, what the module is called; "m" is the whole MLP, the others are linear layers."""

MLP = "m"
_LAYER = re.compile(r"\.(\d+)\.")


class Site(NamedTuple):
    """A module whose output gains an adapter.

    Attributes:
        name: of the module in the language model.
        d_in: width of what it reads.
        d_out: width of what it returns.
    """

    name: str
    d_in: int
    d_out: int


def find_sites(
    language_model: nn.Module, types: Iterable[str], names: Mapping[str, str] | None = None
) -> dict[str, list[Site]]:
    """The modules of each kind, one per layer, in the order of the layers.

    A linear layer is what has `in_features` and `out_features` (4-bit layers have them, and layers
    inside peft's wrapper), or GPT-2's `Conv1D`.

    Args:
        language_model: any causal LM of transformers.
        types: kinds, keys of `NAMES`.
        names: per kind the end of the module's name, instead of those of `NAMES`.

    Raises:
        ValueError: a layer has no such module or several, or they are none of every layer; it names
            the kind and the linear layers that there are.

    Example:
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        >>> heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8}
        >>> model = AutoModelForCausalLM.from_config(LlamaConfig(**size, **heads))
        >>> find_sites(model, "v")["v"][1]
        Site(name='model.layers.1.self_attn.v_proj', d_in=16, d_out=8)
    """
    config = language_model.config.get_text_config()
    found: dict[str, list[Site]] = {}
    for kind in types:
        ends = NAMES[kind] if kind not in (names or {}) else (names[kind],)
        sites: dict[int, Site] = {}
        for name, module in language_model.named_modules():
            layer = _LAYER.search(name)
            if layer is None or not name.endswith(tuple(f".{end}" for end in ends)):
                continue
            size = (config.hidden_size,) * 2 if kind == MLP else _widths(module)
            if size is None:
                continue
            index = int(layer[1])
            if index in sites:
                raise ValueError(
                    f"types {kind!r} must name one module of a layer, layer {index} has "
                    f"{sites[index].name} and {name}: say which by names={{{kind!r}: ...}}"
                )
            sites[index] = Site(name, *size)
        layers, known = config.num_hidden_layers, ", ".join(linear_layers(language_model))
        if sorted(sites) != list(range(layers)):
            raise ValueError(
                f"types {kind!r} needs a module called {' or '.join(ends)} in all {layers} layers "
                f"of {type(language_model).__name__}, {len(sites)} have one; say what it is called "
                f"by names={{{kind!r}: ...}}; linear layers: {known}"
            )
        found[kind] = [sites[index] for index in range(layers)]
    return found


def connector_options(
    options: Mapping[str, Any], language_model: PreTrainedModel
) -> dict[str, Any]:
    """Options of a connector, and those that the language model decides.

    Every connector gets its `llm_width`; MoRA also `llm_layers` and the widths of what it adapts.

    Args:
        options: of `edt_former.connectors.make_connector`.
        language_model: that the connector is for.

    Raises:
        ValueError: as `find_sites`.
    """
    from edt_former.connectors import MoRA, MoRAConfig

    width = language_model.get_input_embeddings().embedding_dim
    if options.get("name") != MoRA.name:
        return {**options, "llm_width": width}
    config = language_model.config.get_text_config()
    types = options.get("types", MoRAConfig.types)
    sites = find_sites(language_model, types, options.get("names"))
    widths = {kind: (layers[0].d_in, layers[0].d_out) for kind, layers in sites.items()}
    llm = {"llm_width": config.hidden_size, "llm_layers": config.num_hidden_layers}
    return {**options, **llm, "widths": widths}


def _widths(module: nn.Module) -> tuple[int, int] | None:
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        return tuple(module.weight.shape)
    return None


def linear_layers(module: nn.Module) -> list[str]:
    """The last names of the linear layers in a module, each once."""
    names = [name for name, layer in module.named_modules() if _widths(layer) is not None]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))
