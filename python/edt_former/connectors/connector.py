"""What a connector is, and how one is found by name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edt_former.graph.batch import GraphBatch
from edt_former.graph.encoder import GraphEncoder, GraphFeatures
from edt_former.tokens.patches import PatchOptions
from edt_kernels import Patches, segment_pool


class MoleculeTokens(NamedTuple):
    """Language-model tokens `values` [T, llm_width] of B molecules, cut by `offsets` [B + 1]."""

    values: Tensor
    offsets: Tensor


class MoleculeAdapters(NamedTuple):
    """Low-rank adapters of a language model, of B molecules or rows of text.

    The linear map of kind t in the i-th adapted layer gains `scale * b[t][i] @ a[t][i, m].T` for
    molecule m; see `edt_kernels.instance_lora`.

    Attributes:
        a: by kind, [layers, B, d_in, r]: what every molecule has of its own.
        b: by kind, [layers, d_out, r]: what all share.
        scale: alpha / r.
    """

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    scale: float = 1.0

    @property
    def count(self) -> int:
        """B."""
        return next(iter(self.a.values())).shape[1]

    def of_rows(self, offsets: Tensor) -> MoleculeAdapters:
        """The adapters of rows of text: row i has the sum of molecules offsets[i]:offsets[i + 1].

        As B is shared, the sum of the A is the sum of the adapters. A row without a molecule has
        zeros.

        >>> import torch
        >>> a = {"q": torch.arange(3.0).reshape(1, 3, 1, 1)}
        >>> adapters = MoleculeAdapters(a, {"q": torch.ones(1, 1, 1)})
        >>> adapters.of_rows(torch.tensor([0, 0, 1, 3])).a["q"].flatten()
        tensor([0., 0., 3.])
        """
        if bool((offsets.diff() == 1).all()):
            return self
        summed = {kind: _sums(a, offsets) for kind, a in self.a.items()}
        return self._replace(a=summed)

    def to(self, like: Tensor) -> MoleculeAdapters:
        """The same in the dtype and on the device of a tensor."""
        a, b = ({kind: x.to(like) for kind, x in xs.items()} for xs in (self.a, self.b))
        return self._replace(a=a, b=b)


def _sums(a: Tensor, offsets: Tensor) -> Tensor:
    """[layers, rows, d_in, r] from [layers, B, d_in, r]."""
    layers = [segment_pool(layer.flatten(1), offsets.to(a.device), reduce="sum") for layer in a]
    return torch.stack(layers).unflatten(-1, a.shape[2:])


class Connector(nn.Module):
    """Turns the atom features of molecules into tokens of a language model, or adapters for it.

    Attributes:
        config: what `make_connector` needs to build this connector again.
        patch_options: the patches that `forward` wants (`sources` empty: none).
        adapts: `forward` returns `MoleculeAdapters`, and a molecule has no token in the prompt; its
            `options` have the `widths`, the `adapted` layers and the `names` of
            `edt_former.language.InstanceAdapters`.
        reads_levels: `forward` wants `GraphFeatures.levels`.
        reads_motifs: `forward` wants `GraphFeatures.motifs`.
    """

    config: dict
    patch_options: PatchOptions
    adapts: bool = False
    reads_levels: bool = False
    reads_motifs: bool = False

    def read_graph(self, encoder: GraphEncoder, batch: GraphBatch) -> GraphFeatures:
        """What `encoder` and the batch have to say of the molecules, as `forward` wants it."""
        features = encoder.with_levels(batch) if self.reads_levels else encoder(batch)
        return features._replace(motifs=batch.motifs)

    @abstractmethod
    def forward(
        self, features: GraphFeatures, patches: Mapping[str, Patches]
    ) -> MoleculeTokens | MoleculeAdapters:
        """The tokens or adapters of B molecules; `patches` by source, of the same atoms.

        Patches may be at capacity or trimmed: rows beyond `offsets[-1]` of the tokens are tail.
        """

    @property
    def num_anchors(self) -> int:
        """The tokens of a molecule that stand for none of its patches."""
        return self.token_counts({source: [0] for source in self.patch_options.sources}, 1)[0]

    def set_budget(self, **budget: int | None) -> None:
        """Gives every molecule fewer tokens than the connector was trained with."""
        raise TypeError(f"{type(self).__name__} has no budget of tokens")

    @abstractmethod
    def token_counts(self, patch_counts: Mapping[str, list[int]], num_molecules: int) -> list[int]:
        """How many tokens `forward` makes of each molecule, from its number of patches."""


_CONNECTORS: dict[str, type[Connector]] = {}


def register_connector(name: str) -> Callable[[type[Connector]], type[Connector]]:
    """Class decorator: `make_connector` finds the class by `name`; it is built from a mapping.

    Example:
        >>> import torch
        >>> from edt_kernels import segment_pool
        >>> @register_connector("mean")
        ... class Mean(Connector):
        ...     def __init__(self, config: Mapping[str, object]) -> None:
        ...         super().__init__()
        ...         self.config, self.patch_options = dict(config), PatchOptions(sources=())
        ...         self.project = nn.Linear(config["encoder_width"], config["llm_width"])
        ...
        ...     def forward(self, features, patches):
        ...         mean = self.project(segment_pool(features.values, features.offsets))
        ...         return MoleculeTokens(mean, torch.arange(len(mean) + 1, device=mean.device))
        ...
        ...     def token_counts(self, patch_counts, num_molecules):
        ...         return [1] * num_molecules
        >>> connector = make_connector({"name": "mean", "encoder_width": 4, "llm_width": 8})
        >>> connector(GraphFeatures(torch.ones(3, 4), torch.tensor([0, 2, 3])), {}).values.shape
        torch.Size([2, 8])
    """

    def register(cls: type[Connector]) -> type[Connector]:
        _CONNECTORS[name] = cls
        return cls

    return register


def make_connector(config: Mapping[str, object]) -> Connector:
    """The connector that `config` describes: its `name` and its options.

    Raises:
        ValueError: no connector is registered under that name.
        TypeError: an option that the connector does not have.

    Example:
        >>> from edt_former.connectors import make_connector
        >>> options = {"llm_width": 8, "width": 16, "layers": 1, "heads": 2, "ffn": 16}
        >>> make_connector({"name": "qformer", **options, "num_queries": 4}).token_counts({}, 2)
        [4, 4]
    """
    options = dict(config)
    name = options.pop("name", None)
    if name not in _CONNECTORS:
        known = ", ".join(map(repr, sorted(_CONNECTORS)))
        raise ValueError(f"config['name'] must be a known connector, {known}; got {name!r}")
    return _CONNECTORS[name](options)
