"""mopl inside other people's programs: trainers (`transformers`, `trl`, `scorers`, `sentence_transformers`), a server
(`vllm`).

Each is imported only when it is asked for, with the library that it is for.
"""

from importlib import import_module
from typing import Any

__all__ = ["scorers", "sentence_transformers", "transformers", "trl", "vllm"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a module when it is first asked for."""
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
