"""Multi-objective preference learning: one model for every trade-off between objectives.

The library in one line: a model conditioned on the weights of the objectives gives scores `(B, K)`, a loss from
`mopl.losses` turns them into one value for each list and objective `(B, m)`, and the weights turn that into a scalar.

>>> import torch, mopl.losses
>>> scores = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)               # (B, K): one list of three items
>>> labels = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])                # (B, m, K): two objectives
>>> weights = torch.tensor([[0.75, 0.25]])                                     # (B, m): this list's trade-off
>>> mopl.losses.listwise_dpo(scores, labels, weights=weights).backward()

Submodules are imported on first use: `import mopl` costs nothing, and `import mopl.losses` imports torch alone.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_SUBMODULES = (
    "alignment", "cli", "clp", "commands", "conditioning", "decoding", "experiments", "integrations", "kernels",
    "language_models", "losses", "ops", "pareto", "ranking", "reference", "reference_logprob", "reference_policy",
    "report", "rewards", "serving", "steering", "training",
)  # fmt: skip
_FUNCTIONS = {
    "gathered_logprob": "ops",
    "linear_logprob": "ops",
    "patch_trl": "integrations.trl_heads",
    "sequence_logprob": "ops",
    "unpatch_trl": "integrations.trl_heads",
}

__all__ = ["__version__", *_SUBMODULES, *_FUNCTIONS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a submodule, or the submodule of a function, when it is first asked for."""
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        return getattr(import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the submodules beside what is loaded."""
    return sorted({*globals(), *__all__})
