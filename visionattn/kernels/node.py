"""Functions in plain PyTorch with a backward pass of their own, and what operators ask of such."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionattn._compat import is_exporting, is_functorch_active


class Rule(NamedTuple):
    """One function of tensors and numbers.

    Attributes:
        forward: gives the output, and tensors that its backward pass wants.
        gradients: `(grad_out, kept, wanted, *arguments)` to one gradient, or None, per tensor; `wanted` has a
            truth value for each.
        formula: the same function in operations without side effects, for derivatives of any order,
            transforms of `torch.func` and exported programs.
        tensors: how many of its first arguments are tensors, or None where there is none.
    """

    forward: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    gradients: Callable[..., Sequence[Tensor | None]]
    formula: Callable[..., Tensor]
    tensors: int

    def __call__(self, *args: Any) -> Tensor:
        """The output for these arguments."""
        if is_exporting() or is_functorch_active():
            return self.formula(*args)
        tensors = args[: self.tensors]
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            return _Node.apply(self, *args)
        return self.forward(*args)[0]

    def backward(
        self, grads: Any, outputs: Any, wanted: Sequence[bool], *args: Any
    ) -> Sequence[Tensor | None]:
        """The backward pass as a `Definition` of `operator.py` takes it."""
        return self.gradients(grads[0], self.forward(*args)[1], wanted, *args)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, *args: Any) -> Tensor:
        out, kept = rule.forward(*args)
        ctx.rule, ctx.numbers, ctx.count = rule, args[rule.tensors :], len(kept)
        ctx.save_for_backward(*kept, *args[: rule.tensors])
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        rule: Rule = ctx.rule
        kept, tensors = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        wanted = ctx.needs_input_grad[1 : 1 + rule.tensors]
        if torch.is_grad_enabled():
            out = rule.formula(*tensors, *ctx.numbers)
            leaves = [x for x, want in zip(tensors, wanted) if want]
            first = iter(torch.autograd.grad(out, leaves, grad_outputs[0], create_graph=True))
            found = [next(first) if want else None for want in wanted]
        else:
            found = rule.gradients(grad_outputs[0], kept, wanted, *tensors, *ctx.numbers)
        return None, *found, *[None] * len(ctx.numbers)
