"""The authors' formulations of attention, to be run in our networks in place of our kernels.

Each file holds one family. Its functions have the signatures of the kernels that they replace and compute the
same numbers in the way of the published code: what is gathered, rolled, unfolded, masked and copied there is
so here. Everything around them, the weights included, stays ours: the difference in time and memory is that
of the formulation.
"""

from __future__ import annotations

from . import biformer, hat
from .formulation import Formulation

FORMULATIONS: dict[str, Formulation] = {
    "biformer": biformer.FORMULATION,
    "hat": hat.FORMULATION,
}
