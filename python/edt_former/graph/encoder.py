"""What a graph encoder is, and how one is found by name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from edt_former.graph.batch import FEATURE_SCHEMES, OGB, GraphBatch, MotifFeatures

if TYPE_CHECKING:
    from typing import Self


class GraphFeatures(NamedTuple):
    """Rows that represent B molecules, and which of them are atoms.

    Most encoders return the atoms themselves: `values` [N, D] and the batch's `offsets`. An
    encoder with several views of a molecule (2D and 3D), or with rows beside the atoms (graph
    tokens, [CLS], [SEP]), says with `views` where the atoms are.

    Attributes:
        values: [R, D], everything there is to attend to.
        offsets: int64 [B + 1], the rows of molecule m are `offsets[m]:offsets[m + 1]`.
        views: one int64 [N] per view: row i of `values[view]` is atom i of the batch, so
            `values[view]` has the batch's own offsets and a patch's atoms are the same rows in
            every view. None: one view, `values` are the atoms.
        levels: per level of the encoder, from what the atoms begin with to `values`, rows [R, D]
            like `values`; None where nobody asked for them (`GraphEncoder.with_levels`).
        motifs: of the molecules, None where the batch has none.
    """

    values: Tensor
    offsets: Tensor
    views: tuple[Tensor, ...] | None = None
    levels: tuple[Tensor, ...] | None = None
    motifs: MotifFeatures | None = None

    def atoms(self) -> tuple[Tensor, ...]:
        """The atoms [N, D] of every view.

        >>> import torch
        >>> rows = torch.tensor([[9.0], [1.0], [2.0]])
        >>> GraphFeatures(rows, torch.tensor([0, 3]), (torch.tensor([1, 2]),)).atoms()
        (tensor([[1.],
                [2.]]),)
        """
        if self.views is None:
            return (self.values,)
        return tuple(self.values.index_select(0, view) for view in self.views)


class GraphEncoder(nn.Module):
    """Reads a packed batch of molecules, writes a vector per atom.

    Attributes:
        width: D, the length of an atom's vector.
        config: what `make_encoder` needs to build this encoder again.
        features: the scheme of atom and bond features that it reads, see `GraphBatch.pack`; None
            for one without a name.
        needs_coordinates: it reads `GraphBatch.coordinates`.
    """

    width: int
    config: dict
    features: str | None = OGB
    needs_coordinates: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False

    @property
    def widths(self) -> tuple[int, int]:
        """Features per atom and per bond."""
        return FEATURE_SCHEMES[self.features]

    @abstractmethod
    def forward(self, batch: GraphBatch) -> GraphFeatures:
        """Features of the atoms, [N, width] or more rows; see `GraphFeatures`."""

    @abstractmethod
    def levels(self, batch: GraphBatch) -> list[GraphFeatures]:
        """Features of every level, the last those of `forward`; all have the same rows."""

    def with_levels(self, batch: GraphBatch) -> GraphFeatures:
        """As `forward`, with the rows of all levels beside those of the last."""
        levels = self.levels(batch)
        return levels[-1]._replace(levels=tuple(level.values for level in levels))

    def check_features(self, batch: GraphBatch) -> None:
        """Refuses a batch of another scheme of features: its numbers mean something else.

        Raises:
            ValueError: it is; it names both.
        """
        if batch.features != self.features:
            raise ValueError(
                f"{type(self).__name__} reads features {self.features!r} "
                f"(GraphBatch.pack(..., features=...)), the batch has {batch.features!r}: "
                f"{batch.atom_features.shape[1]} per atom, {batch.bond_features.shape[1]} per bond"
            )

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
        ...
        ...     def levels(self, batch: GraphBatch) -> list[GraphFeatures]:
        ...         return [self(batch)]
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
