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
    care,
    catanet,
    cfsr,
    craft,
    efficientmod,
    fcaformer,
    halonet,
    hat,
    hsdt,
    inline_attention,
    l2vit,
    nat,
    overlock,
    pmnet,
    rgt,
    smt,
    vsa,
)
from benchmarks.formulations.formulation import Formulation

FORMULATIONS: dict[str, Formulation] = {
    "agent_attention": agent_attention.FORMULATION,
    "biformer": biformer.FORMULATION,
    "care": care.FORMULATION,
    "catanet": catanet.FORMULATION,
    "cfsr": cfsr.FORMULATION,
    "craft": craft.FORMULATION,
    "fcaformer": fcaformer.FORMULATION,
    "efficientmod": efficientmod.FORMULATION,
    "halonet": halonet.FORMULATION,
    "hat": hat.FORMULATION,
    "hsdt": hsdt.FORMULATION,
    "inline_attention": inline_attention.FORMULATION,
    "l2vit": l2vit.FORMULATION,
    "nat": nat.FORMULATION,
    "overlock": overlock.FORMULATION,
    "pmnet": pmnet.FORMULATION,
    "rgt": rgt.FORMULATION,
    "swin_vsa": vsa.FORMULATION,
    "vitae_vsa": vsa.FORMULATION,
    "smt": smt.FORMULATION,
}
