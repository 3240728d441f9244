"""A setting has one list of values: in its type, in the check of the dataclass, in the option of the command."""

import argparse
import re
import typing
from dataclasses import MISSING, fields

import pytest

from mopl.alignment.config import AlignConfig
from mopl.cli import build_parser
from mopl.clp.config import ClpConfig
from mopl.experiments.run_directory import environment, version_changes
from mopl.ranking.config import RankConfig
from mopl.training import TrainingConfig

NEEDED = {
    RankConfig: {},
    AlignConfig: {"model": "m", "data": "d"},
    ClpConfig: {"model": "m", "data": "d", "rewards": ("brevity",)},
    TrainingConfig: {},
}
COMMANDS = {RankConfig: "rank", AlignConfig: "align", ClpConfig: "clp"}


def literals(config) -> dict[str, tuple]:
    hints = typing.get_type_hints(config)
    return {f.name: typing.get_args(hints[f.name]) for f in fields(config)
            if typing.get_origin(hints[f.name]) is typing.Literal}  # fmt: skip


def actions(command: str) -> dict[str, argparse.Action]:
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {action.dest: action for action in commands.choices[command]._actions}


CASES = [(config, name) for config in NEEDED for name in literals(config)]


def test_there_are_settings_with_a_list_of_values():
    assert len(CASES) > 30 and (AlignConfig, "conditioning") in CASES


@pytest.mark.parametrize(("config", "name"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_the_values_of_a_type_are_those_that_are_taken(config, name):
    allowed = literals(config)[name]
    with pytest.raises(ValueError, match=name) as refused:
        config(**{**NEEDED[config], name: "something else"})
    assert all(repr(value) in str(refused.value) or str(value) in str(refused.value) for value in allowed)
    for value in allowed:
        try:
            config(**{**NEEDED[config], name: value})
        except ValueError as error:  # not with the other settings, but known
            assert "something else" not in str(error) and "must be one of" not in str(error)


@pytest.mark.parametrize(
    ("config", "name"), [case for case in CASES if case[0] in COMMANDS],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_the_values_of_an_option_are_those_of_its_setting(config, name):
    action = actions(COMMANDS[config])[name]
    allowed = set(literals(config)[name])
    if action.choices is not None:
        assert set(action.choices) == allowed
    else:
        assert {action.type(str(value)) for value in allowed} == allowed
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            action.type("something else")


@pytest.mark.parametrize("config", COMMANDS, ids=lambda config: config.__name__)
def test_every_setting_has_an_option(config):
    options = actions(COMMANDS[config])
    missing = {f.name for f in fields(config)} - set(options)
    assert not missing


@pytest.mark.parametrize("config", COMMANDS, ids=lambda config: config.__name__)
def test_help_and_documentation_say_what_a_setting_is_and_its_default(config):
    options = actions(COMMANDS[config])
    documented = re.sub(r"\s+", " ", config.__doc__)
    for field in fields(config):
        default, help = field.default, options[field.name].help.replace("%%", "%")
        stated = " ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in
                          (default if isinstance(default, tuple) else (default,)))  # fmt: skip
        if default in (None, ()):  # in words, but where the default is to do without
            assert "(default: " in help or field.name in ("log_with", "rewards"), field.name
        elif default is not MISSING and default is not False:
            assert f"(default: {stated})" in help, field.name
        assert len(help.split()) > 1 and f"{field.name}: {help}" in documented, field.name


@pytest.mark.parametrize(
    ("kind", "used"),
    [("align", {"transformers", "tokenizers", "peft", "trl"}), ("clp", {"transformers", "peft"}), (None, set())],
)
def test_a_run_records_the_versions_of_what_it_uses_and_hears_of_changes(kind, used):
    pytest.importorskip("trl")
    versions = environment(kind)["versions"]
    assert {"torch", "numpy", "mopl", *used} <= set(versions)
    assert ("transformers" in versions) == bool(used)
    assert version_changes({"kind": kind, "versions": versions}) == []
    for name in used:
        assert version_changes({"kind": kind, "versions": {**versions, name: "0"}}) == [f"{name} 0 -> {versions[name]}"]
    # A run made before these were recorded says nothing about them.
    assert version_changes({"kind": kind, "versions": {"torch": versions["torch"]}}) == []
