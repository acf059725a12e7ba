"""What a run trains: declared, printed, asserted, and seen to be all that has changed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edt_former.language.frozen import write_json

if TYPE_CHECKING:
    from typing import Self

FILE = "trainable.json"
LISTED = 5
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TrainableSet:
    """The parameters that a run trains, by name, each with its number of values."""

    counts: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """What `model` would train as it is.

        >>> layer = nn.Linear(2, 3)
        >>> _ = layer.bias.requires_grad_(False)
        >>> TrainableSet.of(layer).counts
        {'weight': 6}
        """
        return cls({n: p.numel() for n, p in model.named_parameters() if p.requires_grad})

    @property
    def total(self) -> int:
        """How many values."""
        return sum(self.counts.values())

    def check(self, declared: Iterable[str]) -> None:
        """Compares with the names that the run's configuration declares.

        Raises:
            ValueError: they differ; it lists the names.
        """
        declared = set(declared)
        frozen, free = sorted(declared - set(self.counts)), sorted(set(self.counts) - declared)
        problems = [
            f"{what}: {_listed(names)}"
            for what, names in (("declared, but frozen", frozen), ("not declared", free))
            if names
        ]
        if problems:
            raise ValueError(f"the run must train what it declares; {'; '.join(problems)}")

    def keep(self, folder: Path) -> None:
        """Writes the set to `folder`, or compares with what an earlier start of the run wrote.

        Raises:
            ValueError: that one trained other parameters.
        """
        file = folder / FILE
        if not file.exists():
            write_json(file, {"total": self.total, "parameters": dict(self.counts)})
            return
        before = json.loads(file.read_text())["parameters"]
        differing = sorted(dict(before.items() ^ self.counts.items()))
        if differing:
            raise ValueError(
                f"the run in {folder} trained {sum(before.values()):,} values, now it would train "
                f"{self.total:,}: {_listed(differing)}"
            )

    def table(self, model: nn.Module) -> str:
        """The parts of `model`, each with its values and how many of them are trained.

        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> print(TrainableSet.of(model).table(model))
        part              values      trained
        0                      9            9
        in all                 9            9
        """
        parts: dict[str, list[int]] = {}
        for name, parameter in model.named_parameters():
            own = name.removeprefix("objective.").partition(".")[0]
            row = parts.setdefault(own, [0, 0])
            row[0] += parameter.numel()
            row[1] += self.counts.get(name, 0)
        parts["in all"] = [sum(row[i] for row in parts.values()) for i in (0, 1)]
        rows = [("part", "values", "trained")]
        rows += [(name, f"{row[0]:,}", f"{row[1]:,}") for name, row in parts.items()]
        return "\n".join(f"{name:<14}{values:>10}{trained:>13}" for name, values, trained in rows)


class Audit:
    """Remembers every tensor that is not to change: frozen parameters, and their buffers too.

    Args:
        model: before the first step.
        declared: the parameters that are trained. Buffers of modules that hold one of them may
            change (the statistics of a trained BatchNorm), all others may not.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
        >>> _ = model[0].requires_grad_(False)
        >>> audit = Audit(model, {"1.weight", "1.bias"})
        >>> _ = model(torch.randn(3, 2))
        >>> audit.check(model)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        RuntimeError: a step changed what is not trained: 0.running_mean, 0.running_var, ...
    """

    def __init__(self, model: nn.Module, declared: Iterable[str]) -> None:
        declared = set(declared)
        trained = {name.rpartition(".")[0] for name in declared}
        self.before = {
            name: _fingerprint(tensor)
            for name, tensor in _tensors(model)
            if name not in declared and name.rpartition(".")[0] not in trained
        }
        frozen = dict(model.named_parameters())
        self.before |= {n: _fingerprint(p) for n, p in frozen.items() if n not in declared}

    def check(self, model: nn.Module) -> None:
        """Compares with what is there now.

        Raises:
            RuntimeError: something has changed; it lists the names.
        """
        changed = [
            name
            for name, tensor in _tensors(model)
            if name in self.before and _fingerprint(tensor) != self.before[name]
        ]
        if changed:
            raise RuntimeError(f"a step changed what is not trained: {_listed(changed)}")


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def _fingerprint(tensor: Tensor) -> tuple[int, int]:
    """Two sums over the bits of all values, so that no table is kept twice."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    bits = local.detach().contiguous().flatten().view(_INTEGERS[local.element_size()])
    halves = bits[::2], bits[1::2]
    return tuple(int(half.sum(dtype=torch.int64)) for half in halves)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}"
