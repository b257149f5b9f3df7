"""The authors' formulations of attention, to be run in our networks in place of our kernels.

Each file holds one family. Its functions have the signatures of the kernels or methods that they replace and
compute the same numbers in the way of the published code: what is gathered, rolled, unfolded, masked and
copied there is so here. Everything around them, the weights included, stays ours: the difference in time and
memory is that of the formulation.
"""

from __future__ import annotations

from . import agent_attention, biformer, hat, inline_attention, l2vit
from .formulation import Formulation

FORMULATIONS: dict[str, Formulation] = {
    "agent_attention": agent_attention.FORMULATION,
    "biformer": biformer.FORMULATION,
    "hat": hat.FORMULATION,
    "inline_attention": inline_attention.FORMULATION,
    "l2vit": l2vit.FORMULATION,
}
