"""Hyper Prompt Tuning: a soft prompt that is a function of the trade-off (Ren et al., UAI 2025, section 4.2, figure 4).

    prefix(w) = P * (A(w) @ B(w))        P (k, d) trained,  A(w) (k, r) and B(w) (r, d) from two small networks

`HyperPrompt` is that function. `HyperPromptModel` (`hyper_prompt_model.py`) puts its output in front of a language
model's input. Shapes: `B` samples, `m` objectives, `k` virtual tokens, `d` the width of the model's token embeddings.

The paper leaves depth, width, activation and initialisation open; here each network has one hidden layer with GELU.
Training starts as ordinary prompt tuning: the mask A(w) @ B(w) is 1, bit for bit, for every w. The first column of A
and the first row of B are 1, the other columns of A are random functions of w and the other rows of B are 0. Nothing is
symmetric, so the r directions separate, and the output layers of both networks get a gradient from the first step on
(their hidden layers from the second, as the first factor of LoRA does).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mopl._arguments import check_beta_given, compute_dtype, shape_of
from mopl._renamed import renamed_attribute, renamed_keywords

PREFIX_STD = 0.02  # the usual standard deviation of token embeddings at initialisation (GPT-2 and its successors)


class HyperPrompt(nn.Module):
    """Maps weights of objectives, and on request normalised betas, to k virtual tokens.

    Args:
        objectives: m.
        virtual_tokens: k; the paper uses 8.
        rank: r, the largest rank of the mask, at most min(k, d); the paper uses 4.
        hidden: d, the width of the model's token embeddings.
        takes_beta: Whether the prompt also depends on β.
        width: Width of the hidden layers; max(32, 4 m) by default.

    Attributes:
        prefix: P, (k, d), drawn from N(0, 0.02²); `set_prefix` replaces it, for example by token embeddings.

    Raises:
        ValueError: If a size is below 1 or the rank is too large.
    """

    temperature = renamed_attribute("HyperPrompt.temperature", "takes_beta")

    @renamed_keywords(temperature="takes_beta")
    def __init__(
        self,
        objectives: int,
        virtual_tokens: int = 8,
        rank: int = 4,
        hidden: int = 768,
        *,
        takes_beta: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__()
        width = max(32, 4 * objectives) if width is None else width
        sizes = {"objectives": objectives, "virtual_tokens": virtual_tokens, "rank": rank, "hidden": hidden}
        for name, size in {**sizes, "width": width}.items():
            if size < 1:
                raise ValueError(f"{name} is {size} but must be at least 1")
        if rank > min(virtual_tokens, hidden):
            raise ValueError(
                f"rank is {rank} but the mask is {virtual_tokens} x {hidden}; "
                f"pass rank <= {min(virtual_tokens, hidden)}"
            )
        self.objectives, self.virtual_tokens, self.rank, self.hidden = objectives, virtual_tokens, rank, hidden
        self.takes_beta, self.width = takes_beta, width
        inputs = objectives * (2 if takes_beta else 1)
        self.prefix = nn.Parameter(torch.randn(virtual_tokens, hidden) * PREFIX_STD)
        self.left = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, virtual_tokens * rank))
        self.right = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, rank * hidden))
        self._start_as_prompt_tuning()

    @torch.no_grad()
    def _start_as_prompt_tuning(self) -> None:
        """Make A(w) @ B(w) = 1 for every w."""
        left, right = self.left[-1], self.right[-1]
        assert isinstance(left, nn.Linear) and isinstance(right, nn.Linear)
        left.weight.view(self.virtual_tokens, self.rank, -1)[:, 0] = 0.0
        bias = left.bias.view(self.virtual_tokens, self.rank)
        bias.normal_()  # as large as the first column, so that single virtual tokens can part soon
        bias[:, 0] = 1.0
        right.weight.zero_()
        right.bias.view(self.rank, self.hidden).zero_()[0] = 1.0

    @torch.no_grad()
    def set_prefix(self, values: Tensor) -> None:
        """Replace P, for example by embeddings of tokens.

        Args:
            values: (n, d) with n >= 1: cut to k rows, or repeated until there are k (as PEFT does with a text).

        Raises:
            ValueError: If the shape is wrong.
        """
        if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] != self.hidden:
            raise ValueError(f"values has shape {shape_of(values)} but must be (n, d) = (n, {self.hidden}), n >= 1")
        repeats = -(-self.virtual_tokens // values.shape[0])
        self.prefix.copy_(values.repeat(repeats, 1)[: self.virtual_tokens])

    @renamed_keywords(temperature="beta")
    def mask(
        self,
        weights: Tensor,  # (m,) or (B, m)
        beta: Tensor | None = None,  # (m,), (1, m) or (B, m)
    ) -> Tensor:  # (B, k, d)
        """Return A(w) @ B(w), of rank at most r; arguments as in `forward`."""
        condition = self._condition(weights, beta)
        # One precision for every caller: under autocast, or in a 16-bit model, a mask near 1 would lose its digits.
        with torch.autocast(condition.device.type, enabled=False):
            left = _network(self.left, condition).view(-1, self.virtual_tokens, self.rank)
            right = _network(self.right, condition).view(-1, self.rank, self.hidden)
            return left @ right

    @renamed_keywords(temperature="beta")
    def forward(
        self,
        weights: Tensor,  # (m,) or (B, m)
        beta: Tensor | None = None,  # (m,), (1, m) or (B, m)
    ) -> Tensor:  # (B, k, d)
        """Return the virtual tokens of each weight vector.

        Args:
            weights: w, (m,) or (B, m). The values are not checked here; `check_weights` does that.
            beta: β, positive, (m,), (1, m) or (B, m); only β / ‖β‖₁ is used (equation 15). Required if and only
                if the module was made with `takes_beta=True`.

        Returns:
            (B, k, d), with B = 1 for weights (m,), in float32 (float64 if the parameters are), differentiable in both.

        Raises:
            ValueError: If a shape is wrong, or `beta` is missing or not expected.
        """
        mask = self.mask(weights, beta)
        return self.prefix.to(mask.dtype) * mask

    def _condition(self, weights: Tensor, beta: Tensor | None) -> Tensor:
        """Return what the networks see, (B, m) or (B, 2 m)."""
        m = self.objectives
        if not isinstance(weights, Tensor) or weights.ndim not in (1, 2) or weights.shape[-1] != m:
            got = f"shape {shape_of(weights)}" if isinstance(weights, Tensor) else f"type {type(weights).__name__}"
            raise ValueError(
                f"weights has {got} but must be a tensor (m,) or (B, m) with m = {m}, one number for each objective"
            )
        unwanted = "to a prompt that is not conditioned on it; make it with takes_beta=True"
        check_beta_given(beta, self.takes_beta, unwanted)
        dtype = compute_dtype(self.prefix)
        weights = weights.to(self.prefix.device, dtype).reshape(-1, m)
        if beta is None:
            return weights
        batch = weights.shape[0]
        if not isinstance(beta, Tensor) or tuple(beta.shape) not in ((m,), (1, m), (batch, m)):
            got = shape_of(beta) if isinstance(beta, Tensor) else type(beta).__name__
            raise ValueError(f"beta is {got} but must be (m,) = ({m},) or (B, m) = ({batch}, {m})")
        beta = beta.to(weights)
        normalized = beta / beta.sum(-1, keepdim=True)
        return torch.cat([weights, normalized.expand(batch, m)], -1)

    def extra_repr(self) -> str:
        """Describe the module in its repr."""
        return (
            f"objectives={self.objectives}, virtual_tokens={self.virtual_tokens}, rank={self.rank}, "
            f"hidden={self.hidden}, takes_beta={self.takes_beta}, width={self.width}"
        )


def _network(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Run Linear, GELU, Linear in the precision of `x`, whatever the parameters are stored in."""
    first, last = layers[0], layers[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    x = F.gelu(F.linear(x, first.weight.to(x.dtype), first.bias.to(x.dtype)))
    return F.linear(x, last.weight.to(x.dtype), last.bias.to(x.dtype))
