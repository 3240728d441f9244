"""`mopl align` with methods on rewards, from prompts to report, and what comes after: generate, export, report."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from launching import launch_mopl
from tiny_language_models import build, tokenizer

from mopl.cli import main
from mopl.clp import ClpConfig, open_run
from mopl.experiments import run_fronts
from mopl.pareto import Front

REWARDS = """
FIRST, SECOND = {f"w{i}" for i in range(20)}, {f"w{i}" for i in range(20, 40)}

def first(texts, prompts):
    return [sum(word in FIRST for word in text.split()) / 4 for text in texts]

def second(texts, prompts):
    return [sum(word in SECOND for word in text.split()) / 4 for text in texts]
"""
BUDGET = (
    "--steps 2 --prompts-per-step 2 --samples-per-prompt 2 --max-new-tokens 4 --points 3 --normalize-prompts 4 "
    "--bootstrap 20 --held-out 0.2 --kl-weight 0.05 --learning-rate 0.01 --samples 2 --log-every 1 --lora-rank 2"
).split()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, prompts and a module of rewards, in which the command runs."""
    build(initializer_range=0.1).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"w{i} w{i + 1}", "id": i} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def align(*options: str) -> int:
    given = ["align", "--model", "model", "--data", "prompts.jsonl", "--device", "cpu", *BUDGET]
    return main([*given, "--rewards", "tiny_rewards:first", "tiny_rewards:second", *options])


@pytest.mark.parametrize(("scope", "count"), [("attention", True), ("lora-mixture", False)])
def test_a_training_in_16_bit_says_so(place, capsys, scope, count):
    """Adapters are float32 whatever the model is."""
    assert align("--method", "clp", "--scope", scope, "--run", "run", "--dtype", "bfloat16", "--steps", "1") == 0
    said = capsys.readouterr().out
    assert bool(re.search(r"clp: \d+ of \d+ trained parameters are bfloat16.*\(--dtype float32\)", said)) is count


