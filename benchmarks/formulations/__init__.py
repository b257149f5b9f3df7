"""The authors' formulations of attention, to be run in our networks in place of our kernels.

Each file holds one family: subclasses of our modules that compute the same numbers in the way of the
published code. What is gathered, rolled, unfolded, masked and copied there is so here. The modules of a
network take these classes for a while, as timm's take ours in `visionattn.accelerate`. Everything around
them, the weights included, stays ours: the difference in time and memory is that of the formulation.
"""

from __future__ import annotations

from benchmarks.formulations import (
    agent_attention,
    biformer,
    catanet,
    cfsr,
    craft,
    halonet,
    hat,
    hsdt,
    inline_attention,
    l2vit,
    nat,
    overlock,
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
    "halonet": halonet.FORMULATION,
    "hat": hat.FORMULATION,
    "hsdt": hsdt.FORMULATION,
    "inline_attention": inline_attention.FORMULATION,
    "l2vit": l2vit.FORMULATION,
    "nat": nat.FORMULATION,
    "overlock": overlock.FORMULATION,
    "pmnet": pmnet.FORMULATION,
    "rgt": rgt.FORMULATION,
}
