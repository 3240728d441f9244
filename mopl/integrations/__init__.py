"""mopl inside other people's programs: trainers (`transformers`, `trl`, `grpo`, `scorers`, `sentence_transformers`) and
a server (`vllm`).

Each is imported only when it is asked for, with the library that it is for. `verl`, `openrlhf` and `nemo_rl` are
functions in the shapes that these call, and need no library but torch.
"""

from importlib import import_module
from typing import Any

_FUNCTIONS = {"patch_trl": "trl_heads", "unpatch_trl": "trl_heads"}
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    *_FUNCTIONS, "grpo", "nemo_rl", "openrlhf", "scorers", "sentence_transformers", "transformers", "trl", "trl_heads",
    "verl", "vllm",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a module, or the module of a function, when it is first asked for."""
    if name in _FUNCTIONS:
        return getattr(import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