def test_the_command_trains_evaluates_and_reports(place, capsys):
    assert align("--method", "clp", "--scope", "lora-mixture", "--run", "run") == 0
    printed = capsys.readouterr().out
    assert "mopl generate run --weights" in printed and "hypervolume ↑" in printed
    assert "1 model runs for a token" in printed
    # One hypervolume: in the table, in front.json and nowhere else.
    (row,) = (line for line in printed.splitlines() if line.startswith("clp  "))
    volume = Front.load(place / "run" / "front.json").hypervolume
    assert float(row.split()[1].rstrip("*")) == pytest.approx(volume, abs=5e-5 if volume >= 0.01 else 5e-4 * volume)
    assert not re.search(r"hypervolume[^;.\n↑]*\d", printed.replace("from reference point (", "(").split("Method  ")[0])
    for name in ("config.json", "log.jsonl", "samples.jsonl", "front.json", "evaluation.json", "samples.json",
                 "table.txt", "front.png", "report.html", "rewards.json", "base/front.json"):  # fmt: skip
        assert (place / "run" / name).is_file(), name
    front = Front.load(place / "run" / "front.json")
    assert front.data["name"] == "prompts"
    assert "before training" in (place / "run" / "report.html").read_text()
    assert open_run("run").samples(run_fronts("run")).keys() == {"base", "clp"}
    assert front.objectives == ["first", "second"] and len(front.points) == 3 and front.maximise is True
    sample = json.loads((place / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert set(sample) == {"stage", "step", "weights", "kl_weight", "prompt", "text", "rewards", "log_ratio"}
    figures = json.loads((place / "run" / "evaluation.json").read_text())[0]
    assert figures["model_runs_per_token"] == 1 and len(figures["spearman"]) == len(figures["spread"]) == 2
    # The value is that of the objective: (1 - α) w·R - α KL, with the rewards in the scale of the training.
    scale = json.loads((place / "run" / "rewards.json").read_text())
    rewards = (torch.tensor(figures["rewards"]) - torch.tensor(scale["mean"])) / torch.tensor(scale["deviation"])
    value = 0.95 * (torch.tensor(figures["weights"]) * rewards).sum(1) - 0.05 * torch.tensor(figures["kl"])
    assert torch.allclose(value, torch.tensor(figures["value"]), atol=1e-5)
    single = 0.95 * rewards - 0.05 * torch.tensor(figures["kl"])[:, None]
    assert torch.allclose(single, torch.tensor(figures["objective_values"]), atol=1e-5)
    # Two deviations below the mean of the untrained model, without KL.
    assert figures["value_reference_point"] == pytest.approx([-1.9, -1.9])
    assert main(["report", "run", "--html", "again.html"]) == 0
    assert main(["generate", "run", "--weights", "0.5", "0.5", "--max-new-tokens", "3", "w1 w2"]) == 0
    assert main(["generate", "run", "--weights", "0.5", "0.5", "--scale", "2", "--max-new-tokens", "3", "w1"]) == 0
    assert main(["export", "run", "--weights", "0.5", "0.5", "exported"]) == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained("exported")
    merged = open_run("run").load(weights=[0.5, 0.5])
    ids = torch.tensor([[1, 7, 8]])
    assert torch.equal(exported(ids).logits, merged(ids).logits)


def test_all_methods_share_one_table(place, capsys):
    assert align("--method", "clp-all", "--scope", "attention", "--run", "run", "--kl-weight", "0.05", "0.2") == 0
    table = (place / "run" / "table.txt").read_text()
    for method in ("clp", "rewarded-soups", "prompting", "logit-mixing", "dera"):
        assert method in table
        assert (place / "run" / method / "front.json").is_file()
    points = Front.load(place / "run" / "clp" / "front.json").points
    # κ(0.05)/κ(0.2) = 19/4: four and three quarters times closer to the reference.
    assert [round(p.scale, 6) for p in points] == [1.0] * 3 + [4.75] * 3
    runs = {m: json.loads((place / "run" / m / "evaluation.json").read_text())[0]["model_runs_per_token"]
            for m in ("clp", "rewarded-soups", "logit-mixing", "dera")}  # fmt: skip
    assert runs == {"clp": 1, "rewarded-soups": 1, "logit-mixing": 2, "dera": 2}
    # At a vertex a soup and a mixture of logits are the expert, and DeRa at its own α is the policy it moves.
    soup, mixed = (Front.load(place / "run" / m / "front.json") for m in ("rewarded-soups", "logit-mixing"))
    assert soup.points[0].auxiliary == mixed.points[0].auxiliary
    dera = Front.load(place / "run" / "dera" / "front.json")
    assert [p.auxiliary for p in dera.points[:3]] == [p.auxiliary for p in points[:3]]
    run = open_run("run")
    ids = torch.tensor([[1, 7, 8]])
    strong, weak = (run.load("clp", [0.5, 0.5], kl_weight=a)(ids).logits for a in (0.05, 0.2))
    assert not torch.equal(strong, weak)


@pytest.mark.parametrize("method", ["rewarded-soups", "prompting"])
def test_baselines_generate_too(place, method):
    assert align("--method", method, "--scope", "hyper-prompt", "--run", "run") == 0
    assert main(["generate", "run", "--weights", "0.25", "0.75", "--max-new-tokens", "3", "w1 w2"]) == 0


def test_virtual_tokens_are_a_scope(place):
    options = ["--baseline", "value", "--kl-estimator", "exact", "--normalize", "running", "--normalize-decay", "0.9"]
    assert align("--method", "clp", "--scope", "hyper-prompt", "--run", "run", *options) == 0
    assert main(["generate", "run", "--weights", "0.25", "0.75", "--scale", "2", "--max-new-tokens", "3", "w1"]) == 0


def test_one_reward_with_many_kl_weights(place):
    options = ["--method", "clp", "--scope", "logits", "--run", "run", "--kl-weight", "0.02", "0.1", "0.5"]
    given = ["align", "--model", "model", "--data", "prompts.jsonl", "--device", "cpu", *BUDGET]
    assert main([*given, *options, "--rewards", "tiny_rewards:first"]) == 0
    points = Front.load(place / "run" / "front.json").points
    assert [p.weights for p in points] == [[1.0]] * 3 and points[0].scale == 1.0


@pytest.mark.parametrize("method", ["clp", "prompting"])
def test_generate_and_export_take_a_kl_weight_between_those_of_the_training(place, capsys, method):
    options = ["--method", method, "--scope", "attention", "--run", "run", "--learning-rate", "0.1", "--steps", "4"]
    assert align(*options, "--kl-weight", "0.05", "0.5") == 0
    run, ids = open_run("run"), torch.tensor([[1, 7, 8]])
    written = []
    for alpha in ("0.5", "0.2"):
        assert main(["export", "run", "--weights", "0.5", "0.5", "--kl-weight", alpha, f"at-{alpha}"]) == 0
        assert f"KL weight {alpha}" in capsys.readouterr().out
        exported = transformers.AutoModelForCausalLM.from_pretrained(f"at-{alpha}")
        text = json.loads((place / f"at-{alpha}" / "mopl.json").read_text()).get("text", "")
        assert (f"KL weight {alpha}" in text) == (method == "prompting")
        own = run.load(weights=[0.5, 0.5], kl_weight=float(alpha))
        assert torch.equal(exported(ids).logits, own(ids).logits)
        written.append((text, exported(ids).logits.tolist()))
    # The policy itself depends on α in clp, what stands in front of the text in prompting.
    assert written[0] != written[1]
    ask = ["generate", "run", "--weights", "0.5", "0.5", "--max-new-tokens", "3", "w1 w2", "--kl-weight"]
    assert main([*ask, "0.2"]) == 0
    capsys.readouterr()
    for alpha in ("0.6", "0.01", "-1", "nan"):
        assert main([*ask, alpha]) == 2
        assert "was trained for those from 0.05 to 0.5; pass one of them" in capsys.readouterr().err
    assert main(["export", "run", "--weights", "0.5", "0.5", "--kl-weight", "0.6", "no"]) == 2
    assert not (place / "no").exists()


def test_a_kl_weight_is_refused_where_nothing_is_conditioned_on_it(place, capsys):
    assert align("--method", "clp", "--scope", "logits", "--run", "one") == 0
    ask = ["generate", "one", "--weights", "0.5", "0.5", "--max-new-tokens", "3", "--kl-weight", "0.05", "w1"]
    assert main(ask) == 2
    assert "clp of one was trained at the KL weight 0.05 alone" in capsys.readouterr().err
    (folder,) = {record.parent for record in (place / "one").rglob("mopl.json")}
    assert main([ask[0], str(folder), *ask[2:]]) == 2
    assert f"which {folder} is not; leave it out" in capsys.readouterr().err


def test_a_finished_run_is_resumed_without_training(place, capsys):
    assert align("--method", "clp", "--scope", "lora-mixture", "--run", "run") == 0
    (place / "run" / "table.txt").unlink()
    capsys.readouterr()
    assert main(["align", "--run", "run", "--resume", "--trust-rewards"]) == 0
    assert (place / "run" / "table.txt").is_file() and "steps in" not in capsys.readouterr().out
    assert align("--method", "clp", "--run", "run") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["align", "--run", "run", "--resume", "--kl-weight", "0.3"]) == 2
    assert "was (0.05,)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "clp", "--loss", "ipo"], "--loss has no part"),
        (["--method", "dpo-ls", "--scope", "full"], "has no part in this --method"),
        (["--method", "clp", "--rewards", "nonsense"], "there is no reward 'nonsense'"),
        (["--method", "clp", "--rewards", "tiny_rewards:third"], "neither one of"),
        (["--method", "clp", "--epochs", "2"], "need clip"),
        (["--method", "clp", "--scope", "lora-mixture", "--max-new-tokens", "100"], "64 positions"),
        (["--method", "dera"], "pass several in"),
        (["--method", "clp", "--scope", "no_such_part"], "names no parameter"),
        (["--method", "clp", "--scope", "lora-mixture", "--lora-targets", "no_such_module"], "no_such_module"),
        (["--method", "clp", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes_say_what_to_change(place, capsys, options, message):
    assert align("--run", "run", *options) == 2
    assert message in capsys.readouterr().err
    assert not (place / "run").exists()


def test_a_reward_that_never_works_leaves_no_run(place, capsys):
    (place / "tiny_rewards_broken.py").write_text("def broken(texts, prompts):\n    raise OSError('no server')\n")
    assert align("--method", "clp", "--run", "run", "--rewards", "tiny_rewards_broken:broken") == 2
    said = capsys.readouterr().err
    assert "the reward broken is the same (or missing)" in said and "Traceback" not in said
    assert not (place / "run").exists()
    (place / "tiny_rewards_broken.py").write_text("broken = 3\n")
    sys.modules.pop("tiny_rewards_broken")
    assert align("--method", "clp", "--run", "run", "--rewards", "tiny_rewards_broken:broken") == 2
    assert "must be a function of (texts, prompts)" in capsys.readouterr().err


def test_settings_survive_json():
    config = ClpConfig("m", "d", rewards=("a", "b"), kl_weight=(0.1, 0.2))
    assert ClpConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown settings"):
        ClpConfig.from_dict({**config.to_dict(), "betas": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": ()}, "rewards are missing"),
        ({"kl_weight": 1.0}, "kl_form='penalty'"),
        ({"kl_weight": 0.0}, "positive and finite"),
        ({"baseline": "group", "samples_per_prompt": 1}, "raise samples_per_prompt"),
        ({"standardize": True}, "baseline='group'"),
        ({"normalize_decay": 0.9}, "pass normalize='running'"),
        ({"normalize": "running", "normalize_decay": 0.0}, "above 0 and at most 1"),
        ({"kl_estimator": "exact", "kl_level": "sequence"}, "is of each position"),
        ({"trade_offs": 9}, "at one trade-off"),
        ({"epochs": 2, "clip": 0.2, "checkpoint_every": 3}, "take a multiple"),
        ({"scope": "hyper-prompt", "kl_weight": (0.1, 0.2)}, "takes weights alone"),
        ({"lora_modules_to_save": ("lm_head",)}, "about adapters, which scope='attention' has none of"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClpConfig("m", "d", **{"rewards": ("a", "b"), **settings})


def test_the_demo_runs_on_its_own_prompts(place, monkeypatch):
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("pyphen")
    from mopl.clp import demo

    tokenizer(chat=True).save_pretrained(place / "model")
    settings = demo.demo_settings(lambda text: None, place / "data", model=place / "model", count=12)
    assert settings["rewards"] == ("sentiment", "brevity")
    assert len((place / "data" / "prompts.jsonl").read_text().splitlines()) == 12
    ClpConfig(**settings)
    monkeypatch.setattr(demo, "smollm2", lambda say: place / "model")
    # A reward of words instead of sentiment: random words have none, which the run would refuse to scale.
    given = ["align", "--demo", "--method", "clp", "--device", "cpu", *BUDGET, "--run", "run", "--normalize", "none"]
    assert main([*given, "--limit", "12", "--max-new-tokens", "4"]) == 0
    front = (place / "run" / "front.json").read_bytes()
    assert Front.load(place / "run" / "front.json").objectives == ["sentiment", "brevity"]
    assert main([*given, "--limit", "12", "--max-new-tokens", "4"]) == 0, "the same command finds its run"
    assert (place / "run" / "front.json").read_bytes() == front


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_make_one_run(place):
    given = [
        "align",
        "--model",
        "model",
        "--data",
        "prompts.jsonl",
        "--device",
        "cpu",
        *BUDGET,
        "--scope",
        "lora-mixture",
    ]
    given += ["--method", "clp-all", "--run", "two", "--rewards", "tiny_rewards:first", "tiny_rewards:second"]
    done = launch_mopl(*given, PYTHONPATH=os.pathsep.join([str(place), *sys.path]))
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert done.stdout.count("clp: 2 steps") == 1  # one process speaks
    assert align("--method", "clp-all", "--scope", "lora-mixture", "--run", "one") == 0
    fronts = [{front.method: front.tensors()[1] for front in run_fronts(name)} for name in ("two", "one")]
    assert fronts[0].keys() == fronts[1].keys()
    assert torch.equal(fronts[0]["base"], fronts[1]["base"])
    assert json.loads((place / "two/rewards.json").read_text()) == json.loads((place / "one/rewards.json").read_text())
