"""Hugging Face's Q-Formers without their padding: in place, reversible, equal within rounding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import can_return_tuple

import edt_kernels

if TYPE_CHECKING:
    from typing import Self

# An encoder is known by the forward that it runs: a subclass with one of its own is left alone.
_STOCK = {
    f"{name}QFormerEncoder.forward" for name in ("Blip2", "InstructBlip", "InstructBlipVideo")
}
# Keywords that composite models hand down and that change nothing here.
_WITHOUT_EFFECT = {"interpolate_pos_encoding", "num_items_in_batch", "use_cache"}
# Added to a logit this is a weight of 0 in every dtype.
_HIDDEN = -1000.0


class RaggedQFormer:
    """The Q-Formers that one call of `accelerate_qformer` changed; in `with`, restored at its end.

    Attributes:
        encoders: the changed encoders, by their names in the model.
    """

    def __init__(self, encoders: dict[str, nn.Module]) -> None:
        self.encoders = encoders

    def restore(self) -> None:
        """Gives every encoder its stock forward back; a second call does nothing."""
        for encoder in self.encoders.values():
            vars(encoder).pop("forward", None)
        self.encoders = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def accelerate_qformer(model: nn.Module) -> RaggedQFormer:
    """Make the Q-Formers inside `model` skip their padding, in place.

    Every token that `attention_mask` or `encoder_attention_mask` hides is left out of all layers
    (projections, attention, feed-forward, LayerNorm) and the rest is computed packed, with
    `edt_kernels.ragged_attention`. Parameters are shared, so training, `state_dict` and
    `save_pretrained` go on as before.

    The result is the stock one up to rounding, and so are the gradients, except that

    * a hidden token holds zeros in `last_hidden_state` (and in `pooler_output`, where it is the
      first), where the stock module leaves what nobody should read;
    * a row whose encoder tokens are all hidden attends to nothing, in place of their average;
    * dropout, in training, draws other masks, of the same probability; the mask of attention is
      one for all rows of a batch.

    What is not computed packed takes the stock path, with a `RuntimeWarning` that says why:
    `output_attentions`, `output_hidden_states`, masks that are no padding masks, encoder states of
    another batch size than the queries, keywords this function does not know, and hooks on a
    layer or an attention block, which would not run. Gradient checkpointing works. Under
    `torch.compile` the packing breaks the graph. Where `edt_kernels.ragged_attention` has no
    native kernel (see `edt_kernels.build_info`) the result is right, but slower than stock.

    Args:
        model: a `Blip2QFormerModel`, `InstructBlipQFormerModel` or `InstructBlipVideoQFormerModel`,
            or any model with one inside, such as `Blip2ForConditionalGeneration`.

    Returns:
        A handle whose `restore()` undoes it; it is also a context manager. Q-Formers that are
        accelerated already are left as they are, and do not belong to the new handle.

    Raises:
        ValueError: there is no such Q-Former in `model`, or the forward of one has been replaced
            by another library.

    Example:
        >>> import torch
        >>> from transformers import Blip2QFormerConfig, Blip2QFormerModel
        >>> size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
        >>> config = Blip2QFormerConfig(
        ...     **size, num_hidden_layers=2, encoder_hidden_size=8, use_qformer_text_input=True
        ... )
        >>> model = Blip2QFormerModel(config).eval()
        >>> text, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
        >>> inputs = {"query_embeds": text, "query_length": 0, "attention_mask": mask}
        >>> stock = model(**inputs).last_hidden_state
        >>> with accelerate_qformer(model):
        ...     ragged = model(**inputs).last_hidden_state
        >>> torch.allclose(stock[mask == 1], ragged[mask == 1], atol=1e-5), ragged[1, 2:].any()
        (True, tensor(False))
    """
    found = dict(_encoders(model))
    if not found:
        raise ValueError(
            "model must contain a Q-Former of BLIP-2 or InstructBLIP, "
            f"got a {type(model).__name__} without one"
        )
    changed = {}
    for name, encoder in found.items():
        own = getattr(encoder.forward, "__func__", None)
        if own is type(encoder).forward:
            changed[name] = encoder
        elif own is not forward:
            raise ValueError(f"{name} must have its stock forward, got one that was put on it")
    for encoder in changed.values():
        encoder.forward = MethodType(forward, encoder)
    return RaggedQFormer(changed)


def _encoders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        stock = type(module).forward
        if stock.__qualname__ in _STOCK and stock.__module__.startswith("transformers."):
            yield name, module


class _NotPacked(Exception):
    """Why a call takes the stock path."""


class _Packing:
    """Where the real rows of a padded batch lie, by `real` [B, S]."""

    def __init__(self, real: Tensor) -> None:
        self.shape = real.shape
        self.offsets = edt_kernels.offsets_from_lengths(real.sum(1))
        self.index = None if bool(real.all()) else real.flatten().nonzero().squeeze(1)

    def pack(self, padded: Tensor) -> Tensor:
        """[T, ...] of [B, S, ...]."""
        rows = padded.flatten(0, 1)
        return rows if self.index is None else rows.index_select(0, self.index)

    def unpack(self, values: Tensor) -> Tensor:
        """[B, S, ...] of [T, ...], zeros where nothing is real."""
        if self.index is not None:
            rows = values.new_zeros(self.shape.numel(), *values.shape[1:])
            values = rows.index_copy(0, self.index, values)
        return values.unflatten(0, self.shape)


class _Offsets(NamedTuple):
    """Offsets [B + 1] of the packed rows that a layer reads; None for what there is not."""

    queries: Tensor | None
    text: Tensor | None
    together: Tensor
    encoder: Tensor | None


# A method is pickled by its name: with this one an unpickled model is a stock one.
@can_return_tuple
def forward(
    self: nn.Module,
    hidden_states: Tensor,
    attention_mask: object = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: object = None,
    query_length: int = 0,
    **kwargs: object,
) -> BaseModelOutputWithPastAndCrossAttentions:
    """The forward of a Q-Former's encoder, on packed rows where that is possible."""
    try:
        _check_keywords(kwargs, self.config)
        _check_hooks(self)
        real = _real(attention_mask, hidden_states)
        seen = None
        if query_length > 0 and any(layer.has_cross_attention for layer in self.layer):
            seen = _seen(encoder_attention_mask, encoder_hidden_states, len(real))
    except _NotPacked as reason:
        warnings.warn(f"a Q-Former takes its stock path: {reason}", RuntimeWarning, stacklevel=2)
        return type(self).forward(
            self,
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            query_length=query_length,
            **kwargs,
        )
    together = _Packing(real)
    queries, query_offsets, text, text_offsets, encoder, encoder_offsets = [None] * 6
    if query_length > 0:
        queries, query_offsets = _pack(hidden_states[:, :query_length], real[:, :query_length])
    if query_length < hidden_states.shape[1]:
        text, text_offsets = _pack(hidden_states[:, query_length:], real[:, query_length:])
    if seen is not None:
        encoder, encoder_offsets = _pack(encoder_hidden_states, seen)
    offsets = _Offsets(query_offsets, text_offsets, together.offsets, encoder_offsets)
    for layer in self.layer:
        run = partial(_layer, layer, offsets)
        if layer.gradient_checkpointing and layer.training:
            queries, text = layer._gradient_checkpointing_func(run, queries, text, encoder)
        else:
            queries, text = run(queries, text, encoder)
    return BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=together.unpack(_cat(queries, text, offsets))
    )


