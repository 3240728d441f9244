"""Every script in examples/ runs offline as it stands and shows what it says: a trade-off chosen after training."""

import importlib.util
import re
from pathlib import Path

import pytest
from launching import python

FOLDER = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {
    "losses_pytorch": (),
    "losses_lightning": ("lightning",),
    "transformers_trainer": ("transformers", "accelerate", "peft", "tokenizers"),
    "reward_model": ("transformers", "accelerate", "tokenizers"),
    "cross_encoder": ("sentence_transformers", "transformers", "accelerate", "datasets", "tokenizers"),
    "trl_patched": ("trl", "transformers", "accelerate", "datasets", "tokenizers"),
    "trl_trainer": ("trl", "transformers", "accelerate", "peft", "datasets", "tokenizers"),
    "ranking_own_file": ("matplotlib", "moocore"),
    "choose_trade_off": ("matplotlib", "moocore"),
    "trl_grpo": ("trl", "transformers", "accelerate", "peft", "datasets", "tokenizers"),
}


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"examples/{name}.py needs the package {package}; pip install {package}")
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    monkeypatch.chdir(folder)
    done = python(str(FOLDER / f"{name}.py"), PYTHONPATH=str(FOLDER.parent), TMPDIR=str(folder), **offline)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_tested_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} - {"tiny"} == set(NEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["losses_pytorch", "losses_lightning"])
def test_an_example_of_losses_prints_a_front(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = re.findall(r"weights (\S+): losses of the objectives (\S+), (\S+)", run(name, tmp_path, monkeypatch))
    assert [row[0] for row in rows] == ["1.0,0.0", "0.5,0.5", "0.0,1.0"]
    first, second = ([float(row[column]) for row in rows] for column in (1, 2))
    assert first[0] < first[1] < first[2] and second[0] > second[1] > second[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers_trainer", "trl_trainer"])
def test_an_example_of_a_trainer_prints_what_each_weight_prefers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = re.findall(r"weights (\S+): (\d+)% as polite wants, (\d+)% as brief wants", run(name, tmp_path, monkeypatch))
    assert [row[0] for row in rows] == ["1.00,0.00", "0.50,0.50", "0.00,1.00"]
    polite, brief = ([int(row[column]) for row in rows] for column in (1, 2))
    assert polite[0] >= 80 and brief[2] >= 80 and polite[2] <= 20 and brief[0] <= 20


@pytest.mark.slow
def test_the_example_of_rollouts_prints_what_each_weight_prefers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl = pytest.importorskip("trl", reason="examples/trl_grpo.py needs the package trl; pip install trl")
    if tuple(map(int, trl.__version__.split(".")[:2])) < (1, 15):
        pytest.skip(f"examples/trl_grpo.py needs trl >= 1.15, found {trl.__version__}")
    rows = re.findall(r"weights (\S+): (\d+)% polite, (\d+)% brief", run("trl_grpo", tmp_path, monkeypatch))
    assert [row[0] for row in rows] == ["1.00,0.00", "0.50,0.50", "0.00,1.00"]
    polite, brief = ([int(row[column]) for row in rows] for column in (1, 2))
    assert polite[0] >= 70 and brief[2] >= 90 and polite[2] <= 20 and brief[0] <= 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reward_model", "cross_encoder"])
def test_an_example_of_scores_orders_responses_as_both_objectives_want(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = re.findall(r"accuracy of (\w+): (\d+)%", run(name, tmp_path, monkeypatch))
    assert [objective for objective, _ in found] == ["polite", "brief"]
    assert all(int(accuracy) >= 90 for _, accuracy in found)


@pytest.mark.slow
def test_the_example_of_a_patched_trainer_prints_equal_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = re.findall(r"(\w+): three steps equal to (\S+)", run("trl_patched", tmp_path, monkeypatch))
    assert rows[0][0] == "GRPO" and all(float(difference) < 1e-5 for _, difference in rows)


@pytest.mark.slow
def test_the_example_of_a_letor_file_ranks_cheap_or_near_hotels_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run("ranking_own_file", tmp_path, monkeypatch)
    rows = re.findall(r"weights (\S+): mean price (\S+), mean distance (\S+)", found)
    assert [row[0] for row in rows] == ["1.0,0.0", "0.5,0.5", "0.0,1.0"]
    price, distance = ([float(row[column]) for row in rows] for column in (1, 2))
    assert price[0] < price[1] < price[2] and distance[0] > distance[1] > distance[2]


@pytest.mark.slow
def test_the_example_of_a_choice_keeps_its_limit_and_gains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("choose_trade_off", tmp_path, monkeypatch)
    assert len(re.findall(r"^weights ", found, re.M)) == 33
    row = re.search(r"test: main (\S+), first objective (\S+) -> main (\S+), first objective (\S+)", found)
    assert row is not None, found
    main, first, main_after, first_after = map(float, row.groups())
    assert main - main_after < 0.1 and first_after > first
