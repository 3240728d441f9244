"""A value baseline that knows the trade-off: V(x, w, α) from hidden states, for policy gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mopl._arguments import shape_of
from mopl._renamed import renamed_attribute, renamed_keywords


class ValueHead(nn.Module):
    """Predict the return of a response from a policy's hidden state, the weights w and the KL weight α.

    One hidden layer on the normalised hidden state and (w, α). It starts at 0 for every input. The hidden states are
    taken as constants, so that the regression does not move the policy, and the arithmetic is in
    the data type of its parameters.

    Args:
        hidden: width of the hidden states.
        objectives: m.
        takes_kl_weight: whether α is an input.
        width: of the hidden layer.
        train_hidden: let the regression's gradient flow into the hidden states.
    """

    alpha = renamed_attribute("ValueHead.alpha", "takes_kl_weight")

    @renamed_keywords(alpha="takes_kl_weight")
    def __init__(
        self,
        hidden: int,
        objectives: int,
        *,
        takes_kl_weight: bool = True,
        width: int = 128,
        train_hidden: bool = False,
    ) -> None:
        super().__init__()
        if min(hidden, objectives, width) < 1:
            raise ValueError(f"hidden, objectives and width are {hidden}, {objectives}, {width}; all must be positive")
        self.hidden, self.objectives = hidden, objectives
        self.takes_kl_weight, self.train_hidden = takes_kl_weight, train_hidden
        self.content = nn.Linear(hidden, width)
        self.condition = nn.Linear(objectives + takes_kl_weight, width, bias=False)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @renamed_keywords(alpha="kl_weight")
    def forward(
        self,
        hidden: Tensor,  # (..., H), first dimension B
        weights: Tensor,  # (m,) or (B, m)
        kl_weight: float | Tensor | None = None,  # number or (B,)
    ) -> Tensor:  # (...)
        """Return V for each hidden state.

        Args:
            hidden: (B, T, H), the state before each sampled token, or (B, H), the state at the prompt's end.
            weights: w, (m,) or (B, m).
            kl_weight: α, a number or (B,), if the head takes it.

        Returns:
            hidden's leading shape, in the data type of the head's parameters.

        Raises:
            ValueError: If shapes do not fit, or α is missing or not wanted.
        """
        if hidden.ndim < 2 or hidden.shape[-1] != self.hidden:
            raise ValueError(f"hidden has shape {shape_of(hidden)} but must be (B, ..., {self.hidden})")
        rows = hidden.shape[0]
        if tuple(weights.shape) not in ((self.objectives,), (rows, self.objectives)):
            raise ValueError(
                f"weights has shape {shape_of(weights)}; pass ({self.objectives},) or ({rows}, {self.objectives})"
            )
        if (kl_weight is None) == self.takes_kl_weight:
            raise ValueError(
                "kl_weight is missing; pass a number or (B,)" if self.takes_kl_weight else "kl_weight is no input here"
            )
        dtype = self.out.weight.dtype
        parts = [weights.to(hidden.device, dtype).expand(rows, -1)]
        if kl_weight is not None:
            strength = torch.as_tensor(kl_weight, dtype=dtype, device=hidden.device)
            if tuple(strength.shape) not in ((), (rows,)):
                raise ValueError(f"kl_weight has shape {shape_of(strength)}; pass a number or ({rows},)")
            parts.append(strength.reshape(-1, 1).expand(rows, 1))
        with torch.autocast(hidden.device.type, enabled=False):
            content = (hidden if self.train_hidden else hidden.detach()).to(dtype)
            condition = self.condition(torch.cat(parts, -1))
            condition = condition.view(rows, *[1] * (hidden.ndim - 2), -1)
            state = functional.gelu(self.content(functional.layer_norm(content, (self.hidden,))) + condition)
            return self.out(state)[..., 0]
