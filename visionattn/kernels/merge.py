"""Joining attention over disjoint sets of keys: branches, extra tokens, keys split over devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionattn.kernels.checks import check_tensor


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over all keys from attentions over disjoint parts of them.

    Keys that stand in two parts count twice. A branch of one key with a zero value is an attention sink.

    Example:
        A local branch, the window of each query, and a routed one, the best regions elsewhere, in one
        softmax; windows are neighborhoods in blocks of their own size:

        >>> local, local_lse = neighborhood_attention(q, k, v, 8, stride=8, return_lse=True)
        >>> best = topk_regions(q, k, 8, 4)
        >>> own = torch.arange(best.shape[2], device=q.device)[:, None]
        >>> lists = torch.where(best == own, -1, best)
        >>> routed, routed_lse = routed_attention(q, k, v, lists, 8, return_lse=True)
        >>> out, lse = merge_attention([local, routed], [local_lse, routed_lse])

    Args:
        outputs: one `[..., d]` of equal shape per part, as the attention functions return.
        lses: one `[...]` per part, the natural log of its softmax denominator; -inf where it has no key.

    Returns:
        Output `[..., d]` in the dtype of `outputs` and log-sum-exp `[...]`; zero and -inf where no part has a
        key. Differentiable in all arguments.

    Raises:
        TypeError: the parts are no lists of tensors.
        ValueError: no parts, or shapes that do not fit.
    """
    for name, parts, needed in (("outputs", outputs, "[..., d]"), ("lses", lses, "[...]")):
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"merge_attention: {name} must be a list of tensors, got {type(parts).__name__}")
        for part in parts:
            check_tensor("merge_attention", f"every one of {name}", part, needed)
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"merge_attention needs one lse per output and at least one, got {len(outputs)} outputs, "
            f"{len(lses)} lses"
        )
    for out, lse in zip(outputs, lses):
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"merge_attention: output {tuple(out.shape)} with lse {tuple(lse.shape)} does not fit; "
                f"needed are {tuple(outputs[0].shape)} and {tuple(outputs[0].shape[:-1])}"
            )
    logs = torch.stack(list(lses))
    largest = logs.detach().amax(0)
    empty = largest == float("-inf")
    largest = largest.masked_fill(empty, 0)
    weights = (logs - largest).exp()
    total = weights.sum(0).masked_fill(empty, 1)
    merged = (weights / total)[..., None] * torch.stack(list(outputs)).to(weights.dtype)
    lse = (largest + total.log()).masked_fill(empty, float("-inf"))
    return merged.sum(0).to(outputs[0].dtype), lse
