"""What has another name now: options and their values, keywords, attributes, names of modules.

Old names are taken, with one warning; those in files of old runs without.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)

# By option: the old value and the one that means the same today.
VALUES: dict[str, dict[str, str]] = {
    "gain": {"exp": "exponential"},
    "scope": {"lora": "lora-mixture", "prompt": "hyper-prompt"},
}


def warn_renamed(old: str, new: str, *, stacklevel: int, flags: bool = False) -> None:
    """Warn that an option has another name, once for a place that uses the old one; `flags`: of the command line."""
    names = [f"--{name.replace('_', '-')}" if flags else name for name in (old, new)]
    warnings.warn(f"{names[0]} is called {names[1]} now; the old name will go", FutureWarning, stacklevel + 1)


def renamed(option: str, value: Any, *, stacklevel: int = 3) -> Any:
    """Return the value of an option under its name of today; an old one is warned of, once for a place that uses it."""
    today = VALUES.get(option, {}).get(value) if isinstance(value, str) else None
    if today is None:
        return value
    warnings.warn(f"{option}={value!r} is called {today!r} now; the old name will go", FutureWarning, stacklevel)
    return today


def old_value(name: str, value: Any) -> Any:
    """Return the value of an option of an old name as today's option takes it: a switch is an entry of a list now."""
    return value if not isinstance(value, bool) else (name,) if value else ()


def up_to_date(settings: Any, names: Mapping[str, str]) -> Any:
    """Return recorded settings with names and values of today, without a warning: nobody can change them.

    Where an old name and its name of today are both there, the old one is left out; what is no mapping stays as it is.
    """
    if not isinstance(settings, Mapping):
        return settings
    today = {
        names.get(name, name): old_value(name, value) if name in names else value
        for name, value in settings.items()
        if names.get(name, name) == name or names[name] not in settings
    }
    return {
        name: VALUES[name].get(value, value) if name in VALUES and isinstance(value, str) else value
        for name, value in today.items()
    }


_warned: set[str] = set()  # old names that this process was told of


def deprecated(old: str, remedy: str, *, stacklevel: int = 3) -> None:
    """Warn of an old name once in a process, at the line that uses it: by default two calls above."""
    if old not in _warned:
        _warned.add(old)
        warnings.warn(f"{old} is deprecated; {remedy}", DeprecationWarning, stacklevel)


def renamed_keywords(**new_names: str) -> Callable[[Function], Function]:
    """Return a decorator of functions that have keywords with other names now: `old="new"`.

    The function is called as `help` and `inspect.signature` show it, with the new names; an old one is taken as the new
    one. Under `torch.compile` there is no warning, which is no part of a graph.

    Raises:
        TypeError: A call passes an argument under both names.
    """
    return lambda function: _with_old_names(function, function.__qualname__, new_names)


def renamed_in_methods(*methods: str, **new_names: str) -> Callable[[Class], Class]:
    """Return a decorator of classes several methods of which, inherited or not, have such keywords.

    Messages name the class that is decorated, which is the one that users know; see `renamed_keywords`.
    """

    def decorate(made: Class) -> Class:
        for method in methods:
            setattr(made, method, _with_old_names(getattr(made, method), f"{made.__qualname__}.{method}", new_names))
        return made

    return decorate


def _with_old_names(function: Function, name: str, new_names: Mapping[str, str]) -> Function:
    name, pairs = name.removesuffix(".__init__"), tuple(new_names.items())

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for old, new in pairs:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{name}() got {new} and {old}, which is its old name; pass {new} only")
                if not _compiling():
                    deprecated(f"{old} of {name}()", f"pass {new}, its name now")
                kwargs[new] = kwargs.pop(old)
        return function(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]


def renamed_parameter(function: Callable[..., Any], old: str, new: str) -> str:
    """Return how a function that somebody else wrote calls a parameter: by its old name, with a warning, or its new."""
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C
        return new
    if old not in names or new in names:
        return new
    name = getattr(function, "__qualname__", type(function).__name__)
    deprecated(f"the parameter {old} of {name}()", f"call it {new}, its name now")
    return old


def _compiling() -> bool:
    import torch  # names of settings need no torch

    return torch.compiler.is_compiling()


def renamed_attribute(old: str, new: str) -> Any:
    """Return a property for a class: what `old`, say "HyperPrompt.temperature", is called `new` now."""

    def read(self: Any) -> Any:
        deprecated(old, f"read {new}, its name now")
        return getattr(self, new)

    return property(read, doc=f"Deprecated: the old name of `{new}`.")


def renamed_names(module: str, **new_names: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module some of whose names are others now: `old="new"`."""

    def read(name: str) -> Any:
        if name not in new_names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        deprecated(f"{module}.{name}", f"use {module}.{new_names[name]}")
        return getattr(importlib.import_module(module), new_names[name])

    return read
