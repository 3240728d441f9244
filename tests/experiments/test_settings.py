"""Settings as a YAML file, under their names in earlier versions, and as options of the command that they belong to."""

import argparse
import inspect
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from damage import error_of

from mopl.alignment.config import AlignConfig
from mopl.cli import build_parser, main
from mopl.clp.config import ClpConfig
from mopl.experiments.settings import given, settings_of
from mopl.experiments.settings_file import dump_settings, read_settings
from mopl.losses import plackett_luce
from mopl.ranking.config import RankConfig
from mopl.ranking.metrics import ndcg

LANGUAGE = ["--model", "m", "--data", "d"]
COMMANDS = {
    RankConfig: ["rank", "--objectives", "no", "1e-4", "a: [b]"],
    AlignConfig: ["align", *LANGUAGE, "--prompt-text", "yes", "--beta", "0.1", "1e-9", "--packing"],
    ClpConfig: ["clp", *LANGUAGE, "--rewards", "brevity", "--kl-weight", "0.05", "0.2", "--scope", "on"],
}


@pytest.mark.parametrize("config", COMMANDS, ids=lambda config: config.__name__)
def test_what_print_config_prints_reads_back_to_the_same_settings(config, tmp_path, capsys):
    assert main([*COMMANDS[config], "--print-config", "--learning-rate", "1e-5"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(text)
    made = config(**read_settings(tmp_path / "c.yaml", config))
    assert made.learning_rate == 1e-5 and dump_settings(made.to_dict()) == text
    # Options count more than the file, and what neither gives has its default.
    assert main([COMMANDS[config][0], "--config", str(tmp_path / "c.yaml"), "--seed", "7", "--print-config"]) == 0
    assert capsys.readouterr().out == text.replace("seed: 0", "seed: 7", 1)


@pytest.mark.parametrize(
    ("given", "must"),
    [
        ({"steps": 1.5}, "steps is 1.5 but must be a whole number"),
        ({"steps": 5.0}, "steps is 5.0 but must be a whole number"),
        ({"steps": True}, "steps is True but must be a whole number"),
        ({"learning_rate": False}, "learning_rate is False but must be a number"),
        ({"packing": "no"}, "packing is 'no' but must be true or false"),
        ({"lora_rank": "8"}, "lora_rank is '8' but must be a whole number"),
        ({"beta": (0.1, "x")}, "beta is 0.1 'x' but must be a number"),
    ],
)
def test_a_value_of_another_type_is_refused_when_the_configuration_is_made(given, must):
    with pytest.raises(ValueError, match=re.escape(must)):
        AlignConfig("m", "d", **given)
    assert AlignConfig("m", "d", steps=np.int64(3), learning_rate=1, packing=True).steps == 3
    plain = AlignConfig("m", "d", steps=np.int64(3), learning_rate=np.float32(0.5), beta=np.array([0.5, 1.0]))
    assert json.dumps([plain.steps, plain.learning_rate, *plain.beta]) == "[3, 0.5, 0.5, 1.0]"


def test_words_of_a_file_have_the_types_of_yaml_1_2(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "mixed_precision: no\nlearning-rate: 1e-4\nbeta: 2\nsteps: ~\ndata: travel\npoints: none\ntop_k: all\n"
    )
    assert read_settings(tmp_path / "c.yaml", RankConfig) == {
        "mixed_precision": "no", "learning_rate": 1e-4, "beta": (2.0,), "steps": None, "data": "travel",
        "points": None, "top_k": None,
    }  # fmt: skip


# Ten lists, each of nine times the one before: written out, it would fill any memory.
LAUGHS = "[" + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(11)) + "]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "c.yaml: there is no setting stepz (did you mean steps?)"),
        ("run: there", "c.yaml: there is no setting run"),
        ("steps: many", 'c.yaml: steps is "many" but must be int'),
        ("packing: yes", 'c.yaml: packing is "yes" but must be bool'),
        ("beta: [0.1, 0]", "c.yaml: beta is 0.1 0 but must be positive and finite"),
        ("template: chatty", "c.yaml: template is 'chatty' but must be one of 'auto', 'chat', 'plain'"),
        ("steps: 1\nsteps: 2", "steps stands twice"),
        ("learning_rate: 1\nlearning-rate: 2", "c.yaml: learning_rate is given twice"),
        ("- 1", "c.yaml holds no settings but [1]"),
        ("a: [1", "c.yaml is no YAML"),
        ("beta: {low: 1}", "c.yaml: beta[0] is an object of 1 but must be float"),
        ("[" * 1000, "c.yaml is nested too deep for settings"),
        ("seed: " + "9" * 5000, "c.yaml is no YAML"),
        ("data: !!binary aGVsbG8=", "could not determine a constructor for the tag"),
        ("data: !!timestamp today", "could not determine a constructor for the tag"),
        (f"method: {LAUGHS}", "c.yaml: method is a list of 11 but must be str"),
        (f"log_with: {LAUGHS}", "c.yaml: --log-with[0] is a list of 9 but must be str"),
        (LAUGHS, "c.yaml holds no settings but [['x', 'x'"),
    ],
)
def test_a_fault_of_a_file_names_file_and_key(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text + "\n")
    said = error_of(["align", *LANGUAGE, "--config", "c.yaml"], capsys)
    assert message.replace("learning_rate", "--learning-rate") in said


