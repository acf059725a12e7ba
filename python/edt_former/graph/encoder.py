"""What a graph encoder is, and how one is found by name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from edt_former.graph.batch import GraphBatch

if TYPE_CHECKING:
    from typing import Self


class GraphFeatures(NamedTuple):
    """Atom features `values` [N, D] of B molecules, cut by `offsets` [B + 1]."""

    values: Tensor
    offsets: Tensor


class GraphEncoder(nn.Module):
    """Reads a packed batch of molecules, writes a vector per atom.

    Attributes:
        width: D, the length of an atom's vector.
        config: what `make_encoder` needs to build this encoder again.
    """

    width: int
    config: dict

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False

    @abstractmethod
    def forward(self, batch: GraphBatch) -> GraphFeatures:
        """Atom features [N, width]; the offsets are those of the batch."""

    def freeze(self) -> Self:
        """No gradients, and eval (batch statistics, dropout) whatever `train` says."""
        self.frozen = True
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """As of torch; a frozen encoder stays in eval."""
        return super().train(mode and not self.frozen)


_ENCODERS: dict[str, type[GraphEncoder]] = {}


def register_encoder(name: str) -> Callable[[type[GraphEncoder]], type[GraphEncoder]]:
    """Class decorator: `make_encoder` finds the class by `name`, its options are the config.

    Example:
        >>> @register_encoder("elements")
        ... class Elements(GraphEncoder):
        ...     def __init__(self, width: int) -> None:
        ...         super().__init__()
        ...         self.width, self.config = width, {"name": "elements", "width": width}
        ...         self.embedding = nn.Embedding(119, width)
        ...
        ...     def forward(self, batch: GraphBatch) -> GraphFeatures:
        ...         return GraphFeatures(self.embedding(batch.elements), batch.offsets)
        >>> make_encoder({"name": "elements", "width": 4}).width
        4
    """

    def register(cls: type[GraphEncoder]) -> type[GraphEncoder]:
        _ENCODERS[name] = cls
        return cls

    return register


def make_encoder(config: Mapping[str, object]) -> GraphEncoder:
    """The graph encoder that `config` describes: its `name` and its options.

    Raises:
        ValueError: no encoder is registered under that name.
        TypeError: an option that the encoder does not have.

    Example:
        >>> from edt_former.graph import make_encoder
        >>> make_encoder({"name": "gin", "layers": 2, "width": 16}).width
        16
    """
    options = dict(config)
    name = options.pop("name", None)
    if name not in _ENCODERS:
        known = ", ".join(map(repr, sorted(_ENCODERS)))
        raise ValueError(f"config['name'] must be a known graph encoder, {known}; got {name!r}")
    return _ENCODERS[name](**options)
