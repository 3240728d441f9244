"""Merging: weights that several modules share, what files say of that, and a probe of whether merged is mixed.

A weight may be held by several modules: a head tied to the embeddings, blocks that come back every few layers. An
adapter on one of them changes that one alone, so its merged weight must be its own. Files of transformers do not say
which weights are shared: the configuration does (`tie_word_embeddings`, for all of them at once), and a model that is
loaded ties them again. So what is merged is untied in both places, or not merged.

What a family of models does with a weight apart from calling its module cannot be read off its structure. A probe sends
short rows through the model with adapters and through the merged weights, and compares.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mopl._extras import require
from mopl._restoring import evaluating, generators_kept, requires_grad_kept
from mopl.conditioning.adapted import Part, held, parts_of, places_of, shared_places
from mopl.conditioning.adapter_checks import other_targets, short_name

ROWS, LENGTH = 2, 8  # of the probe: longer than no window that matters, and rows with weights of their own
# Of ‖mixed - merged‖ / ‖mixed - plain‖. Random adapters, as large as the weights, make the denominator that of an
# adapter that is ignored; rounding gives 1e-5 in float32. In 16 bits it may give a tenth, so there modules are probed
# by name, one after another, and one that is ignored gives 1. Where what an adapter changes is no larger than the
# rounding, as attention of new models may be that is nearly even, this says nothing: then it is computed in float32.
TOLERANCE, TOLERANCE_16_BIT = 2e-2, 0.5


# ---------------------------------------------------------------- copies


def copied(model: Any) -> Any:
    """Return a deep copy of a model that computes by itself.

    A forward pass that a trainer has put in front of the model's own (TRL's head, which gives log-probabilities) calls
    what it found there, of the model that it was made for. A copy would have that model's outputs, so there it is gone.
    """
    made = copy.deepcopy(model)
    for module, other in zip(model.modules(), made.modules(), strict=True):
        if "forward" in vars(other) and _calls(vars(other)["forward"], module):
            del other.forward
    return made


def _calls(function: Any, model: nn.Module) -> bool:
    """Say whether a function holds a method of a model, in its closure or as an object, or another one that does."""
    seen: set[int] = set()
    rest = [function]
    while rest:
        one = rest.pop()
        if id(one) in seen or isinstance(one, nn.Module) or not callable(one):
            continue
        seen.add(id(one))
        if getattr(one, "__self__", None) is model:
            return True
        one = getattr(one, "__func__", one)
        rest += [cell.cell_contents for cell in getattr(one, "__closure__", None) or ()]
        rest += [one, *(value for value in getattr(one, "__dict__", {}).values())]
    return False


# ---------------------------------------------------------------- shared weights


def _memory(parameter: Tensor) -> Any:
    """Return what two parameters have in common that lie in one place, also under two objects."""
    return id(parameter) if parameter.is_meta or not parameter.numel() else (parameter.device, parameter.data_ptr())


def own_weights(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Give modules of a model parameters of their own where another module holds the same ones."""
    holders: dict[Any, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(_memory(parameter), set()).add(id(module))
    for module in modules:
        for name, parameter in list(module._parameters.items()):
            if parameter is None or len(holders[_memory(parameter)]) == 1:
                continue
            holders[_memory(parameter)].discard(id(module))
            module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def settle_ties(model: Any) -> bool:
    """Let the configuration of a model say which of its weights are shared; say whether it had to change.

    Configurations know one switch for all: where some weights that it ties are no longer one, all are untied, and those
    that are still shared get copies of their own, or files would leave them out. What ties weights that differ here
    whatever the configuration says is an error.
    """
    if not hasattr(model, "get_expanded_tied_weights_keys"):
        return False  # none of transformers, whose files are the caller's
    ties, changed = model.get_expanded_tied_weights_keys(all_submodels=True), False
    if any(_memory(a) != _memory(b) for a, b in _pairs(model, ties)):
        configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
        for config in [*configs, *(each.get_text_config() for each in configs if hasattr(each, "get_text_config"))]:
            if hasattr(config, "tie_word_embeddings"):
                config.tie_word_embeddings = False
        ties, changed = model.get_expanded_tied_weights_keys(all_submodels=True), True
        wrong = [pair for pair, (a, b) in zip(ties.items(), _pairs(model, ties), strict=True) if not torch.equal(a, b)]
        if wrong:
            raise ValueError(
                f"{type(model).__name__} always ties {wrong[0][0]} to {wrong[0][1]}, which differ in the merged model, "
                "so its files would load as another one; leave that module out of the adapters' targets or the scope"
            )
    model.all_tied_weights_keys = ties  # what saving leaves out
    # Of a weight that is in several places without a tie that says so, files would have one.
    holders: dict[Any, dict[int, tuple[nn.Module, bool]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                of_memory = holders.setdefault(_memory(parameter), {})
                tied = f"{prefix}.{name}" in ties or of_memory.get(id(module), (module, False))[1]
                of_memory[id(module)] = module, tied
    for group in holders.values():
        own_weights(model, [module for module, tied in group.values() if not tied][1:])
    return changed


def _pairs(model: nn.Module, ties: dict[str, str]) -> list[tuple[Tensor, Tensor]]:
    state = model.state_dict(keep_vars=True)
    return [(state[a], state[b]) for a, b in ties.items()]


# ---------------------------------------------------------------- adapters in weights


def merged(model: Any, dtype: torch.dtype) -> Any:
    """Return the base of a PEFT model with its adapters of any kind merged in: in float32, rounded once to `dtype`."""
    require("peft")
    from peft.tuners.tuners_utils import BaseTunerLayer

    own_weights(model, [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)])
    return model.to(torch.promote_types(dtype, torch.float32)).merge_and_unload(safe_merge=True).to(dtype)


def settle_merged(model: Any) -> None:
    """Take off a merged model what PEFT left on it, and settle its ties (see `settle_ties`)."""
    settle_ties(model)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(name, None)


def set_name(model: Any, name: str) -> None:
    """Let a model of transformers, or the one inside a PEFT model, say where it can be loaded from; "": nowhere."""
    inner = getattr(model, "get_base_model", lambda: model)()
    if hasattr(inner, "config") and hasattr(inner, "name_or_path"):
        inner.name_or_path = inner.config._name_or_path = name


# ---------------------------------------------------------------- the probe


def probe_ids(model: Any) -> Tensor | None:
    """Return short rows of tokens (2, 8) for a causal language model; None for anything else."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    if weight is None or weight.is_meta or hasattr(weight, "device_mesh") or weight.ndim != 2 or len(weight) < 8:
        return None  # elsewhere (meta, sharded), or no tokens
    return 3 + torch.arange(ROWS * LENGTH, device=weight.device).view(ROWS, LENGTH) * 5 % (len(weight) - 3)


def logits_of(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """Return the logits (B, T, V) of rows, in float64."""
    base = getattr(model, "get_base_model", lambda: model)()
    if "use_cache" in inspect.signature(type(base).forward).parameters:
        kwargs["use_cache"] = False
    return model(input_ids=ids, **kwargs).logits.double()


@torch.no_grad()
def check_lora(
    model: Any,
    adapters: Sequence[str],
    mixed: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    whole: bool = False,
) -> None:
    """Raise unless LoRA adapters of a PEFT model compute what the weights do that they are merged into.

    A few short rows go through the model with adapters of random values, once a model and not for each trade-off.
    Modes of modules and generators stay as they are, and nothing is run where weights are elsewhere. The error names
    the modules that differ, and the targets that do not.

    Args:
        model: The PEFT model.
        adapters: Names of its adapters.
        mixed: Called with ids (2, T) and coefficients (2, adapters) for the logits of rows with mixtures of their own;
            None: the model's forward, whose adapters count once each.
        whole: The coefficients that it is called with sum to 1.
    """
    parts, base = parts_of(model), model.get_base_model()
    ids = probe_ids(base)
    if ids is None or any(not p.is_floating_point() for part in parts.values() for p in part.base.parameters()):
        return
    generator = torch.Generator().manual_seed(0)
    shares = torch.ones(ROWS, len(adapters)) if mixed is None else torch.rand(ROWS, len(adapters), generator=generator)
    shares = shares / shares.sum(-1, keepdim=True) if whole else shares
    run = mixed or (lambda ids, _: logits_of(model, ids))
    with evaluating(model), generators_kept(), requires_grad_kept(model):

        def plain() -> Tensor:
            with model.disable_adapter():
                return logits_of(base, ids)

        try:
            start = plain()
        except Exception:
            return  # it needs more than input_ids
        groups: dict[str, dict[str, Part]] = {}
        for name, part in parts.items():
            groups.setdefault(short_name(name), {})[name] = part

        def differs(some: dict[str, Part], start: Tensor, tolerance: float) -> float | None:
            probes = [part.probe(adapters, generator if name in some else None) for name, part in parts.items()]
            with held([place for places in probes for place in places]):
                found, merged = run(ids, shares), []
                for row, coefficients in enumerate(shares.tolist()):
                    with model.disable_adapter(), held(places_of(some.values(), adapters, coefficients)):
                        merged.append(logits_of(base, ids)[row])
            return _share(found, torch.stack(merged), start, tolerance)

        try:
            tolerance = _tolerance(base.dtype)
            exact = tolerance == TOLERANCE
            if exact and differs(parts, start, tolerance) is None:
                return
            shares_of = {name: differs(some, start, tolerance) for name, some in groups.items()}
            if not exact and any(share is not None for share in shares_of.values()):
                # Where memory, or a module in float32, fails, what was found stands.
                with contextlib.suppress(RuntimeError):
                    wide = {id(p): p.float() for p in model.parameters() if p.element_size() == 2}
                    with held(shared_places(model, wide)):
                        start = plain()
                        for name, share in shares_of.items():
                            if share is not None:
                                shares_of[name] = differs(groups[name], start, TOLERANCE)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{type(base).__name__} fails with adapters on {', '.join(groups)} ({type(error).__name__}: {error}); "
                "it does not take one of these modules for a linear layer: choose other target_modules"
            ) from error
    bad = {name: share for name, share in shares_of.items() if share is not None}
    if bad or exact:
        names = bad or groups
        raise ValueError(
            f"adapters on {', '.join(names)} of {type(base).__name__} do not compute what the merged weights do (short "
            f"rows differ by {max(bad.values(), default=1):.0%} of what the adapters change): the model uses these "
            f"weights past the adapter, or twice; {other_targets(groups, names)}"
        )


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE if dtype in (torch.float32, torch.float64) else TOLERANCE_16_BIT


def _share(found: Tensor, merged: Tensor, plain: Tensor, tolerance: float) -> float | None:
    """Return ‖found - merged‖ / ‖found or merged - plain‖ where it is above a tolerance; None where it is not."""
    moved = torch.maximum((found - plain).norm(), (merged - plain).norm())
    error = (found - merged).norm()
    if not bool(moved.isfinite()) or float(moved) <= 1e-6 * float(plain.norm()):
        return None  # float16 that overflows says nothing, and an adapter that changes nothing is merged rightly
    share = float(error / moved)
    return share if share > tolerance else None


def check_mixed_rows(name: str, found: Tensor, merged: Tensor, plain: Tensor, remedy: str, dtype: torch.dtype) -> None:
    """Raise unless rows that were mixed have the logits of rows that were merged, beside those of the plain model."""
    share = _share(found, merged, plain, _tolerance(dtype))
    # Of a mixture that is hardly trained the merged weights may be those of the plain model, but for rounding.
    if share is not None and float((found - merged).norm()) > torch.finfo(dtype).eps * float(plain.norm()):
        raise ValueError(
            f"the merged {name} does not compute what the mixture does (short rows differ by {share:.0%} of what the "
            f"mixture changes): the model uses these weights past their module; {remedy}"
        )
