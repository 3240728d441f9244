"""Log-probabilities, logsumexp, entropy and divergences by the plain formulas, with the logits held whole: the oracle.

Conventions as in `mopl.ops`: what does not count is 0 with gradient 0, and is never read into arithmetic. Everything
is computed in the dtype of the operands given: pass float64 for an oracle, float32 for a yardstick.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gathered_logprob(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...) or (..., J)
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p(target), logsumexp and entropy of softmax(softcap tanh(logits / softcap) / temperature).

    Args:
        logits: (..., V).
        target: (...), or (..., J) for several targets of each row.
        temperature: Divides the logits; a number or one for each row.
        mask: Of the shape of `target`, false where it does not count.
        ignore_index: A target that does not count.
        softcap: None for none.

    Returns:
        log p of the shape of `target`, logsumexp (...) and entropy (...), in nats; 0 where nothing counts.
    """
    many = target.ndim == logits.ndim
    target = target if many else target[..., None]
    keep = target != ignore_index
    if mask is not None:
        keep = keep & (mask if many else mask[..., None])
    used = keep.any(-1)
    u = torch.where(used[..., None], logits, 0)
    u = u if softcap is None else softcap * torch.tanh(u / softcap)
    temperature = torch.as_tensor(temperature, dtype=u.dtype).expand(u.shape[:-1])
    u = u / torch.where(used, temperature, 1)[..., None]
    logsumexp = u.logsumexp(-1)
    logp = u - logsumexp[..., None]
    # A token of probability 0 has no entropy and passes no gradient, though its log-probability is -inf.
    safe = torch.where(logp == -torch.inf, 0, logp)
    entropy = -(logp.exp() * safe).sum(-1)
    logprob = torch.where(keep, logp.gather(-1, torch.where(keep, target, 0)), 0)
    return logprob if many else logprob[..., 0], torch.where(used, logsumexp, 0), torch.where(used, entropy, 0)


