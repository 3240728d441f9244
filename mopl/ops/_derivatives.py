"""Derivatives beyond the first, forward mode and the transforms of `torch.func`: one rule for all ops.

An op's own passes, kernels and closed forms, give its value and its first derivative in reverse mode. Autograd cannot
look inside them: left alone, a second derivative would be 0 or an error, and a forward-mode derivative 0. Hence every
op either has a *formula*, the same function in differentiable PyTorch functions and without a look at any value, or it
refuses. The formula serves

* the derivative of the first derivative, which keeps the value of the closed form, and higher ones (`gradients`);
* forward mode, and everything under `torch.func` (`transformed`): PyTorch carries its transforms through the formula.

A formula takes the same care of masked items, ties, infinite scores and small losses as the op, in every derivative. It
may cost more: time and memory of ordinary autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

Tensors = Sequence[Tensor | None]


def transformed() -> bool:
    """Say whether a `torch.func` transform or a level of forward-mode differentiation surrounds the caller."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


_CPU = torch._C.DispatchKey.CPU  # which a batched tensor of `is_grads_batched` does not have


def undispatched(*tensors: Tensor | None) -> bool:
    """Say whether an op may skip PyTorch's dispatcher: plain tensors on a CPU, and nothing watches the calls."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
        and torch._C._len_torch_function_stack() == torch._C._len_torch_dispatch_stack() == 0
        and torch._ops._len_torch_dispatch_stack_pre_dispatch() == 0
        and all(t is None or (type(t) in (Tensor, Parameter) and torch._C._dispatch_keys(t).has(_CPU)) for t in tensors)
    )


class Refusal(NamedTuple):
    """Stands in the place of a formula where an op refuses."""

    name: str  # of the op
    remedy: str  # what has the derivatives that are refused


Formula = Callable[..., Tensor | tuple[Tensor, ...]]


def gradients(
    ctx,
    places: Sequence[int],
    upstream: Tensors,
    closed_form: Callable[[], Tensors],
    formula: Formula | Refusal,
    arguments: Tensors,
) -> Tensors:
    """Return what an op's backward pass returns, one for each input, differentiable where that may be asked for.

    The op is differentiable at `places` of its inputs, which are the same places of the formula's `arguments`.
    `closed_form` gives something for each of them; what autograd does not need is not looked at. `upstream` are the
    gradients of the formula's results.
    """
    need = ctx.needs_input_grad
    result: list[Tensor | None] = [None] * len(need)
    if all(g is None for g in upstream):
        return tuple(result)
    if not torch.is_grad_enabled() and not transformed():
        for place, gradient in zip(places, closed_form(), strict=True):
            if need[place]:
                result[place] = gradient
        return tuple(result)
    wanted = [place for place in places if need[place]]
    if not transformed():
        with torch.no_grad():
            values = tuple(g for place, g in zip(places, closed_form(), strict=True) if need[place])
        found = _Gradients.apply(formula, wanted, values, len(upstream), *upstream, *arguments)
    elif isinstance(formula, Refusal):
        raise NotImplementedError(
            f"{formula.name} cannot run its backward pass under torch.func.vmap, is_grads_batched or forward-mode "
            f"differentiation; {formula.remedy}"
        )
    else:  # the upstream gradients are batched or have tangents
        found = _pull_back(formula, arguments, wanted, upstream)
    return tuple(_with(result, wanted, found))  # type: ignore[arg-type]


def refuse_transforms(refusal: Refusal, *inputs: Tensor | None) -> None:
    """Raise where an op without a formula would be differentiated in forward mode or under `torch.func`."""
    name, remedy = refusal
    if not transformed():
        return
    given = [t for t in inputs if isinstance(t, Tensor)]
    if any(forward_ad.unpack_dual(t).tangent is not None for t in given):
        raise NotImplementedError(f"{name} has no forward-mode derivative (jvp, jacfwd, hessian); {remedy}")
    if torch.is_grad_enabled() and any(map(_tracked, given)):
        raise NotImplementedError(f"{name} cannot be differentiated under torch.func (grad, vjp, jacrev); {remedy}")


def _tracked(tensor: Tensor) -> bool:
    """Say whether a tensor, or one that a transform has wrapped in it, requires a gradient."""
    while not tensor.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # type: ignore[attr-defined]
        tensor = torch._C._functorch.get_unwrapped(tensor)  # type: ignore[attr-defined]
    return tensor.requires_grad


def keep(ctx, *constants: Tensor | None) -> None:
    """Keep constants of the op for its formula: the first derivative does not read them and does not mind changes."""
    ctx.constants, ctx.versions = constants, _versions(constants)


def kept(ctx) -> tuple[Tensor | None, ...]:
    """Return what `keep` kept; raise if a second derivative would read what has changed since."""
    if torch.is_grad_enabled() and ctx.versions != _versions(ctx.constants):
        raise RuntimeError(
            "one of the tensors needed for a second derivative (labels, order, weights or mask of a loss) has been "
            "modified by an inplace operation since the loss was computed; pass a clone of it"
        )
    return ctx.constants


def _versions(tensors: Tensors) -> list[int | None]:
    return [None if t is None or t.is_inference() else t._version for t in tensors]


def _with(tensors: Tensors, places: Sequence[int], values: Tensors) -> list:
    """Return tensors with `values` at some places."""
    given = list(tensors)
    for place, value in zip(places, values, strict=True):
        given[place] = value
    return given


def _pull_back(formula: Formula, arguments: Tensors, places: Sequence[int], upstream: Tensors) -> tuple[Tensor, ...]:
    """Return the gradients at some arguments of a formula, by PyTorch's derivative of it."""

    def results(*values: Tensor) -> tuple[Tensor, ...]:
        found = formula(*_with(arguments, places, values))
        found = found if isinstance(found, tuple) else (found,)
        return tuple(part for part, g in zip(found, upstream, strict=True) if g is not None)

    _, pull = torch.func.vjp(results, *(arguments[place] for place in places))  # type: ignore[misc]
    return pull(tuple(g for g in upstream if g is not None))


