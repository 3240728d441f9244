"""A run goes on when it is given again what it was begun with, in whatever way a path is written."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

from mopl.alignment.config import AlignConfig
from mopl.alignment.recipe import check_resume as resume_align
from mopl.cli import main
from mopl.clp.config import ClpConfig
from mopl.clp.recipe import check_resume as resume_clp
from mopl.ranking.config import RankConfig
from mopl.ranking.recipe import check_resume as resume_rank

RUN = Path("runs/x")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Files and folders with the names of the cases, a link to them, and a folder with other files of that name."""
    home = tmp_path / "home"
    for folder in (home, tmp_path / "other"):
        for name in ("model", "base", "folder"):
            (folder / name).mkdir(parents=True)
        for name in ("data.txt", "train.dwell.txt"):
            (folder / name).write_text("")
    (tmp_path / "link").symlink_to(home)
    (home / "linked.txt").symlink_to("data.txt")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return tmp_path


def begun(config, given):
    kind = {RankConfig: {}, AlignConfig: {"kind": "align"}, ClpConfig: {"kind": "clp"}}[config]
    needed = {RankConfig: {}, AlignConfig: {"model": "model", "data": "data.txt"},
              ClpConfig: {"model": "model", "data": "data.txt", "rewards": ("brevity",)}}[config]  # fmt: skip
    data = {
        RankConfig: {"fingerprint": "f", "empty_share": {}, "objectives": [{"name": "main"}, {"name": "a"}]},
        AlignConfig: {"fingerprint": "f", "tokens": "t", "objectives": ["a", "b"]},
        ClpConfig: {"fingerprint": "f", "objectives": ["a", "b"]},
    }  # fmt: skip
    return {**kind, "config": config(**{**needed, **given}).to_dict(), "data": data[config]}


RESUME = {RankConfig: resume_rank, AlignConfig: resume_align, ClpConfig: resume_clp}
PATHS = [
    (RankConfig, "data", "data.txt"), (RankConfig, "data", "folder"), (RankConfig, "base", "base"),
    (AlignConfig, "data", "data.txt"), (AlignConfig, "model", "model"), (AlignConfig, "reference", "base"),
    (ClpConfig, "data", "data.txt"), (ClpConfig, "model", "model"),
]  # fmt: skip
INSIDE = [
    (RankConfig, "objectives", "dwell=@data.txt:min"), (RankConfig, "objectives", "dwell=@{split}.dwell.txt"),
    (ClpConfig, "rewards", "classifier:directory=model,label=1"),
]  # fmt: skip
OTHER_FORMS = ["./{}", "{}/", "folder/../{}", "~/{}", "{root}/home/{}", "{root}/link/{}", "{root}/link/../home/{}"]


@pytest.mark.parametrize(("config", "name", "value"), PATHS)
@pytest.mark.parametrize("form", ["{}", *OTHER_FORMS])
def test_a_path_is_the_same_however_it_is_written(place, config, name, value, form):
    record = begun(config, {name: value})
    again = form.format(value, root=place)
    assert getattr(RESUME[config](record, {name: again}, RUN), name) == record["config"][name] == str(
        place / "home" / value
    )  # fmt: skip
    # And the other way round: begun with the longer form, which stands as it was.
    other = RESUME[config](begun(config, {name: again}), {name: value}, RUN)
    assert os.path.samefile(getattr(other, name), place / "home" / value)


@pytest.mark.parametrize(("config", "name", "value"), INSIDE)
@pytest.mark.parametrize("form", ["", "./", "~/", "{root}/link/"])
def test_a_path_inside_a_text_is_the_same_however_it_is_written(place, config, name, value, form):
    record = begun(config, {name: (value,)})
    key = "=@" if "=@" in value else "directory="
    before, _, path = value.partition(key)
    again = f"{before}{key}{form.format(root=place)}{path}"
    (found,) = getattr(RESUME[config](record, {name: (again,)}, RUN), name)
    assert found == f"{before}{key}{place}/home/{path}"


@pytest.mark.parametrize(("config", "name", "value"), PATHS)
def test_a_relative_path_is_read_from_the_folder_where_it_is_given(place, config, name, value, monkeypatch):
    record = begun(config, {name: value})
    monkeypatch.chdir(place / "other")
    with pytest.raises(ValueError, match=f"{name} was .*home/{value}.*, is .*other/{value}.*leave them out to resume"):
        RESUME[config](record, {name: value}, RUN)
    assert getattr(RESUME[config](record, {name: f"../home/{value}"}, RUN), name) == record["config"][name]
    assert getattr(RESUME[config](record, {}, RUN), name) == record["config"][name]


@pytest.mark.parametrize("config", RESUME)
def test_other_settings_are_refused_and_free_ones_taken(place, config):
    record = begun(config, {})
    found = RESUME[config](record, {"log_every": 3, "seed": 0}, RUN)
    assert found.log_every == 3
    with pytest.raises(ValueError, match=r"runs/x was started with other settings \(seed was 0, is 1\)"):
        RESUME[config](record, {"seed": 1, "log_every": 3}, RUN)


def test_names_that_are_no_paths_stay_names(place):
    assert RankConfig(data="travel").data == "travel" and RankConfig(data="synthetic:seed=1").data == "synthetic:seed=1"
    assert AlignConfig("org/name", "~nobody/at all").data == "~nobody/at all"
    record = begun(ClpConfig, {"rewards": ("mine:fn", "length:target=20")})
    assert resume_clp(record, {"rewards": ("mine:fn", "length:target=20")}, RUN).rewards == (
        "mine:fn", "length:target=20",
    )  # fmt: skip
    with pytest.raises(ValueError, match="rewards was"):
        resume_clp(record, {"rewards": ("mine:other", "length:target=20")}, RUN)


def test_what_was_left_to_the_run_may_be_left_to_it_again(place):
    record = begun(AlignConfig, {})
    record["config"] = AlignConfig.from_dict(record["config"]).resolved(10).to_dict()
    assert record["config"]["reference"] == "precomputed"
    assert resume_align(record, {"reference": "auto"}, RUN).reference == "precomputed"
    with pytest.raises(ValueError, match="reference was 'precomputed', is 'self'"):
        resume_align(record, {"reference": "self"}, RUN)


@pytest.mark.parametrize("config", [RankConfig, AlignConfig], ids=lambda config: config.__name__)
def test_a_file_of_all_settings_resumes_the_run_that_it_began(place, config):
    record = begun(config, {})
    begun_with = config.from_dict(record["config"])
    resolved = begun_with.resolved(10)
    record["config"] = resolved.to_dict()
    assert resolved != begun_with and RESUME[config](record, begun_with.to_dict(), RUN) == resolved
    with pytest.raises(ValueError, match="steps was"):
        RESUME[config](record, {**begun_with.to_dict(), "steps": 7}, RUN)


def test_print_config_of_a_run_that_goes_on_prints_its_settings(place, capsys):
    record = begun(RankConfig, {"steps": 7, "concentration": 0.3})
    (place / "run").mkdir()
    (place / "run" / "config.json").write_text(json.dumps(record))
    assert main(["rank", "--run", str(place / "run"), "--resume", "--log-every", "3", "--print-config"]) == 0
    assert {"steps: 7", "concentration: 0.3", "log_every: 3"} <= set(capsys.readouterr().out.splitlines())
