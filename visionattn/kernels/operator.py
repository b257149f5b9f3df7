"""Operators of the package as operators of PyTorch: all that every mechanism needs, from one record.

`register` takes what differs between mechanisms, a `Definition`, and returns the dispatch table. Behind it
stand two operators of `torch.library`, `visionattn::NAME` and `visionattn::NAME_backward`, with fake tensors,
autograd, second derivatives, `vmap` and FLOP formulas; an argument of theirs names the implementation that is
their body. Fused kernels always run through them. Plain PyTorch runs as it is, except where one node says
more than its parts: while a `FlopCounterMode` counts, and in compiled programs, which are so traced in
milliseconds and for any size. Exported programs hold operators of PyTorch alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.utils.flop_counter import register_flop_formula

from visionattn._compat import is_counting_flops, is_exporting, is_functorch_active
from visionattn.kernels.dispatch import Operator

Function = TypeVar("Function", bound=Callable[..., Any])
Implementation = Callable[..., Any]
Refuses = Callable[..., "str | None"]

_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Definition:
    """One mechanism, for `register`.

    Attributes:
        name: of the operator.
        schema: arguments of PyTorch's operator: tensors first, the queries before all, then numbers, as
            `"Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, bool return_lse"`. With `return_lse`
            there are two outputs, as the queries and as their log-sum-exp, without it there is one.
        implementations: per backend, from arguments to the outputs; the log-sum-exp is None unless asked for.
            `reference` and `torch` are there always, and the latter is differentiable twice. Fused kernels
            return a log-sum-exp every time.
        backwards: per backend, `(grads, outputs, wanted, *arguments)` to a gradient for each tensor but the
            `constants`: `grads` of the outputs, None where there is none; `outputs` of fused kernels;
            `wanted`, one truth value per gradient. Backends that are not named have that of `torch`.
        flops: operations of a forward and of a backward pass, from the operator's arguments, shapes in place
            of tensors.
        constants: names of tensors without a gradient, such as lists of indices.
        shared: names of tensors that the samples of a batch share: where one is given, `vmap` takes samples
            one by one; elsewhere a mapped axis is more batch.
        fused: backends that always run as the operator of PyTorch.
        keeps_outputs: whether the backward pass of these starts from their outputs.
        shape: the shape of the output, from the operator's arguments; by default that of the queries.
        refusals: per backend, what it cannot take, beyond what `refuses_fused` says of all fused kernels.
        pack: from arguments of implementations to those of the operator; the same by default.
        unpack: its inverse.
    """

    name: str
    schema: str
    implementations: Mapping[str, Implementation]
    backwards: Mapping[str, Callable[..., Sequence[Tensor | None]]]
    flops: tuple[Callable[..., int], Callable[..., int]]
    constants: tuple[str, ...] = ()
    shared: tuple[str, ...] = ("bias",)
    fused: tuple[str, ...] = ("triton",)
    keeps_outputs: bool = True
    shape: Callable[..., Sequence[int]] = lambda q, *args: q.shape
    refusals: Mapping[str, Refuses] = field(default_factory=dict)
    pack: Callable[..., Sequence[Any]] = lambda *args: args
    unpack: Callable[..., Sequence[Any]] = lambda *args: args


def register(definition: Definition) -> Operator:
    """Register an operator with PyTorch and make its dispatch table."""
    node = _Node(definition)
    rows = {backend: node.row(backend) for backend in definition.implementations}
    refusals = dict(definition.refusals)
    refusals.update((backend, _refusal(refusals.get(backend))) for backend in definition.fused)
    return Operator(definition.name, rows, refusals)


def leaf(function: Function) -> Function:
    """Make a public function one node of `torch.fx` graphs: its checks ask for sizes, which proxies lack."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for x in args[:1] or kwargs.values():
            if isinstance(x, Proxy):
                return x.tracer.create_proxy("call_function", call, args, kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def refuses_fused(x: Tensor, *args: Any) -> str | None:
    """Why no fused kernel can take these arguments, or None where one can."""
    if x.dtype not in _FUSED_DTYPES:
        return f"the fused kernels compute in float32, float16 and bfloat16, not in {x.dtype}"
    if x.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return "Triton's interpreter computes nonsense in bfloat16"
    for t in chain((x,), *(a if isinstance(a, tuple) else (a,) for a in args)):
        # Offsets inside an image, or inside a head of a bias.
        if isinstance(t, Tensor) and sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:])) >= 2**31:
            return "the fused kernels address 2**31 numbers per image"
    return None


def _refusal(also: Refuses | None) -> Refuses:
    return refuses_fused if also is None else lambda *args: refuses_fused(*args) or also(*args)


