"""The weights inside of what training code saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Under which keys training code stores weights; averaged weights are what the authors evaluate.
WRAPPERS = (
    *("params_ema", "params-ema", "model_ema", "state_dict_ema", "ema"),
    *("params", "model", "net", "state_dict", "model_state_dict", "generator"),
)
# What wrapping classes put before every name.
PREFIXES = ("module.", "_orig_mod.", "netG.", "model.")
# No file of anybody's is wrapped deeper; one that is may contain itself.
_DEEPEST = 8


def unwrap(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The weights inside what training code saves, and where in it they lie.

    The first known wrapper is opened, averaged weights first, or the only mapping that there is; prefixes
    that stand before every name are removed.

    Returns:
        The weights, without everything else; empty if there are none. And the keys on the way to them, joined
        by dots; "" for a bare state dict.
    """
    path: list[str] = []
    while len(path) < _DEEPEST:
        inner = [key for key, value in content.items() if isinstance(value, Mapping)]
        bare = any(isinstance(value, Tensor) for value in content.values())
        known = [key for key in WRAPPERS if key in inner]
        if not known and (bare or len(inner) != 1):
            break
        path.append(str((known or inner)[0]))
        content = content[(known or inner)[0]]
    weights = {
        name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    while weights and (prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in weights)), None)):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights, ".".join(path)