def linear_logprob(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (...); with `row` any shape
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p(target), logsumexp and entropy of the softmax of a linear head.

    Args:
        hidden: (..., H).
        weight: (V, H) of the head.
        target: (...); with `row` of any shape.
        bias: (V,) of the head.
        temperature: Divides the logits; a number or one for each row.
        softcap: As in `gathered_logprob`.
        logit_scale: What the logits are multiplied by, before the cap.
        mask: Of the shape of `target`.
        ignore_index: A target that does not count.
        row: Of the shape of `target`, which row of `hidden` (flattened) each target is of.

    Returns:
        log p of the shape of `target`, logsumexp and entropy of hidden's leading shape; nats, 0 where nothing counts.
    """
    lead = hidden.shape[:-1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    temperatures = torch.as_tensor(temperature, dtype=hidden.dtype).expand(lead).reshape(-1)
    keep = target != ignore_index
    keep = (keep if mask is None else keep & mask).reshape(-1)
    place = torch.arange(len(flat)) if row is None else row.reshape(-1)
    used = torch.zeros(len(flat), dtype=torch.bool)
    used[place[keep]] = True
    logits = torch.where(used[:, None], flat, 0) @ weight.T
    logits = (logits if bias is None else logits + bias) * logit_scale
    # Every target reads its row's logits; the row's own values are read with a target that is always there.
    first = torch.where(used, 0, ignore_index)
    _, logsumexp, entropy = gathered_logprob(
        logits, first, temperature=temperatures, ignore_index=ignore_index, softcap=softcap
    )
    merged = torch.where(keep, target.reshape(-1), ignore_index)
    logprob, _, _ = gathered_logprob(
        logits[place], merged, temperature=temperatures[place], ignore_index=ignore_index, softcap=softcap
    )
    return logprob.view(target.shape), logsumexp.view(lead), entropy.view(lead)


def head_statistics(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """Return log Σ p², the mean logit, and whether the target is the first of the likeliest tokens, as 1 or 0.

    Args:
        hidden: (N, H).
        weight: (V, H) of the head.
        target: (N,).
        bias: (V,) of the head.
        temperature: Divides the logits; a number or one for each row.
        softcap: As in `gathered_logprob`.
        logit_scale: What the logits are multiplied by, before the cap.
        ignore_index: A target that does not count.

    Returns:
        `log_sum_sq_probs`, `mean_logits` and `is_top1`, (N,) each; 0 where the target does not count.
    """
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) * logit_scale
    u = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    u = u / torch.as_tensor(temperature, dtype=u.dtype).expand(target.shape)[:, None]
    found = {
        "log_sum_sq_probs": (u.softmax(-1) ** 2).sum(-1).log(),
        "mean_logits": u.mean(-1),
        "is_top1": (u.argmax(-1) == target).to(u.dtype),
    }
    return {name: torch.where(target == ignore_index, 0, value) for name, value in found.items()}


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return the generalised JSD (...) of softmax(student) and softmax(teacher), logits (..., V).

    beta is the teacher's share of the mixture; 0 is KL(teacher ‖ student) and 1 is KL(student ‖ teacher).

    Args:
        student: (..., V) logits.
        teacher: (..., V) logits.
        beta: From 0 to 1.

    Returns:
        (...), nats.
    """
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        possible = log_a > -torch.inf  # what has no mass adds nothing, and passes no gradient
        a, b = torch.where(possible, log_a, 0), torch.where(possible, log_b, 0)
        return torch.where(possible, a.exp() * (a - b), 0).sum(-1)

    if beta == 0:
        return kl(log_q, log_p)
    if beta == 1:
        return kl(log_p, log_q)
    p, q = torch.where(log_p == -torch.inf, 0, log_p).exp(), log_q.exp()
    p = torch.where(log_p == -torch.inf, 0, p)
    mixture = beta * q + (1 - beta) * p
    log_m = torch.where(mixture == 0, 0, torch.where(mixture == 0, 1, mixture).log())
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def topk_jsd(logits: Tensor, ids: Tensor, logprobs: Tensor, beta: float, tail: bool) -> Tensor:
    """Return the JSD (N,) of logits (N, V) and a teacher of whom log-probabilities (N, k) at ids (N, k) are known.

    Events are the ids and, with `tail`, the rest as one. Negative ids do not count; a row without any gives 0.

    Args:
        logits: (N, V) of the student.
        ids: (N, k) int64, tokens whose log-probabilities are known.
        logprobs: (N, k), those of the teacher.
        beta: As in `jsd`.
        tail: Whether the other tokens are one more event.

    Returns:
        (N,), nats.
    """
    rows = []
    for own, which, known in zip(logits, ids, logprobs, strict=True):
        which, known = which[which >= 0], known[which >= 0]
        others = torch.ones(len(own), dtype=torch.bool)
        others[which] = False
        student, teacher = own[which], known
        if tail:
            rest = own[others].logsumexp(-1) if others.any() else own.new_tensor(-torch.inf)
            student = torch.cat([student, rest[None]])
            teacher = torch.cat([teacher, torch.log1p(-known.exp().sum().clamp(max=1))[None]])
        rows.append(jsd(student, teacher, beta) if len(which) else own.new_zeros(()))
    return torch.stack(rows)


def sequence_logprob(logprob: Tensor, segment: Tensor, sequences: int, *, average: bool = False) -> Tensor:
    """Return sums (or means) over tokens of equal segment; negative segments do not count, empty ones give 0.

    Args:
        logprob: (N,), of tokens.
        segment: (N,) integers, which sequence each token is of.
        sequences: S, how many there are.
        average: Means instead of sums.

    Returns:
        (S,), nats.
    """
    result = []
    for number in range(sequences):
        own = logprob[segment == number]
        result.append(own.sum() / max(1, own.numel() if average else 1))
    return torch.stack(result) if result else logprob.new_zeros(0)
