"""Adapters that every row of a batch has of its own, added to a stock language model's layers."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import edt_kernels
from edt_former.language.sites import find_sites

if TYPE_CHECKING:
    from edt_former.connectors import MoleculeAdapters


class InstanceAdapters:
    """Lets a language model compute with adapters of its rows; otherwise it stays as it is.

    Hooks on the adapted modules add `edt_kernels.instance_lora` to their outputs while adapters are
    in use (`using`). No module is replaced and no name changes; `remove` takes the hooks off.
    Where a layer is checkpointed, its second computation sees the adapters of the first, whatever
    is in use by then.

    A batch of G times as many rows as adapters gives each adapter G rows that follow one another,
    as `generate` lays out beams and samples: an adapter follows its beam. Every thread has adapters
    in use of its own.

    Args:
        language_model: any causal LM of transformers.
        widths: per kind, (d_in, d_out) of the adapters.
        layers: that have adapters.
        names: see `find_sites`.

    Raises:
        ValueError: as `find_sites`; a module has other widths, or there is no such layer.

    Example:
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from edt_former.connectors import MoleculeAdapters
        >>> size = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> config = LlamaConfig(**size, num_attention_heads=2, vocab_size=8)
        >>> model = AutoModelForCausalLM.from_config(config).eval()
        >>> hooks = InstanceAdapters(model, {"o": (4, 4)}, [0])
        >>> a, b = torch.randn(1, 2, 4, 1), torch.randn(1, 4, 1)
        >>> ids = torch.tensor([[1, 2], [1, 2]])
        >>> plain = model(ids).logits
        >>> with hooks.using(MoleculeAdapters({"o": a}, {"o": b})):
        ...     adapted = model(ids).logits
        >>> torch.equal(adapted, plain), torch.equal(model(ids).logits, plain)
        (False, True)
    """

    def __init__(
        self,
        language_model: nn.Module,
        widths: Mapping[str, Sequence[int]],
        layers: Sequence[int],
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._here = _Here()
        self._language_model = language_model
        sites = find_sites(language_model, widths, names)
        self._handles = []
        for kind, found in sites.items():
            for index, layer in enumerate(layers):
                if not 0 <= layer < len(found):
                    raise ValueError(
                        f"layers must be of the language model's {len(found)}, got {layer}"
                    )
                site = found[layer]
                if (site.d_in, site.d_out) != tuple(widths[kind]):
                    raise ValueError(
                        f"widths of {kind!r} must be those of {site.name}, "
                        f"({site.d_in}, {site.d_out}), got {tuple(widths[kind])}"
                    )
                module = language_model.get_submodule(site.name)
                hook = _Adapt(self, kind, index)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_here": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _here=_Here())

    def remove(self) -> None:
        """Takes all hooks off the language model."""
        for handle in self._handles:
            handle.remove()
        for module in self._language_model.modules():
            inner = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(inner, _Checkpointed) and inner.hooks is self:
                module._gradient_checkpointing_func = inner.inner

    @contextmanager
    def using(self, adapters: MoleculeAdapters | None) -> Iterator[None]:
        """The language model computes with these adapters, one per row; with None, without any.

        Raises:
            ValueError: gradients through reentrant checkpointing, which would not reach them.
        """
        if adapters is not None and torch.is_grad_enabled():
            self._bind_checkpointing()
        with self._holding(None if adapters is None else _Used(adapters)):
            yield

    @contextmanager
    def _holding(self, used: _Used | None) -> Iterator[None]:
        before, self._here.used = self._here.used, used
        try:
            yield
        finally:
            self._here.used = before

    def _bind_checkpointing(self) -> None:
        for module in self._language_model.modules():
            inner = getattr(module, "_gradient_checkpointing_func", None)
            if inner is None or not module.gradient_checkpointing:
                continue
            if isinstance(inner, _Checkpointed) and inner.hooks is self:
                continue
            options = inner.keywords if isinstance(inner, functools.partial) else {}
            if options.get("use_reentrant", False):
                raise ValueError(
                    "gradient checkpointing must be that of use_reentrant=False with adapters of "
                    "molecules: no gradient reaches them through the other"
                )
            module._gradient_checkpointing_func = _Checkpointed(self, inner)


class _Here(threading.local):
    """What is in use in this thread."""

    used: _Used | None = None


class _Used:
    """Adapters in use, with the offsets of batches of any length that met them."""

    def __init__(self, adapters: MoleculeAdapters) -> None:
        self.adapters = adapters
        self._offsets: dict[tuple[int, torch.device], Tensor] = {}

    def offsets(self, rows: int, device: torch.device) -> Tensor:
        """[B + 1]: every adapter has as many of the rows, one after the other."""
        key = rows, device
        if key not in self._offsets:
            count = self.adapters.count
            if rows % max(count, 1):
                raise ValueError(
                    f"rows of the language model must be a multiple of the {count} adapters in "
                    f"use, got {rows}"
                )
            steps = torch.arange(count + 1, device=device)
            self._offsets[key] = steps * (rows // max(count, 1))
        return self._offsets[key]


class _Adapt:
    """A hook that adds the adapters in use to what a module returns.

    An object and no function, so that a copy of the model has hooks of its own.
    """

    def __init__(self, hooks: InstanceAdapters, kind: str, index: int) -> None:
        self.hooks, self.kind, self.index = hooks, kind, index

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        used = self.hooks._here.used
        if used is None:
            return None
        if isinstance(output, tuple):
            return (self(module, args, kwargs, output[0]), *output[1:])
        x = (args[0] if args else next(iter(kwargs.values()))).to(output)
        a, b, scale = used.adapters
        rows = x.numel() // x.shape[-1]
        return edt_kernels.instance_lora(
            x,
            a[self.kind][self.index].to(output),
            b[self.kind][self.index].to(output),
            used.offsets(rows, output.device),
            scale=scale,
            base=output,
        )


class _Checkpointed:
    """A checkpointing function whose second computation sees the adapters of the first."""

    def __init__(self, hooks: InstanceAdapters, inner: Callable[..., Any]) -> None:
        self.hooks, self.inner = hooks, inner

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        used = self.hooks._here.used

        def computed(*inputs: Any, **options: Any) -> Any:
            with self.hooks._holding(used):
                return function(*inputs, **options)

        return self.inner(computed, *args, **kwargs)
