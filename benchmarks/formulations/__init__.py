"""The authors' formulations of attention, to be run in our networks in place of our kernels.

Each file holds one family. Its functions have the signatures of the kernels or methods that they replace and
compute the same numbers in the way of the published code: what is gathered, rolled, unfolded, masked and
copied there is so here. Everything around them, the weights included, stays ours: the difference in time and
memory is that of the formulation.
"""

from __future__ import annotations

from benchmarks.formulations import (
    agent_attention,
    biformer,
    catanet,
    cfsr,
    craft,
    hat,
    hsdt,
    inline_attention,
    l2vit,
    pmnet,
    rgt,
)
from benchmarks.formulations.formulation import Formulation

FORMULATIONS: dict[str, Formulation] = {
    "agent_attention": agent_attention.FORMULATION,
    "biformer": biformer.FORMULATION,
    "catanet": catanet.FORMULATION,
    "cfsr": cfsr.FORMULATION,
    "craft": craft.FORMULATION,
    "hat": hat.FORMULATION,
    "hsdt": hsdt.FORMULATION,
    "inline_attention": inline_attention.FORMULATION,
    "l2vit": l2vit.FORMULATION,
    "rgt": rgt.FORMULATION,
    "pmnet": pmnet.FORMULATION,
}
