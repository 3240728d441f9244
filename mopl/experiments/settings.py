"""A setting is one field of a dataclass: its default, help, choices, limits and earlier name stand in one place.

    @settings
    class RankConfig(Settings):
        '''Settings of a ranking run.'''

        steps: int | None = setting(None, "updates of each model", unset="three epochs", at_least=0, group="training")

From such fields come the constructor and its checks, the documentation of the class, the options of a command
(`add_options`), what a YAML file may say (`read_yaml`) and `config.json` (`to_dict`, `from_dict`). A class that
inherits a setting may give it another default, help or limit: what it leaves out stays as it was.

No module of settings imports torch, so that the command line can list its options at once; and none postpones the
evaluation of annotations: they are read as types here.
"""

import argparse
import dataclasses
import functools
import inspect
import math
import numbers
import operator
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from mopl._bounds import check_bounds
from mopl._counted import counted
from mopl._renamed import VALUES, old_value, renamed, warn_renamed

if TYPE_CHECKING:
    from typing_extensions import Self, dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Any:
        """Tell type checkers, and nobody else, that a decorator makes dataclasses."""
        return lambda decorator: decorator


T = TypeVar("T")
MISSING = dataclasses.MISSING
GROUPS = ("run", "data", "model", "method", "training", "evaluation")
UNSET = ("none", "all")  # words for None where a setting may be it and is no text
_KINDS = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number"), bool: (bool, "true or false")}
_LIMITS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def setting(default: Any = MISSING, help: str | None = None, *, kw_only: bool = True, **told: Any) -> Any:
    """Return a field for a dataclass of settings.

    Args:
        default: Its default; none makes it required.
        help: What it is, in a sentence or two for the help of the command, the class and the page of settings.
        kw_only: Whether the constructor takes it by name alone.
        told: What else there is to say of it, see `Setting`.
    """
    said = {name: value for name, value in {"help": help, **told}.items() if value is not None}
    return dataclasses.field(default=default, kw_only=kw_only, metadata=said)


