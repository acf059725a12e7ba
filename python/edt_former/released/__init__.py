"""The files that the authors of EDT-Former and MoRA released, as parts of this package and back."""

from edt_former.released.mora import GeneratorSizes
from edt_former.released.plan import Plan
from edt_former.released.sizes import Told
from edt_former.released.to_ours import Options, to_ours
from edt_former.released.to_released import to_released
from edt_former.released.tree import Layout, Tree, read_tree

__all__ = [
    "GeneratorSizes",
    "Layout",
    "Options",
    "Plan",
    "Told",
    "Tree",
    "read_tree",
    "to_ours",
    "to_released",
]