def _layer(
    layer: nn.Module,
    offsets: _Offsets,
    queries: Tensor | None,
    text: Tensor | None,
    encoder: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """A stock layer on packed queries [Tq, D], text [Tt, D] and encoder states [Te, E]."""
    source = _read(layer.attention, _cat(queries, text, offsets), offsets.together)
    if queries is not None:
        queries = _attend(layer.attention, queries, offsets.queries, *source)
        if encoder is not None and layer.has_cross_attention:
            states = _read(layer.crossattention, encoder, offsets.encoder)
            queries = _attend(layer.crossattention, queries, offsets.queries, *states)
        queries = layer.feed_forward_chunk_query(queries)
    if text is not None:
        text = layer.feed_forward_chunk(_attend(layer.attention, text, offsets.text, *source))
    return queries, text


def _read(block: nn.Module, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [T, H, D] of rows that are attended to, and their offsets."""
    attention = block.attention
    heads = (attention.num_attention_heads, -1)
    return attention.key(x).unflatten(-1, heads), attention.value(x).unflatten(-1, heads), offsets


def _attend(
    block: nn.Module, x: Tensor, offsets: Tensor, keys: Tensor, values: Tensor, key_offsets: Tensor
) -> Tensor:
    """An attention block, with its residual and LayerNorm, on packed rows."""
    attention = block.attention
    dropout = attention.config.attention_probs_dropout_prob if attention.training else 0.0
    read = edt_kernels.ragged_attention(
        attention.query(x).unflatten(-1, (attention.num_attention_heads, -1)),
        keys,
        values,
        offsets,
        key_offsets,
        dropout_p=dropout,
        seed=torch.randint(2**63 - 1, (1,), device=x.device) if dropout else None,
    )
    return block.output(read.flatten(1), x)


def _cat(queries: Tensor | None, text: Tensor | None, offsets: _Offsets) -> Tensor:
    """The queries of every row, then its text."""
    if queries is None or text is None:
        return text if queries is None else queries
    return edt_kernels.ragged_cat([queries, text], [offsets.queries, offsets.text])[0]


def _pack(padded: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The real rows of [B, S, D], and their offsets."""
    packing = _Packing(real)
    return packing.pack(padded), packing.offsets


def _real(mask: object, x: Tensor) -> Tensor:
    """Which rows of x [B, S, D] a prepared mask lets others see: bool [B, S]."""
    if mask is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] != x.shape[1]:
        raise _NotPacked("a mask of an unknown form")
    if mask.dim() == 4:
        if bool((mask != mask[:, :1, :1]).any()):
            raise _NotPacked("a mask that differs between queries or heads")
        mask = mask[:, 0, 0]
    if not mask.is_floating_point():
        real = mask.bool()
    else:
        real = mask == 0
        if bool((mask.masked_fill(real, _HIDDEN) > _HIDDEN).any()):
            raise _NotPacked("a mask that is a bias")
    return real.expand(x.shape[:2])


def _seen(mask: object, states: Tensor | None, batch: int) -> Tensor:
    """Which encoder states the queries see."""
    if not isinstance(states, Tensor):
        raise _NotPacked("no encoder_hidden_states")
    if len(states) != batch:
        raise _NotPacked("encoder_hidden_states of another batch size than the queries")
    return _real(mask, states)


def _check_keywords(kwargs: dict[str, object], config: object) -> None:
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name, getattr(config, name, False)):
            raise _NotPacked(f"{name} is asked for")
    for name, value in kwargs.items():
        if value is not None and value is not False and name not in _WITHOUT_EFFECT:
            raise _NotPacked(f"the keyword {name}")


def _check_hooks(encoder: nn.Module) -> None:
    """What is not called as a module here must be watched by nobody."""
    for layer in encoder.layer:
        blocks = [layer.attention, *([layer.crossattention] if layer.has_cross_attention else [])]
        for module in (layer, *blocks, *(block.attention for block in blocks)):
            if "forward" in vars(module) or any(map(_foreign, _hooks(module))):
                raise _NotPacked(f"a hook on a {type(module).__name__}")


def _hooks(module: nn.Module) -> Iterator[object]:
    for kind in ("forward", "forward_pre", "backward", "backward_pre"):
        yield from getattr(module, f"_{kind}_hooks").values()


def _foreign(hook: object) -> bool:
    """Not one of those that transformers leaves behind once it has recorded outputs."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"