# The same for a setting that stands in another group of the help than that of the run.
in_data, in_model, in_method, in_training, in_evaluation = (
    functools.partial(setting, group=group) for group in GROUPS[1:]
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a class: its name, type and default beside what `setting` was told."""

    name: str
    type: Any  # its annotation
    default: Any  # its default, `MISSING` where it is required
    help: str = ""  # what it is
    unset: str = ""  # what None or an empty list means, for these
    choices: tuple[Any, ...] = ()  # what it may be, if its type is no `Literal`; of a list: its entries
    at_least: float | None = None  # smallest value
    of_new: float | None = None  # smallest value of a new run, where a record may hold less; errors name it
    above: float | None = None  # largest value that is too small
    at_most: float | None = None  # largest value
    below: float | None = None  # smallest value that is too large
    positive: bool = False  # whether it, or each entry, must be positive and finite
    nonempty: bool = False  # whether a list needs an entry
    missing: str = ""  # what to do if an empty text or list was given, for the error; such a value is refused then
    group: str = "run"  # where it stands in the help, one of `GROUPS`
    metavar: str | tuple[str, ...] | None = None  # what stands for the value in the help
    old: str | None = None  # its name in earlier versions, which is taken with a warning
    convert: Callable[[str], str] | None = None  # applied to a text, or to each entry, when a configuration is made

    @property
    def flag(self) -> str:
        """The option of the command."""
        return f"--{self.name.replace('_', '-')}"

    @functools.cached_property
    def optional(self) -> bool:
        """Whether it may be None."""
        return type(None) in get_args(self.type)

    @functools.cached_property
    def entry(self) -> Any:
        """The type of the value, or of an entry of a list, without None."""
        inner = next(t for t in get_args(self.type) if t is not type(None)) if _is_union(self.type) else self.type
        inner = get_args(inner)[0] if get_origin(inner) is tuple else inner
        if get_origin(inner) is Literal:
            return str if all(isinstance(choice, str) for choice in get_args(inner)) else object
        return inner

    @property
    def many(self) -> bool:
        """Whether it is a list."""
        return get_origin(self.type) is tuple

    @property
    def length(self) -> int | None:
        """How many entries a list has, None for any number."""
        return len(get_args(self.type)) if self.many and get_args(self.type)[-1] is not ... else None

    @property
    def stated_default(self) -> str:
        """The default in words, empty if there is none."""
        if self.default is MISSING or self.default is False:
            return ""
        if self.default is None or self.default == ():
            return self.unset
        return " ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in _entries(self.default))

    def text(self) -> str:
        """Return what help and documentation say of it, with choices that its type does not show and the default."""
        listed = f"{', '.join(map(str, self.choices))}" if self.choices and self.metavar else ""
        default = f"(default: {self.stated_default})" if self.stated_default else ""
        return f"{': '.join(filter(None, (self.help, listed)))} {default}".strip()

    def normal(self, value: Any) -> Any:
        """Return a value as a configuration keeps it: lists as tuples, plain numbers, paths absolute."""
        if self.many:
            if value is None:
                raise ValueError(f"{self.name} is None but must be a list; leave it out for its default")
            value = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
        value = tuple(map(_plain, value)) if self.many else _plain(value)
        if self.convert is None or not value:  # the path of an empty text would be the current folder
            return value
        return tuple(map(self.convert, value)) if self.many else self.convert(str(value))

    def check(self, value: Any) -> None:
        """Raise unless a value may be it.

        Raises:
            ValueError: With name, value and what it must be.
        """
        entries = _entries(value)
        if value is None and self.optional:
            return
        if self.missing and not value:
            raise ValueError(f"{self.name} {'are' if self.many else 'is'} missing; {self.missing}")
        if self.many and len(entries) != (self.length or len(entries)):
            raise ValueError(f"{self.name} has {counted(len(entries), 'entry')} but must have {self.length}")
        if self.nonempty and not entries:
            raise ValueError(f"{self.name} needs an entry")
        shown = " ".join(f"{x:g}" if isinstance(x, (int, float)) else repr(x) for x in entries)
        kind, words = _KINDS.get(self.entry, (object, ""))
        truth = self.entry in (int, float) and any(isinstance(x, bool) for x in entries)  # Python counts with it
        if not self.choices and (truth or not all(isinstance(x, kind) for x in entries)):
            raise ValueError(f"{self.name} is {shown if self.many else repr(value)} but must be {words}")
        for x in entries if self.choices else ():
            if x not in self.choices:
                raise ValueError(f"{self.name} is {x!r} but must be one of {', '.join(map(repr, self.choices))}")
        if self.positive and not all(math.isfinite(x) and x > 0 for x in entries):
            raise ValueError(f"{self.name} is {shown} but must be positive and finite")
        limits = {rule: limit for rule in _LIMITS if (limit := getattr(self, rule)) is not None}
        if not all(_LIMITS[rule](x, limit) for rule, limit in limits.items() for x in entries):
            limits |= {"at_least": self.of_new} if self.of_new is not None else {}
            must = " and ".join(f"{rule.replace('_', ' ')} {limit:g}" for rule, limit in limits.items())
            raise ValueError(f"{self.name} is {value if not self.many else shown} but must be {must}")


def _plain(value: Any) -> Any:
    """Return a number of NumPy, which JSON does not know, as Python's."""
    if isinstance(value, (bool, int, float)) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _entries(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@functools.cache
def settings_of(kind: type) -> dict[str, Setting]:
    """Return the settings of a class by name, what it does not say of one taken from the classes that it inherits."""
    told: dict[str, dict[str, Any]] = {}
    for base in reversed(kind.__mro__):
        own = inspect.get_annotations(base)
        for field in dataclasses.fields(base) if "__dataclass_fields__" in base.__dict__ else ():
            if field.name in own:
                told.setdefault(field.name, {}).update(field.metadata, type=field.type, default=field.default)
    for known in told.values():
        literal = next((t for t in (known["type"], *get_args(known["type"])) if get_origin(t) is Literal), None)
        known["choices"] = get_args(literal) if literal else known.get("choices", ())
    return {name: Setting(name, **known) for name, known in told.items()}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting,))