OLD = [
    (RankConfig, {}, {"alpha": 0.3, "temperature": [2.0], "temperature_range": [0.5, 2.0], "tensorboard": True},
     {"concentration": 0.3, "beta": (2.0,), "beta_range": (0.5, 2.0), "log_with": ("tensorboard",)}),
    (AlignConfig, {"model": "m", "data": "d"}, {"alpha": 0.3, "tensorboard": False},
     {"concentration": 0.3, "log_with": ()}),
    (ClpConfig, {"model": "m", "data": "d", "rewards": ["brevity"]}, {"alpha": 0.3, "scope": "lora"},
     {"concentration": 0.3, "scope": "lora-mixture"}),
    (ClpConfig, {"model": "m", "data": "d", "rewards": ["brevity"]}, {"scope": "prompt"}, {"scope": "hyper-prompt"}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "needed", "old", "new"), OLD, ids=["rank", "align", "clp", "clp-prompt"])
def test_old_names_are_taken_with_a_warning_and_in_records_without(config, needed, old, new):
    wanted = config(**needed, **new)
    for name, value in old.items():
        with pytest.warns(FutureWarning, match=f"{name}.* is called ") as seen:
            config(**{**needed, name: value})
        assert [entry.filename for entry in seen] == [__file__]
    record = {name: value for name, value in wanted.to_dict().items() if name not in new}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.from_dict({**record, **old}) == wanted
        assert config.from_dict(wanted.to_dict()) == wanted
        # An old run that is resumed with a setting of today: that one counts, wherever the old name stands.
        assert config.from_dict({**wanted.to_dict(), **dict.fromkeys(known.old for known in settings_of(config).values()
                                                                     if known.old)}) == wanted  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_print_config_is_read_back_where_a_terminal_cannot_show_a_text(tmp_path, monkeypatch, encoding):
    text = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    objectives = ["größe=1", "right\u202eleft", "line\u2028break", "tab\tand\\x"]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", text)
        assert main(["rank", "--objectives", *objectives, "--print-config"]) == 0
    text.flush()
    (tmp_path / "c.yaml").write_bytes(text.buffer.getvalue())
    assert read_settings(tmp_path / "c.yaml", RankConfig)["objectives"] == tuple(objectives)


def test_print_config_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mopl.cli", "rank", "--print-config"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and "not all of the output could be written" in done.stderr


def test_settings_of_a_demo_are_not_there_to_print(capsys):
    assert "mopl align: --demo makes its settings with its model" in error_of(
        ["align", "--demo", "--print-config"], capsys
    )


def test_an_option_without_its_value_is_one_error(capsys):
    assert "argument --method: expected one argument" in error_of(["align", "--method"], capsys)
    assert "argument --run: expected one argument" in error_of(["align", "--run", "--resume"], capsys)


def test_a_suggestion_names_no_option_of_an_earlier_version(capsys):
    assert "--temprature" in (said := error_of(["rank", "--temprature", "3"], capsys)) and "--temperature" not in said


def test_no_list_is_an_error_that_names_the_setting():
    with pytest.raises(ValueError, match="log_with is None but must be a list"):
        RankConfig(log_with=None)
    assert RankConfig(beta=np.float32(2)).beta == (2.0,)


def test_both_names_of_a_setting_at_once_are_refused():
    with pytest.raises(TypeError, match="alpha is called concentration now; pass one of them"):
        RankConfig(alpha=0.3, concentration=0.3)


