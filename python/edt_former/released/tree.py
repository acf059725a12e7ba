"""The names of the released files, and where each tensor has its place here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

Stored = TypeVar("Stored")

PARTS = ("graph_encoder", "connector", "heads", "language_model", "released")
GRAPH, CONNECTOR, HEADS, LANGUAGE, KEPT = PARTS
"""The last is what no part reads and a released file has."""

BOTH, SPATIAL = "both", "3d"
"""Views of a molecule: 2D and 3D, blended, or Uni-Mol alone."""

PREFIXES = ("", "model.", "mol_llama.")
ENCODER = "encoder."
UNUSED_HEAD = "encoder.graph_encoder.moleculestm.graph_pred_linear."
STATIC_MASK = "encoder.static_q_mask"
POSITION_IDS = "encoder.Qformer.bert.embeddings.position_ids"
WORDS = "encoder.Qformer.bert.embeddings.word_embeddings.weight"
WORD_BIAS = "encoder.Qformer.cls.predictions.bias"
COPIES = {
    "encoder.Qformer.cls.predictions.decoder.weight": WORDS,
    "encoder.Qformer.cls.predictions.decoder.bias": WORD_BIAS,
}
"""What a released file holds twice: the copy, and what it is a copy of."""

_ENCODER_ROOTS = (
    *("query_tokens", "static_q_mask", "graph_encoder", "ln_graph", "blending_module", "Qformer"),
    *("local_q_proj", "graph_proj", "text_proj", "gtm_head"),
)
_KEPT_RULES = tuple((name, KEPT, name) for name in (UNUSED_HEAD, STATIC_MASK, POSITION_IDS))
_VIEW_RULES = {
    BOTH: tuple(
        (f"{ENCODER}{name}.", GRAPH, f"{name}.")
        for name in ("graph_encoder", "ln_graph", "blending_module")
    ),
    SPATIAL: (
        ("encoder.graph_encoder.unimol.", GRAPH, ""),
        ("encoder.ln_graph.unimol.", CONNECTOR, "ln_graph."),
    ),
}
_OTHER_RULES = (
    ("encoder.query_tokens", CONNECTOR, "query_tokens"),
    ("encoder.local_q_proj.", CONNECTOR, "local_q_proj."),
    ("encoder.Qformer.bert.", CONNECTOR, "Qformer.bert."),
    ("llm_proj.", CONNECTOR, "llm_proj."),
    ("encoder.Qformer.cls.", HEADS, "cls."),
    *((f"{ENCODER}{name}.", HEADS, f"{name}.") for name in ("graph_proj", "text_proj", "gtm_head")),
    ("llm.", LANGUAGE, ""),
)


class Layout(NamedTuple):
    """How a file spells the names of the tree `encoder.*`, `llm_proj.*`, `llm.*`.

    Attributes:
        prefix: before every name.
        bare: the encoder alone, without `encoder.`.
    """

    prefix: str = ""
    bare: bool = False

    def spell(self, name: str) -> str:
        """A name of the tree as the file has it."""
        return self.prefix + (name.removeprefix(ENCODER) if self.bare else name)

    def read(self, name: str) -> str:
        """A name of the file as the tree has it."""
        return (ENCODER if self.bare else "") + name.removeprefix(self.prefix)


def layout_of(names: Iterable[str]) -> Layout | None:
    """The layout that all names agree on; None where none is of a released file.

    A prefix counts only where every name has it. Names that the layout cannot place do not change
    it: they are unexpected.

    Example:
        >>> layout_of(["model.llm.model.norm.weight", "model.encoder.query_tokens"])
        Layout(prefix='model.', bare=False)
        >>> layout_of(["query_tokens", "Qformer.bert.embeddings.LayerNorm.bias"])
        Layout(prefix='', bare=True)
        >>> layout_of(["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
    """
    names = list(names)
    for prefix in PREFIXES:
        if not all(name.startswith(prefix) for name in names):
            continue
        paths = {tuple(name.removeprefix(prefix).split(".")[:2]) for name in names}
        roots = {path[0] for path in paths}
        inside = {path[1] for path in paths if path[0] == "encoder" and len(path) > 1}
        if "llm_proj" in roots or inside & set(_ENCODER_ROOTS):
            return Layout(prefix)
        if len(roots & set(_ENCODER_ROOTS)) > 1:
            return Layout(prefix, bare=True)
    return None


class Tree(NamedTuple, Generic[Stored]):
    """The tensors of a released file, by part.

    Attributes:
        layout: of the names in the file.
        view: `BOTH` or `SPATIAL`.
        parts: per part, the tensors by the names that they have here.
        copies: pairs (copy, original) by the copy's name in the tree, where the file has both.
        unexpected: names in the file that have no place.
    """

    layout: Layout
    view: str
    parts: dict[str, dict[str, Stored]]
    copies: dict[str, tuple[Stored, Stored]]
    unexpected: list[str]

    def spell(self, part: str, name: str) -> str:
        """What the file calls a tensor of a part."""
        return self.layout.spell(tree_name(part, name, self.view))


def read_tree(weights: Mapping[str, Stored], *, view: str | None = None) -> Tree[Stored]:
    """Sorts the tensors of a released file.

    Args:
        weights: by the names in the file, in any layout; values are only handed on.
        view: None: as the file is, `SPATIAL` where it has neither blending nor a 2D encoder.

    Raises:
        ValueError: no name is one of a released EDT-Former.

    Example:
        >>> tree = read_tree({"encoder.query_tokens": 1, "encoder.ln_graph.unimol.bias": 2})
        >>> tree.view, tree.parts["connector"]
        ('3d', {'query_tokens': 1, 'ln_graph.bias': 2})
    """
    layout = layout_of(weights)
    if layout is None:
        first = ", ".join(list(weights)[:3])
        raise ValueError(
            "the weights must be of a released EDT-Former (encoder.*, llm_proj.*, llm.*), "
            f"got {first or 'none'}{', ...' if len(weights) > 3 else ''}"
        )
    named = {layout.read(name): value for name, value in weights.items()}
    if view is None:
        flat = ("encoder.blending_module.", "encoder.graph_encoder.moleculestm.")
        view = BOTH if any(name.startswith(flat) for name in named) else SPATIAL
    copies = {}
    for copy, original in COPIES.items():
        if copy in named and original in named:
            copies[copy] = (named.pop(copy), named[original])
        elif copy in named:
            named[original] = named.pop(copy)
    parts: dict[str, dict[str, Stored]] = {part: {} for part in PARTS}
    unexpected = []
    for name, value in named.items():
        place = placed(name, view)
        if place is None:
            unexpected.append(layout.spell(name))
        else:
            part, own = place
            parts[part][own] = value
    return Tree(layout, view, parts, copies, unexpected)


def placed(name: str, view: str = BOTH) -> tuple[str, str] | None:
    """The part that a tensor of the tree belongs to, and its name there; None for none.

    Example:
        >>> placed("encoder.Qformer.cls.predictions.bias")
        ('heads', 'cls.predictions.bias')
    """
    for there, part, here in _rules(view):
        if name == there or (there.endswith(".") and name.startswith(there)):
            return part, here + name.removeprefix(there)
    return None


def tree_name(part: str, name: str, view: str = BOTH) -> str:
    """The name in the tree of a tensor of a part.

    Raises:
        ValueError: the released tree has no place for it.

    Example:
        >>> tree_name("connector", "llm_proj.bias")
        'llm_proj.bias'
    """
    for there, of, here in _rules(view):
        exact = there and not there.endswith(".")
        if of == part and (name == here if exact else name.startswith(here)):
            return there + name.removeprefix(here)
    raise ValueError(f"the released EDT-Former has no {name} in its {part}")


def abbreviated(names: Iterable[str]) -> str:
    """Names in one line, numbered ones together.

    >>> abbreviated(["head", "layers.0.weight", "layers.1.weight", "layers.3.weight"])
    'head, layers.{0-1,3}.weight'
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = re.search(r"(?<=\.)\d+(?=\.)", name)
        key = (name, "") if found is None else (name[: found.start()], name[found.end() :])
        numbers.setdefault(key, []).append(-1 if found is None else int(found[0]))
    return ", ".join(
        before if not after else f"{before}{_ranges(sorted(found))}{after}"
        for (before, after), found in numbers.items()
    )


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs) + "}"


def _rules(view: str) -> tuple[tuple[str, str, str], ...]:
    return (*_KEPT_RULES, *_VIEW_RULES[view], *_OTHER_RULES)