def settings(kind: type[T]) -> type[T]:
    """Make a frozen dataclass of a class of settings, with its documentation and with names of earlier versions."""
    made = dataclasses.dataclass(frozen=True)(kind)
    plain = made.__init__

    @functools.wraps(plain)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        plain(self, *args, **_under_new_names(type(self), given))

    made.__init__ = __init__
    lines = [f"{name}: {known.text()}" for name, known in settings_of(made).items()]
    wrap = textwrap.TextWrapper(116, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
    made.__doc__ = "\n".join([made.__doc__ or "", "", "Args:", *map(wrap.fill, lines)])
    return made


def _under_new_names(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a constructor under their names and with their values of today, and warn of old ones."""
    old = kind.old_names()
    for name in [name for name in given if name in old]:
        if old[name] in given:
            raise TypeError(f"{name} is called {old[name]} now; pass one of them")
        warn_renamed(name, old[name], stacklevel=3)
        given[old[name]] = old_value(name, given.pop(name))
    for name in given.keys() & VALUES.keys():
        given[name] = renamed(name, given[name], stacklevel=4)
    return given


class Settings:
    """What every class of settings can do."""

    # What a record that lacks a setting means by it, where that is not the default.
    WHERE_MISSING: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        known = settings_of(type(self)).values()
        check_bounds(self)
        for each in known:
            object.__setattr__(self, each.name, each.normal(getattr(self, each.name)))
        for each in known:
            each.check(getattr(self, each.name))
        self.check_together()

    def check_together(self) -> None:
        """Raise if two settings do not go together."""

    def __getattr__(self, name: str) -> Any:
        """Return a setting that is asked for under its name in earlier versions."""
        if name not in (old := self.old_names()):
            raise AttributeError(f"{type(self).__name__} has no setting {name}{nearest(name, vars(self))}")
        warn_renamed(name, old[name], stacklevel=2)
        return getattr(self, old[name])

    @classmethod
    def old_names(cls) -> dict[str, str]:
        """Return by names of earlier versions, which records may have, those of today."""
        return {known.old: name for name, known in settings_of(cls).items() if known.old}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Self":
        """Read back what `to_dict` gave, of this version or an earlier one.

        Raises:
            ValueError: If a setting is unknown, has another type or is refused.
        """
        from mopl._records import settings_from

        return settings_from(cls, values)


# ---------------------------------------------------------------- options of a command


def add_options(
    parser: argparse.ArgumentParser, kind: type, groups: Mapping[str, argparse._ArgumentGroup] | None = None
) -> dict[str, argparse._ArgumentGroup]:
    """Add an option for each setting to a command whose parser has `argument_default=argparse.SUPPRESS`.

    `given` finds those that were used. `groups` are those that the parser has, by title; all of them are returned so.
    """
    # `--data` leads the group of data, `--method` that of methods; what few commands have stands before what all have.
    homes = [inspect.get_annotations(base) for base in kind.__mro__]
    known = sorted(
        settings_of(kind).values(),
        key=lambda each: (
            GROUPS.index(each.group),
            each.name != each.group,
            max(i for i, own in enumerate(homes) if each.name in own),
        ),
    )
    found = dict(groups or {})
    for each in known:
        if each.group not in found:
            found[each.group] = parser.add_argument_group(each.group)
        _add_option(found[each.group], each)
    return found


def _add_option(group: argparse._ArgumentGroup, known: Setting) -> None:
    options: dict[str, Any] = {"dest": known.name, "help": known.text().replace("%", "%%")}
    if known.entry is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options |= {"type": _reader(known), "metavar": known.metavar}
        if known.many:
            options["nargs"] = known.length or ("+" if known.nonempty or known.default == () else "*")
        if known.choices and known.entry is str:
            options["choices"] = known.choices
        elif known.choices:
            options["metavar"] = f"{{{','.join(map(str, known.choices))}}}"
    if known.old is not None:
        old = {**options, "help": argparse.SUPPRESS, "action": OldOption}
        if known.old in known.choices:  # a switch that has become an entry of a list
            old = {"dest": known.name, "help": argparse.SUPPRESS, "action": OldOption, "nargs": 0}
        group.add_argument(f"--{known.old.replace('_', '-')}", **old)
    group.add_argument(known.flag, **options)


class OldOption(argparse.Action):
    """An option under its name in earlier versions: taken, warned of, not shown."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store what was given under the name of today."""
        name = (option_string or "").lstrip("-").replace("-", "_")
        warn_renamed(name, self.dest, stacklevel=6, flags=True)
        setattr(namespace, self.dest, old_value(name, True) if self.nargs == 0 else values)


def _reader(known: Setting) -> Callable[[str], Any]:
    """Return what makes a value of a word of the command line; argparse says its name in errors."""

    def read(text: str) -> Any:
        if known.optional and known.entry is not str and text in UNSET:
            return None
        if known.choices and known.entry is not str:
            chosen = {str(choice): choice for choice in known.choices}
            if text not in chosen:
                *others, last = chosen
                raise argparse.ArgumentTypeError(f"{text!r} is not {', '.join(others)} or {last}")
            return chosen[text]
        return renamed(known.name, known.entry(text))

    read.__name__ = known.entry.__name__
    return read


def given(arguments: argparse.Namespace | Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return the settings that were given on the command line, by name."""
    values = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    known = settings_of(kind)
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in known}


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return " (did you mean X?)" with the name that is most alike, at least by `cutoff` of 1, or nothing."""
    return "".join(f" (did you mean {near}?)" for near in get_close_matches(name, list(known), 1, cutoff))