class _Node:
    """The two operators of PyTorch behind a definition.

    An output or a gradient that there is not is a tensor `[0]` to them: no real one has a single axis.
    """

    def __init__(self, definition: Definition):
        self.definition = definition
        arguments = [argument.split() for argument in definition.schema.split(", ")]
        names = [name for _, name in arguments]
        self.tensors = [name for kind, name in arguments if kind.startswith("Tensor")]
        self.differentiable = [i for i, x in enumerate(self.tensors) if x not in definition.constants]
        self.lse = names.index("return_lse") if "return_lse" in names else None
        self.outputs = 1 if self.lse is None else 2
        self.forward = self._define_forward()
        self.backward = self._define_backward()

    def row(self, backend: str) -> Implementation:
        """The function in the dispatch table."""
        implementation = self.definition.implementations[backend]
        if backend in self.definition.fused:
            return lambda *args: self.run(backend, *args)

        def run(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                is_node = not is_exporting()
            else:
                # Transforms of torch.func differentiate parts only, no operator of torch.library.
                is_node = is_counting_flops() and not is_functorch_active()
            return self.run(backend, *args) if is_node else implementation(*args)

        return run

    def run(self, backend: str, *args: Any) -> Any:
        """Run the operator on arguments of an implementation."""
        flat = list(self.definition.pack(*args))
        if self.lse is None:
            return self.forward(*flat, backend)
        return_lse = flat[self.lse]
        flat[self.lse] = return_lse or backend in self.definition.fused
        out, lse = self.forward(*flat, backend)
        return out, lse if return_lse else None

    def _define_forward(self) -> Any:
        definition = self.definition

        def forward(*args: Any) -> Any:
            *flat, backend = args
            found = _several(definition.implementations[backend](*definition.unpack(*flat)))
            return _one_or_all([_absent(flat[0]) if x is None else x.contiguous() for x in found])

        def fake(*args: Any) -> Any:
            q, lse = args[0], self.lse is not None and args[self.lse]
            wide = torch.promote_types(q.dtype, torch.float32)
            rest = [q.new_empty(q.shape[:-1] if lse else (0,), dtype=wide)][: self.outputs - 1]
            return _one_or_all([q.new_empty(definition.shape(*args[:-1])), *rest])

        def keep(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
            ctx.numbers = inputs[len(self.tensors) :]
            kept = definition.keeps_outputs and inputs[-1] in definition.fused
            outs = _several(output) if kept else (None,) * self.outputs
            ctx.save_for_backward(*outs, *inputs[: len(self.tensors)])
            ctx.set_materialize_grads(False)

        def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            grads = tuple(g if g is None or g.dim() > 1 else None for g in grads)
            wanted = [ctx.needs_input_grad[i] for i in self.differentiable]
            found = _several(self.backward(*grads, *ctx.saved_tensors, *ctx.numbers, wanted))
            gradients: list[Tensor | None] = [None] * (len(self.tensors) + len(ctx.numbers))
            for i, gradient, want in zip(self.differentiable, found, wanted):
                gradients[i] = gradient if want else None
            return tuple(gradients)

        schema = f"({definition.schema}, str backend) -> {_results(self.outputs)}"
        return _define(
            definition.name,
            schema,
            (forward, fake, keep, differentiate),
            lambda *args: definition.flops[0](*args[:-1]),
            _vmap_rule(self.tensors, definition.shared),
        )

    def _define_backward(self) -> Any:
        definition, outputs, split, like = self.definition, self.outputs, self._split, self._like

        def backward(*args: Any) -> Any:
            grads, outs, flat, wanted = split(args)
            rule = definition.backwards.get(args[-2], definition.backwards["torch"])
            found = rule(grads, outs, wanted, *definition.unpack(*flat))
            results = []
            for i, gradient, want in zip(self.differentiable, found, wanted):
                if gradient is None or not want:
                    gradient = _absent(flat[0])
                elif gradient.stride() != like(flat, i).stride():
                    gradient = like(flat, i).copy_(gradient)
                results.append(gradient)
            return _one_or_all(results)

        def fake(*args: Any) -> Any:
            _, _, flat, wanted = split(args)
            pairs = zip(self.differentiable, wanted)
            return _one_or_all([like(flat, i) if want else _absent(flat[0]) for i, want in pairs])

        def keep(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
            grads, _, flat, ctx.wanted = split(inputs)
            ctx.numbers, ctx.count = flat[len(self.tensors) :], len(inputs)
            ctx.save_for_backward(*grads, *flat[: len(self.tensors)])

        def differentiate(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
            second = self._second_derivatives(ctx.saved_tensors, ctx.numbers, ctx.wanted, weights)
            # The outputs count as functions of the tensors.
            gradients = [*second[:outputs], *[None] * outputs, *second[outputs:]]
            return *gradients, *[None] * (ctx.count - len(gradients))

        tensors = [*(f"grad_{i}" for i in range(outputs)), *(f"out_{i}" for i in range(outputs))]
        more = ", ".join(f"Tensor? {name}" for name in tensors)
        schema = f"({more}, {definition.schema}, str backend, bool[] wanted)"
        return _define(
            f"{definition.name}_backward",
            f"{schema} -> {_results(len(self.differentiable))}",
            (backward, fake, keep, differentiate),
            lambda *args: definition.flops[1](*split(args)[2]),
            _vmap_rule([*tensors, *self.tensors], definition.shared),
        )

    def _split(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Cut arguments of the backward operator: gradients, outputs, the forward operator's, `wanted`."""
        count = self.outputs
        return args[:count], args[count : 2 * count], args[2 * count : -2], args[-1]

    def _like(self, flat: Sequence[Any], i: int) -> Tensor:
        """An empty gradient of a tensor: contiguous, or strided as a bias is."""
        is_shared = self.tensors[i] in self.definition.shared
        return torch.empty_like(flat[i]) if is_shared else flat[i].new_empty(flat[i].shape)

    def _second_derivatives(
        self, saved: Sequence[Tensor | None], numbers: Sequence[Any], wanted: Sequence[bool], weights: Any
    ) -> list[Tensor | None]:
        """Gradients of the gradients for gradients and tensors, by differentiable PyTorch."""
        leaves: list[Any] = [
            x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in saved
        ]
        grads, tensors = leaves[: self.outputs], leaves[self.outputs :]
        definition = self.definition
        with torch.enable_grad():
            found = _several(definition.implementations["torch"](*definition.unpack(*tensors, *numbers)))
            outs = [(out, grad) for out, grad in zip(found, grads) if out is not None and grad is not None]
            inputs = [tensors[i] for i, want in zip(self.differentiable, wanted) if want]
            first = torch.autograd.grad(
                [out for out, _ in outs], inputs, [grad for _, grad in outs], create_graph=True
            )
            weights = [weight for weight, want in zip(weights, wanted) if want]
            variables = [x for x in leaves if x is not None and x.requires_grad]
            second = iter(torch.autograd.grad(first, variables, weights, allow_unused=True))
        return [next(second) if x is not None and x.requires_grad else None for x in leaves]


def _define(
    name: str,
    schema: str,
    functions: tuple[Callable[..., Any], ...],
    flops: Callable[..., int],
    vmap: Callable[..., Any],
) -> Any:
    """An operator of PyTorch from its body, fake, what it keeps for its gradient, and that."""
    body, fake, keep, differentiate = functions
    operator = torch.library.custom_op(f"visionattn::{name}", body, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    operator.register_autograd(differentiate, setup_context=keep)
    packet = getattr(torch.ops.visionattn, name)
    operator.register_vmap(vmap(packet.default))
    register_flop_formula(packet)(lambda *args, **kwargs: flops(*args))
    return packet.default


def _vmap_rule(tensors: Sequence[str], shared: tuple[str, ...]) -> Callable[..., Any]:
    """The rule for `vmap` of an operator whose arguments begin with these tensors."""

    def rule_of(operator: Any) -> Any:
        def one_by_one(info: Any, in_dims: Sequence[Any], *args: Any) -> list[Tensor]:
            samples = [
                _several(
                    operator(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims)))
                )
                for i in range(info.batch_size)
            ]
            return [torch.stack(parts) for parts in zip(*samples)]

        def together(info: Any, in_dims: Sequence[Any], *args: Any) -> list[Tensor]:
            size, count = info.batch_size, len(tensors)
            stacked = [
                a if a is None else a.expand(size, *a.shape) if dim is None else a.movedim(dim, 0)
                for a, dim in zip(args[:count], in_dims)
            ]
            flat = [None if a is None else a.flatten(0, 1) for a in stacked]
            outs = _several(operator(*flat, *args[count:]))
            # What there is not has no batch either.
            return [
                out.unflatten(0, (size, out.shape[0] // size)) if out.dim() > 1 else out.expand(size, 0)
                for out in outs
            ]

        def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
            is_shared = any(name in shared and a is not None for name, a in zip(tensors, args))
            outs = (one_by_one if is_shared else together)(info, in_dims, *args)
            return _one_or_all(outs), 0 if len(outs) == 1 else (0,) * len(outs)

        return rule

    return rule_of


def _results(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _several(outputs: Any) -> Sequence[Any]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _one_or_all(outputs: Sequence[Tensor]) -> Any:
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _absent(x: Tensor) -> Tensor:
    return x.new_empty(0)
