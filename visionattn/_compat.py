"""Private parts of PyTorch and timm that the package needs: one small function each, and where tried."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as _modules
from torch.utils import flop_counter


def is_counting_flops() -> bool:
    """Whether a `FlopCounterMode` is active in this thread (torch 2.6 to 2.15)."""
    modes = range(torch._C._len_torch_dispatch_stack())
    return any(isinstance(torch._C._get_dispatch_stack_at(i), flop_counter._FlopCounterMode) for i in modes)


def is_exporting() -> bool:
    """Whether `torch.export` traces; False in torch 2.6, which cannot tell (torch 2.6 to 2.15)."""
    return getattr(torch.compiler, "is_exporting", lambda: False)()


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of a module is seen or changed from outside (torch 2.6 to 2.15).

    By hooks of its own or, unless the FLOP counter sets them, of all modules; or by another `forward` of the
    instance, as Accelerate gives to modules whose weights lie elsewhere.
    """
    own = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    if any(own) or "forward" in module.__dict__:
        return True
    of_all = (
        _modules._global_forward_hooks,
        _modules._global_forward_pre_hooks,
        _modules._global_backward_hooks,
        _modules._global_backward_pre_hooks,
    )
    return any(of_all) and not is_counting_flops()


def is_plain_tensor(t: torch.Tensor) -> bool:
    """Whether a tensor holds its numbers as such, or stands for one that does in a trace (torch 2.6 to 2.15).

    Other subclasses may be quantised, or parts of a tensor on other devices.
    """
    return type(t) in (torch.Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def is_functorch_active() -> bool:
    """Whether a call runs under `torch.vmap` or a transform of `torch.func` (torch 2.6 to 2.15)."""
    return torch._C._are_functorch_transforms_active()


def may_overwrite() -> bool:
    """Whether a layer may overwrite features of its own: no gradient, program or transform records them."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_functorch_active())


def is_forward_mode_active() -> bool:
    """Whether tensors may carry forward-mode derivatives (torch 2.6 to 2.15)."""
    return forward_ad._current_level >= 0


def onednn_linear() -> Any:
    """oneDNN's linear operator `(x, weight, bias, "none" | "gelu", [], "none")`, which compiled programs use.

    None on other machines than x86, and where PyTorch was built without oneDNN (torch 2.6 to 2.15).
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return None
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return operator and operator.default


def feature_take_indices(count: int, indices: Any) -> tuple[list[int], int]:
    """Which of `count` features timm's `indices` mean, and the last of them (timm 1.0.27 to 1.0.31)."""
    from timm.models._features import feature_take_indices

    return feature_take_indices(count, indices)


def inside_feature_getter(network: Any) -> tuple[Any, bool]:
    """The network in what `features_only=True` makes of it, and whether it is one (timm 1.0.27 to 1.0.31)."""
    from timm.models._features import FeatureGetterNet

    return (network.model, True) if isinstance(network, FeatureGetterNet) else (network, False)


def recorded_arguments(network: Any) -> dict[str, Any]:
    """What `timm.create_model` got beside the name: our networks record it, and timm since 1.0.28."""
    return {**getattr(network, "_model_args", {}), **getattr(network, "made_with", {})}


def save_timm_config(network: Any, path: str, arguments: dict[str, Any], further: dict[str, Any]) -> None:
    """Write timm's configuration of a network, and `further` entries, as JSON (timm 1.0.27 to 1.0.31)."""
    from timm.models._hub import save_config_for_hf

    save_config_for_hf(network, path, further, arguments)