def test_a_setting_is_read_under_its_old_name_with_a_warning():
    with pytest.warns(FutureWarning, match="alpha is called concentration now"):
        assert RankConfig(concentration=0.3).alpha == 0.3
    with pytest.raises(AttributeError, match=r"RankConfig has no setting betta \(did you mean beta\?\)"):
        RankConfig().betta  # noqa: B018


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (["rank", "--alpha", "0.3"], "concentration", 0.3), (["rank", "--temperature", "1", "2"], "beta", [1.0, 2.0]),
        (["rank", "--temperature-range", "1", "2"], "beta_range", [1.0, 2.0]),
        (["align", "--tensorboard"], "log_with", ("tensorboard",)),
        (["clp", "--scope", "lora"], "scope", "lora-mixture"),
    ],
)  # fmt: skip
def test_old_options_are_taken_with_a_warning(given, name, value):
    with pytest.warns(FutureWarning, match="is called .* now; the old name will go"):
        assert getattr(build_parser().parse_args(given), name) == value


def flags(*command: str, capsys) -> set[str]:
    with pytest.raises(SystemExit):
        build_parser().parse_args([*command, "--help-all"])
    return {
        word.strip(",[]") for word in capsys.readouterr().out.split("examples:")[0].split() if word.startswith("--")
    }


def test_a_command_shows_the_options_of_its_methods_alone(capsys):
    own, on_rewards = flags("align", capsys=capsys), flags("clp", capsys=capsys)
    assert {"--beta", "--loss", "--packing", "--no-packing"} <= own and not {"--rewards", "--kl-weight"} & own
    assert {"--rewards", "--kl-weight"} <= on_rewards and not {"--beta", "--loss", "--alpha"} & on_rewards
    assert flags("align", "--method", "clp", capsys=capsys) == on_rewards


def test_align_does_what_clp_does_where_its_method_is_one_on_rewards(tmp_path):
    (tmp_path / "c.yaml").write_text("method: dera\n")
    (tmp_path / "config.json").write_text('{"kind": "clp"}')
    for more in (
        ["--method", "clp-all", "--rewards", "brevity"],
        ["--config", str(tmp_path / "c.yaml"), "--rewards", "brevity"],
        ["--run", str(tmp_path), "--resume", "--trust-rewards"],
    ):
        assert build_parser().parse_args(["align", *more]).command == "clp"
    assert build_parser().parse_args(["align", "--run", str(tmp_path / "none"), "--resume"]).command == "align"


def test_none_takes_a_choice_of_a_file_back():
    parser = build_parser()
    assert parser.parse_args(["rank", "--steps", "none", "--top-k", "all"]).steps is None
    assert parser.parse_args(["rank", "--normalize-features", "none"]).normalize_features == "none"
    assert parser.parse_args(["rank", "--scales"]).scales == []


def test_every_visible_option_belongs_to_a_group_of_the_help():
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name in ("rank", "align", "clp"):
        titles = [group.title for group in commands.choices[name]._action_groups if group._group_actions]
        assert titles == ["options", "run", "data", *(["model"] if name != "rank" else []), "method", "training",
                          "evaluation"]  # fmt: skip


def test_the_page_of_settings_is_that_of_the_code_and_its_examples_mean_what_the_commands_mean():
    docs = Path(__file__).parents[2] / "docs"
    page = runpy.run_path(str(docs / "make_settings.py"))["page"]()
    assert (docs / "settings.md").read_text(encoding="utf-8") == page, "python docs/make_settings.py writes it"
    assert page.count("```yaml") >= 8


def test_a_file_of_an_example_gives_the_settings_of_its_command(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    for command, text in re.findall(r"```sh\nmopl (.*)\n```\n```yaml\n([^`]*)```", page):
        (tmp_path / "c.yaml").write_text(text)
        parsed = build_parser().parse_args(shlex.split(command))
        (kind,) = (config for config, words in COMMANDS.items() if words[0] == parsed.command)
        assert read_settings(tmp_path / "c.yaml", kind) == given(parsed, kind)


@pytest.mark.parametrize(
    ("config", "function", "names"),
    [
        (RankConfig(), plackett_luce, ("ties", "last_group", "top_k")),
        (AlignConfig("m", "d"), plackett_luce, ("ties", "last_group", "top_k")),
        (RankConfig(), ndcg, ("gain", "empty")),
    ],
)  # fmt: skip
def test_an_option_of_a_command_has_the_name_and_the_default_of_its_function(config, function, names):
    of_function = inspect.signature(function).parameters
    assert {name: getattr(config, name) for name in names} == {name: of_function[name].default for name in names}
