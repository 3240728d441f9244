"""Log-probabilities from logits in differentiable functions of PyTorch, for derivatives that the op does not give."""

from __future__ import annotations

import torch
from torch import Tensor

from mopl.ops import _derivatives as derivatives


def formula(logits: Tensor, target: Tensor, temperature: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprob, logsumexp and entropy; shapes as in the op `mopl::gathered_logprob`."""
    keep, vocabulary = target >= 0, logits.shape[1]
    used = keep.any(-1)
    u, beyond = derivatives.finite(torch.where(used[:, None], logits, 0).to(temperature.dtype))
    if softcap:  # which makes a logit of infinity one of the cap
        u = softcap * torch.tanh((u + beyond) / softcap)
    u = u / torch.where(used, temperature, 1)[:, None]
    u = u if softcap else u + beyond
    logp = derivatives.log_softmax(u)
    column = target.clamp(min=0, max=vocabulary - 1)
    logprob = logp.gather(1, column)
    if not softcap:  # which makes -inf possible
        logprob = torch.where(logits.gather(1, column) == -torch.inf, logprob.detach() - torch.inf, logprob)
    logprob = torch.where(target >= vocabulary, torch.nan, logprob)
    # From the likeliest token: the logarithm of what the others add to it is exact.
    likeliest = u.detach().argmax(-1, keepdim=True)
    logsumexp = (u.gather(1, likeliest) - logp.gather(1, likeliest))[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return torch.where(keep, logprob, 0), torch.where(used, logsumexp, 0), torch.where(used, entropy, 0)
