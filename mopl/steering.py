"""Control after training: all of it is one weighted sum of log-scores, `log_mix`, or one of parameters, `soup`.

    log_mix = s0 + Σ_e c_e (s_e - s0),   in probabilities   p ∝ p0^(1 - Σ c_e) Π_e p_e^(c_e)

| function                  | coefficients       | source                                                   |
|---------------------------|--------------------|----------------------------------------------------------|
| `rescale`                 | 1/c                | COS-DPO, equation (14): (1 - 1/c) s0 + s/c               |
| `beta_conditioned`        | 1/‖β‖₁             | COS-DPO, equation (15)                                   |
| `realign`                 | λ                  | DeRa (Liu et al., ICML 2024): p0^(1-λ) p^λ               |
| `guide`                   | λ, and 1 of p_L    | emulated fine-tuning, proxy-tuning: p_L (p/p0)^λ         |
| `mix_experts`             | w_1..w_m, no s0    | multi-objective decoding: Π_i p_i^(w_i)                  |
| `modpo_reward`            | 1/w_i and -w_j/w_i | MODPO and MO-DPO, COS-DPO's equation (17)                |

Two knobs follow for a model conditioned on weights: w trades the auxiliary objectives against each other, c trades
all of them against the base model. c > 1 is a larger β and closer to the base; c = 1 is the model as it was
trained; c < 1 extrapolates beyond it.

What the linear transformation property (COS-DPO, Proposition 3.1) promises, and what it does not:

* It is about optima: if s is optimal at β, the rescaled scores are optimal at c β, within a class of
  functions that is closed under s -> s0 + (s - s0)/c. Free scores and the parametrisation s0 + network are closed; a
  network trained from scratch beside s0 is so only approximately.
* It holds for every loss that sees only β_j (s - s0), up to a common factor: listwise DPO, Plackett-Luce, the pairwise
  DPO family, MODPO, also with a penalty that is a function of the loss vector. It fails where a second scale enters:
  KTO's z0, an added likelihood term, ORPO, a margin that stays fixed while β moves.
* In log-probabilities the result is not normalised; `normalize=True` does it. It is exact for whole sequences and for
  re-ranking a list of candidates. Mixing the logits of single tokens is the usual approximation, not the same policy.
* A mixture of experts has no support outside theirs: what every expert has collapsed away from stays away.

A small model guides a large one (`guide`): if p is the optimum of E r - β KL(p || p0), r = Σ_i w_i R_i say, then

    p_c(y|x) ∝ p_L(y|x) (p(y|x) / p0(y|x))^(1/c) ∝ p_L(y|x) exp(r(x,y) / (cβ))

is the optimum of that reward at temperature cβ for the reference p_L. Every p has such a reward, β log p/p0. Mitchell
et al. (ICLR 2024, emulated fine-tuning) add that of a small pair to log p_L, Liu et al. (COLM 2024, proxy-tuning) the
difference of its logits to those of p_L, both by tokens; Zhou et al. (NeurIPS 2024, weak-to-strong search) let p_L
propose chunks and keep those of the largest log p/p0. Here p is conditioned on w.

Shapes: scores (..., K), the last dimension the list (or the vocabulary). A coefficient is a number or a tensor with
one value a list, (...) or broadcastable to it; (..., 1) is accepted too. 16-bit and float32 scores are mixed in
float32, float64 in float64. Everything is differentiable. An item that is impossible (-inf) in the reference, or in a
score whose coefficient is not 0, is impossible in the result; what stands at other items does not touch it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mopl._arguments import check_floating, check_positive, compute_dtype, shape_of
from mopl._counted import counted, there_are
from mopl._renamed import renamed_keywords, renamed_names
from mopl.conditioning.sampling import check_weights


def log_mix(
    scores: Tensor | Sequence[Tensor],  # E tensors (..., K), or one
    coefficients: float | Tensor | Sequence[float | Tensor],  # E numbers or tensors (...)
    *,
    reference: Tensor | None = None,  # (..., K)
    normalize: bool = False,
    mask: Tensor | None = None,  # (..., K) bool
) -> Tensor:  # (..., K)
    """Mix log-scores: reference + Σ_e c_e (scores_e - reference), or Σ_e c_e scores_e without a reference.

    Args:
        scores: One tensor (..., K) or a sequence of E of them: scores, logits or log-probabilities.
        coefficients: c_e, one for each tensor: numbers, or tensors with one value a list.
        reference: s0, which takes the rest 1 - Σ c_e; None leaves it out.
        normalize: Return log-probabilities over the last dimension.
        mask: True where an item exists; the others come out as -inf and are ignored, NaN included.

    Returns:
        (..., K) in float32, or float64 where an input is.

    Raises:
        TypeError: If something that must be a tensor is not.
        ValueError: If numbers of tensors or shapes disagree.
    """
    parts = [scores] if isinstance(scores, Tensor) else list(scores)
    given = [coefficients] if isinstance(coefficients, (int, float, Tensor)) else list(coefficients)
    if not parts or len(parts) != len(given):
        raise ValueError(f"scores has {counted(len(parts), 'tensor')} and coefficients {len(given)}; pass one for each")
    named = [(f"scores[{e}]" if len(parts) > 1 else "scores", part) for e, part in enumerate(parts)]
    if reference is not None:
        named.append(("reference", reference))
    for name, tensor in named:
        _check_like(tensor, parts[0], name)
    if mask is not None and (mask.shape != parts[0].shape or mask.dtype != torch.bool):
        raise ValueError(f"mask is {mask.dtype} {shape_of(mask)} but must be torch.bool {shape_of(parts[0])}")

    dtype = compute_dtype(*parts, reference)
    per_list = [_per_list(c, parts[0], dtype, f"coefficients[{e}]") for e, c in enumerate(given)]
    impossible = torch.zeros_like(parts[0], dtype=torch.bool) if mask is None else ~mask
    for part, coefficient in zip(parts, per_list, strict=True):
        impossible = impossible | ((part == -torch.inf) & (coefficient != 0))
    if reference is not None:
        impossible = impossible | (reference == -torch.inf)
    # A score with coefficient 0 may be -inf where the result is finite: 0 * -inf would be NaN.
    absent = [impossible | (part == -torch.inf) for part in parts]
    parts = [_finite(part.to(dtype), gone, normalize) for part, gone in zip(parts, absent, strict=True)]

    if reference is None:
        mixed = sum((c * part for c, part in zip(per_list[1:], parts[1:], strict=True)), per_list[0] * parts[0])
    else:
        start = _finite(reference.to(dtype), impossible, normalize)
        # lerp returns its ends exactly, so that c = 1 keeps even the ties of the scores.
        mixed = torch.lerp(start, parts[0], per_list[0])
        for part, c in zip(parts[1:], per_list[1:], strict=True):
            mixed = mixed + c * (part - start)
    if normalize:
        mixed = mixed.masked_fill(impossible, -torch.inf).log_softmax(-1)
    return mixed.masked_fill(impossible, -torch.inf)


def rescale(
    scores: Tensor,  # (..., K)
    reference: Tensor,  # (..., K)
    c: float | Tensor,  # number or (...)
    *,
    normalize: bool = False,
    mask: Tensor | None = None,  # (..., K) bool
) -> Tensor:  # (..., K)
    """Move a model trained at β to c β without training: (1 - 1/c) s0 + s/c (COS-DPO, equation 14).

    Args:
        scores: Scores of the trained model, (..., K).
        reference: Scores of the base model, (..., K).
        c: Factor of β, positive: above 1 towards the base model, 1 as trained, below 1 away from it.
        normalize: Return log-probabilities over the last dimension.
        mask: True where an item exists.

    Returns:
        (..., K), as `log_mix`.

    Raises:
        ValueError: If c is not positive, or as `log_mix`.
    """
    factor = check_positive(c, "c", "the factor of β; larger stays closer to the reference")
    inverse = 1.0 / (factor.double() if factor.ndim or isinstance(c, Tensor) else float(factor))
    return log_mix(scores, inverse, reference=reference, normalize=normalize, mask=mask)


@renamed_keywords(temperature="beta")
def beta_conditioned(
    net_scores: Tensor,  # (..., K)
    reference: Tensor,  # (..., K)
    beta: Sequence[float] | Tensor,  # (m,) or (..., m)
    *,
    normalize: bool = False,
    mask: Tensor | None = None,  # (..., K) bool
) -> Tensor:  # (..., K)
    """Scores at β of a network conditioned on β / ‖β‖₁: (1 - 1/‖β‖₁) s0 + net/‖β‖₁ (COS-DPO, eq. 15).

    Then β_j (s - s0) = (β_j / ‖β‖₁) (net - s0), so the training loss is the loss of `net_scores` at
    β / ‖β‖₁, and this function is needed only afterwards.

    Args:
        net_scores: Output of the network for β / ‖β‖₁, (..., K).
        reference: Scores of the base model, (..., K).
        beta: β, positive, one for each objective: (m,) or (..., m).
        normalize: Return log-probabilities over the last dimension.
        mask: True where an item exists.

    Returns:
        (..., K), as `log_mix`.

    Raises:
        ValueError: If a β is not positive, or as `log_mix`.
    """
    given = check_positive(beta, "beta", "one for each objective")
    if given.ndim == 0:
        raise ValueError("beta is one number but must hold one for each objective, (m,) or (..., m)")
    return rescale(net_scores, reference, given.double().sum(-1), normalize=normalize, mask=mask)


def realign(
    scores: Tensor,  # (..., K)
    reference: Tensor,  # (..., K)
    strength: float | Tensor,  # number or (...)
    *,
    normalize: bool = True,
    mask: Tensor | None = None,  # (..., K) bool
) -> Tensor:  # (..., K)
    """Decoding-time realignment: p ∝ p0^(1-λ) p^λ (DeRa, Liu et al., ICML 2024).

    From the optimum at KL weight β it gives the optimum at β/λ; it is `rescale` with c = 1/λ, but λ = 0 is allowed.

    Args:
        scores: Log-probabilities, logits or scores of the aligned model, (..., K).
        reference: The same of the reference model.
        strength: λ: 0 the reference, 1 the aligned model, above 1 beyond it.
        normalize: Return log-probabilities over the last dimension.
        mask: True where an item exists.

    Returns:
        (..., K), as `log_mix`.
    """
    return log_mix(scores, strength, reference=reference, normalize=normalize, mask=mask)


def guide(
    scores: Tensor,  # (..., K)
    reference: Tensor,  # (..., K)
    guided: Tensor,  # (..., K)
    strength: float | Tensor,  # number or (...)
    *,
    normalize: bool = True,
    mask: Tensor | None = None,  # (..., K) bool
) -> Tensor:  # (..., K)
    """Guide a large model by a small one: p ∝ p_L (p/p0)^λ, see above; with p_L = p0 it is `realign`, to the bit.

    Args:
        scores: s: log-probabilities, logits or scores of the small tuned model, (..., K).
        reference: s0: the same of the small model that it was tuned from.
        guided: s_L: the same of the large model, of the same K items.
        strength: λ = 1/c: 0 the guided model alone, 1 the whole difference; from the optimum at β to the one at β/λ.
        normalize: Return log-probabilities over the last dimension.
        mask: True where an item exists.

    Returns:
        (..., K), as `log_mix`.
    """
    return log_mix([scores, guided], [strength, 1.0], reference=reference, normalize=normalize, mask=mask)


def mix_experts(
    scores: Sequence[Tensor],  # m tensors (..., K)
    weights: Sequence[float] | Tensor,  # (m,) or (..., m)
    *,
    normalize: bool = True,
    mask: Tensor | None = None,  # (..., K) bool
) -> Tensor:  # (..., K)
    """Mix one expert for each objective: p ∝ Π_i p_i^(w_i) (multi-objective decoding with reverse KL).

    Exact experts of the rewards R_i at one KL weight give the exact optimum of Σ_i w_i R_i. In terms of losses this is
    the geometric mixture of the labels, not the arithmetic one that a model trained on Σ_i w_i L_i reaches.

    Args:
        scores: Log-probabilities, logits or scores of the m experts, each (..., K).
        weights: w on the simplex, (m,) or (..., m).
        normalize: Return log-probabilities over the last dimension.
        mask: True where an item exists.

    Returns:
        (..., K), as `log_mix`.

    Raises:
        ValueError: If the weights are off the simplex or not one for each expert, or as `log_mix`.
    """
    w = check_weights(weights, len(scores))
    return log_mix(scores, w.unbind(-1), normalize=normalize, mask=mask)


def modpo_reward(
    scores: Tensor,  # (B, K)
    reference: Tensor,  # (B, K)
    experts: Sequence[Tensor | None],  # m tensors (B, K); the anchor's is not used
    weights: Sequence[float] | Tensor,  # (m,) or (B, m)
    anchor: int = 0,
) -> Tensor:  # (B, K)
    """What MO-DPO trains in the place of s - s0 (MODPO, Zhou et al. 2024; listwise COS-DPO, equation 17).

        r = (1/w_i) [ s - s0 - Σ_{j≠i} w_j (s_{e_j} - s0) ]

    Pass it as the scores of a loss of the anchor objective i: `listwise_dpo(r, labels_i, beta=beta_i)`. The
    gradient grows like 1/w_i, so take an anchor with a large weight.

    Args:
        scores: Scores s of the model in training, (B, K).
        reference: Scores s0 of the base model, (B, K).
        experts: Scores of the m models fine-tuned on one objective each, (B, K); the anchor's may be None.
        weights: w on the simplex, (m,) or (B, m).
        anchor: Index i of the objective whose labels are used.

    Returns:
        r, (B, K), as `log_mix`.

    Raises:
        ValueError: If the anchor does not exist or has weight 0, an expert is missing, the weights are off the
            simplex, or as `log_mix`.
    """
    objectives = len(experts)
    w = check_weights(weights, objectives).double()
    if not 0 <= anchor < objectives:
        raise ValueError(f"anchor is {anchor} but {there_are(objectives, 'objective')}")
    of_anchor = w[..., anchor]
    check_positive(of_anchor, f"weights[..., {anchor}], the anchor's,", "choose an anchor whose weight is not 0")
    named, coefficients = [("scores", scores), ("reference", reference)], [1.0 / of_anchor]
    for j, expert in enumerate(experts):
        if j == anchor:
            continue
        if expert is None:
            raise ValueError(f"experts[{j}] is None but only the anchor's, experts[{anchor}], may be")
        named.append((f"experts[{j}]", expert))
        coefficients.append(-w[..., j] / of_anchor)
    for name, tensor in named:
        _check_like(tensor, scores, name)
    # Differences first: near the reference they are small, and 1/w would magnify the rounding of the scores.
    dtype = compute_dtype(*(tensor for _, tensor in named))
    impossible, base = reference == -torch.inf, reference.to(dtype)
    differences = [(t.to(dtype) - base).masked_fill(impossible, -torch.inf) for _, t in (named[0], *named[2:])]
    return log_mix(differences, coefficients)


def soup(state_dicts: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | Tensor) -> dict[str, Tensor]:
    """Average parameters: θ = Σ_i w_i θ_i (rewarded soups, Ramé et al. 2023).

    Args:
        state_dicts: The m state dicts, of equal keys and shapes.
        weights: w on the simplex, (m,).

    Returns:
        A new state dict with the devices and dtypes of the first. Sums are made in float64 and rounded once, and at a
        vertex of the simplex the result is that model exactly. Integer and boolean buffers must agree.

    Raises:
        ValueError: If keys, shapes, dtypes or integer buffers differ, naming the key, or the weights are off the
            simplex or not one for each state dict.
    """
    if not state_dicts:
        raise ValueError("state_dicts is empty; pass one state dict for each objective")
    w = check_weights(weights, len(state_dicts))
    if w.ndim != 1:
        raise ValueError(f"weights has shape {shape_of(w)} but a soup is one model; pass (m,) = ({len(state_dicts)},)")
    first = state_dicts[0]
    for i, other in enumerate(state_dicts[1:], start=1):
        if first.keys() != other.keys():
            keys = ", ".join(map(repr, sorted(first.keys() ^ other.keys())))
            raise ValueError(f"state_dicts[{i}] and state_dicts[0] do not both hold {keys}; the models must be alike")
        for key, tensor in first.items():
            if tensor.shape != other[key].shape or tensor.dtype != other[key].dtype:
                raise ValueError(
                    f"{key!r} is {other[key].dtype} {shape_of(other[key])} in state_dicts[{i}] but {tensor.dtype} "
                    f"{shape_of(tensor)} in state_dicts[0]; the models must be alike"
                )
    shares = w.tolist()
    return {key: _average(key, [state[key].detach() for state in state_dicts], shares) for key in first}


def _average(key: str, tensors: list[Tensor], shares: list[float]) -> Tensor:
    """Return Σ_i shares_i tensors_i in the dtype and on the device of the first tensor."""
    first = tensors[0]
    if not (first.is_floating_point() or first.is_complex()):
        if any(not torch.equal(tensor.to(first.device), first) for tensor in tensors[1:]):
            raise ValueError(f"{key!r} is {first.dtype} and differs between the models; integers cannot be averaged")
        return first.clone()
    wide = torch.complex128 if first.is_complex() else torch.float64
    total = torch.zeros(first.shape, dtype=wide, device=first.device)
    for share, tensor in zip(shares, tensors, strict=True):
        if share != 0.0:  # a model without a share may hold inf or NaN
            total += share * tensor.to(first.device, wide)
    return total.to(first.dtype)


def _check_like(tensor: Tensor, like: Tensor, name: str) -> None:
    """Raise unless a tensor is floating-point and has the shape of another one, with at least one dimension."""
    check_floating(tensor, name, "(..., K)")
    if tensor.ndim == 0 or tensor.shape != like.shape:
        raise ValueError(f"{name} has shape {shape_of(tensor)} but must be (..., K) = {shape_of(like)} like scores")


def _finite(scores: Tensor, absent: Tensor, centre: bool) -> Tensor:
    """Return scores with 0 where one is absent; `centre` subtracts each list's largest from the others first.

    Normalised results do not see that number, and the digits of close scores that are far from 0 survive the mixture.
    """
    scores = scores.masked_fill(absent, 0.0)
    if not centre or not scores.shape[-1]:
        return scores
    top = scores.detach().masked_fill(absent, -torch.inf).amax(-1, keepdim=True)
    return (scores - torch.where(top.isfinite(), top, 0.0)).masked_fill(absent, 0.0)


def _per_list(value: float | Tensor, like: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a number or a tensor with one value a list so that it broadcasts against `like` (..., K)."""
    tensor = torch.as_tensor(value, dtype=dtype, device=like.device)
    wider = not isinstance(value, Tensor) or value.dtype == torch.float64 != dtype
    if wider and not bool(tensor.isfinite().all()):
        given = torch.as_tensor(value, dtype=torch.float64).tolist()
        raise ValueError(
            f"{name} is {given}, beyond {str(dtype).removeprefix('torch.')}, in which these scores are mixed; take a "
            "finite one that it can hold, or float64 scores"
        )
    if tensor.ndim < like.ndim and tensor.ndim > 0:
        tensor = tensor[..., None]
    try:
        tensor.expand(*like.shape[:-1], 1)
    except RuntimeError:
        lists = tuple(like.shape[:-1])
        raise ValueError(
            f"{name} has shape {shape_of(torch.as_tensor(value))} but the scores are {shape_of(like)}; pass a number "
            f"or one value a list, {lists} or {(*lists, 1)}"
        ) from None
    return tensor


__getattr__ = renamed_names(__name__, temperature_conditioned="beta_conditioned")