class _Gradients(torch.autograd.Function):
    """Gradients that were computed in closed form, as a differentiable function of all they depend on."""

    @staticmethod
    def forward(ctx, formula, places, values, count, *tensors):  # type: ignore[override]
        ctx.formula, ctx.places, ctx.count = formula, places, count
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return values

    @staticmethod
    def backward(ctx, *upstream):  # type: ignore[override]
        if isinstance(ctx.formula, Refusal):
            raise NotImplementedError(
                f"{ctx.formula.name} has no second derivative (create_graph, hessian); {ctx.formula.remedy}"
            )
        tensors = list(ctx.saved_tensors)
        need = [i for i in range(len(tensors)) if ctx.needs_input_grad[4 + i]]
        live = [k for k, g in enumerate(upstream) if g is not None]

        def first(*values: Tensor) -> tuple[Tensor, ...]:
            given = _with(tensors, need, values)
            wanted = [ctx.places[k] for k in live]
            return _pull_back(ctx.formula, given[ctx.count :], wanted, given[: ctx.count])

        result: Tensors = [None] * len(tensors)
        if need and live:
            values, pull = torch.func.vjp(first, *(tensors[i] for i in need))  # type: ignore[misc]
            found = pull(tuple(upstream[k].to(v.dtype) for k, v in zip(live, values, strict=True)))
            result = _with(result, need, found)
        return None, None, None, None, *result


# ---------------------------------------------------------------------------------------------------------------------
# What formulas are made of


class _Finite(torch.autograd.Function):
    """Infinities become 0; the derivative is 1 there, too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.where(x.isinf(), 0, x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        return gradient

    @staticmethod
    def jvp(ctx, tangent):  # type: ignore[override]
        return tangent.clone()


def finite(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x with 0 for infinities, and a constant to add after all products: beyond any number where x is infinite.

    Apart, so that a derivative of 0 times an infinite score, squared in a second derivative, is not NaN.
    """
    beyond = torch.finfo(x.dtype).max / 1024
    return _Finite.apply(x), torch.where(x.isinf(), x.detach().clamp(-beyond, beyond), 0)  # type: ignore[return-value]


def log_softmax(u: Tensor) -> Tensor:
    """Return log softmax along the last dimension of finite u; a likely entry keeps every digit of its logarithm."""
    peak = u.detach().argmax(-1, keepdim=True)
    shifted = u - u.gather(-1, peak)
    others = shifted.exp().scatter(-1, peak, 0)  # exp of the peak is 1: adding it would round the rest
    return shifted - others.sum(-1, keepdim=True).log1p()
