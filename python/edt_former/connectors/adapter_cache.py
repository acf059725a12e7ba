"""Adapters of molecules that a run has met before."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor

from edt_former.connectors.connector import MoleculeAdapters

SAMPLES = 8  # of a tensor, that tell its content from another


class AdapterCache:
    """Remembers the adapters of molecules while the weights that made them are the same.

    It lives in memory only: no checkpoint holds an adapter. The least recently used go first.
    Threads take turns.

    Args:
        max_bytes: of all A that are remembered.

    Example:
        >>> cache = AdapterCache()
        >>> def make(places):
        ...     print("made", places)
        ...     a = torch.ones(1, len(places), 2, 1)
        ...     return MoleculeAdapters({"q": a}, {"q": torch.ones(1, 2, 1)})
        >>> cache.find(["ethanol", "water", "ethanol"], make, version=0).count
        made [0, 1]
        3
        >>> cache.find(["water"], make, version=0).count
        1
        >>> cache.find(["water"], make, version=1).count
        made [0]
        1
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._clear(None)

    def __deepcopy__(self, memo: object) -> AdapterCache:
        return AdapterCache(self.max_bytes)

    def __getstate__(self) -> int:
        return self.max_bytes

    def __setstate__(self, max_bytes: int) -> None:
        self.__init__(max_bytes)

    def find(
        self,
        keys: Sequence[Hashable],
        make: Callable[[list[int]], MoleculeAdapters],
        *,
        version: Hashable,
    ) -> MoleculeAdapters:
        """The adapters of molecules, in the order of their keys.

        Args:
            keys: what makes a molecule the same; at least one.
            make: the adapters of the molecules at those places of `keys`; called once, with each
                new molecule once, or not at all.
            version: of the weights; with another one everything is forgotten.
        """
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        with self._lock:
            if version != self._version:
                self._clear(version)
            new = sorted(place for key, place in first.items() if key not in self._known)
            known = {key: self._known[key] for key in first if key in self._known}
            if new:
                made = make(new)
                self._shared = made
                for index, place in enumerate(new):
                    known[keys[place]] = {kind: a[:, index].clone() for kind, a in made.a.items()}
            self._remember(known)
            shared = self._shared
        a = {kind: torch.stack([known[key][kind] for key in keys], 1) for kind in shared.a}
        return shared._replace(a=a)

    def _remember(self, adapters: dict[Hashable, dict[str, Tensor]]) -> None:
        for key, a in adapters.items():
            if key not in self._known:
                self._bytes += _size(a)
            self._known[key] = a
            self._known.move_to_end(key)
        while self._bytes > self.max_bytes:
            self._bytes -= _size(self._known.popitem(last=False)[1])

    def _clear(self, version: Hashable) -> None:
        self._version = version
        self._known: OrderedDict[Hashable, dict[str, Tensor]] = OrderedDict()
        self._shared: MoleculeAdapters | None = None
        self._bytes = 0


def weights_version(tensors: Iterable[Tensor]) -> Hashable:
    """What changes whenever one of the tensors is written to or replaced.

    What torch does not count (`x.data.mul_(2)`, tensors of inference mode) is seen where it changes
    one of some numbers, spread over the tensor, that are read.

    >>> weight = torch.ones(2)
    >>> before = weights_version([weight])
    >>> before == weights_version([weight]), before == weights_version([weight.add_(1)])
    (True, False)
    >>> before = weights_version([weight])
    >>> _ = weight.data.mul_(3)
    >>> before == weights_version([weight])
    False
    """
    written, samples = [], {}
    for x in tensors:
        written.append((x.data_ptr(), 0 if x.is_inference() else x._version))
        flat = x.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLES)].float()
        samples.setdefault(x.device, []).append(some)
    content = tuple(tuple(torch.cat(some).tolist()) for some in samples.values())
    return tuple(written), content


def _size(a: dict[str, Tensor]) -> int:
    return sum(x.nbytes for x in a.values())
