"""mopl inside other people's trainers: `mopl.integrations.transformers` and `mopl.integrations.trl`.

Each is imported only when it is asked for, with the library that it is for.
"""

from importlib import import_module
from typing import Any

__all__ = ["transformers", "trl"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a trainer's module when it is first asked for."""
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
