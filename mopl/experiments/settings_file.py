"""Settings in a YAML file: `--config FILE.yaml` reads them, `--print-config` writes them.

The types of words are those of YAML 1.2 (`no` is a text and `1e-4` a number; PyYAML alone takes them for a truth value
and a text), and a key that stands twice is an error.
"""

import functools
import os
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar

import msgspec

from mopl._records import in_words, read_text
from mopl._renamed import old_value, renamed, warn_renamed
from mopl.experiments.settings import UNSET, Setting, Settings, nearest, settings_of

MOST_BYTES = 1 << 20
_WORDS = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9][0-9]*)",
    "float": r"[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
    "null": r"~|null|Null|NULL|",
}


def read_settings(file: str | os.PathLike[str], kind: type[Settings]) -> dict[str, Any]:
    """Return the settings that a YAML file gives: a mapping from their names, with dashes or underscores, to values.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is no such file, or a setting is unknown, has another type or may not be so; the message names
            file and key.
    """
    known, old = settings_of(kind), kind.old_names()
    remedy = "name a file of settings, such as --print-config writes"
    values = {}
    for key, value in _mapping(read_text(file, most=MOST_BYTES, remedy=remedy), file).items():
        name = str(key).replace("-", "_")
        if name in old:
            warn_renamed(name, old[name], stacklevel=2)
            name, value = old[name], old_value(name, value)
        if name not in known:
            raise ValueError(f"{os.fspath(file)}: there is no setting {key}{nearest(name, known)}")
        if name in values:
            raise ValueError(f"{os.fspath(file)}: {name} is given twice; leave one out")
        try:
            values[name] = _value(known[name], value)
        except ValueError as error:
            raise ValueError(f"{os.fspath(file)}: {error}") from None
    return values


def method_in(file: str | os.PathLike[str]) -> Any:
    """Return the method that a YAML file names, None if it names none or cannot be read, which `read_settings` says."""
    with suppress(OSError, ValueError):
        return _mapping(read_text(file, most=MOST_BYTES), file).get("method")


def _value(known: Setting, value: Any) -> Any:
    """Return the value of a setting, once it has its type and may be it."""
    if value in UNSET and known.optional and known.entry is not str:
        return None
    if known.many and not isinstance(value, (list, tuple)):
        value = [value]
    value = renamed(known.name, value)
    flat = not any(isinstance(x, (list, dict)) for x in (value if isinstance(value, list) else [value]))
    if known.choices and flat:  # says more of a wrong choice than its type does
        known.check(tuple(value) if known.many else value)
    try:
        value = msgspec.convert(value, known.type)
    except msgspec.ValidationError as error:
        raise ValueError(in_words(error, value, known.name)) from None
    known.check(value)
    return value


def dump_settings(values: Mapping[str, Any], *, ascii: bool = False) -> str:
    """Return settings, as `to_dict` gives them, as the YAML text that `read_settings` reads back."""
    import yaml

    return yaml.dump(dict(values), Dumper=_types()[1], sort_keys=False, allow_unicode=not ascii, width=110)


def _mapping(text: str, file: str | os.PathLike[str]) -> Mapping[Any, Any]:
    import yaml

    try:
        found = yaml.load(text, _types()[0])  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # a number of 5000 digits is none of YAML's errors
        raise ValueError(f"{os.fspath(file)} is no YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{os.fspath(file)} is nested too deep for settings") from None
    if not isinstance(found or {}, Mapping):
        shown = f"{reprlib.repr(found):.60}"
        raise ValueError(f"{os.fspath(file)} holds no settings but {shown}; write one a line, such as steps: 100")
    return found or {}


@functools.cache
def _types() -> tuple[Any, Any]:
    """Return a loader with the types of YAML 1.2, and a dumper that quotes what YAML 1.1 or 1.2 takes for no text."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
        # A tag such as !!binary, !!set or !!timestamp makes what is no value of a setting.
        yaml_constructors: ClassVar[dict[Any, Any]] = {
            tag: make
            for tag, make in yaml.SafeLoader.yaml_constructors.items()
            if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found = super().construct_mapping(node, deep)
            if len(found) < len(node.value):
                keys = Counter(self.construct_object(key, deep=True) for key, _ in node.value)
                twice = next(key for key, times in keys.items() if times > 1)
                raise yaml.constructor.ConstructorError(None, None, f"{twice} stands twice", node.start_mark)
            return found

    class Dumper(yaml.SafeDumper):
        def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
            return super().represent_sequence(tag, sequence, flow_style=True)

    for name, pattern in _WORDS.items():
        for kind in (Loader, Dumper):
            kind.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(rf"^(?:{pattern})$"), None)
    return Loader, Dumper
