"""Code that comes with a model or that a run folder names is not run unless the person who runs mopl asks for it."""

import builtins
import json
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_language_models import build, conditioned, tokenizer

from mopl.cli import main
from mopl.clp import ClpConfig
from mopl.clp.recipe import check_resume
from mopl.clp.reward_modules import is_module
from mopl.conditioning import HyperPromptModel, ParameterMixture
from mopl.rewards import make

CODE = """
from pathlib import Path
from transformers import LlamaConfig
Path({marker!r}).write_text("ran")

class OwnConfig(LlamaConfig):
    model_type = "own"
"""


@pytest.fixture
def received(tmp_path, monkeypatch):
    """A model whose configuration is Python code; whoever is asked says yes."""
    folder, marker = tmp_path / "received", tmp_path / "marker"
    build().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own_code.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_code.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"w{i}", "responses": ["w1", "w2"], "labels": {"a": [0, 1], "b": [1, 0]}} for i in range(9)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, marker


def test_a_command_says_how_a_model_with_code_of_its_own_is_allowed(received, capsys):
    folder, marker = received
    command = ["align", "--model", str(folder), "--data", "data.jsonl", "--run", "run", "--device", "cpu"]
    for more in ([], ["--method", "clp", "--rewards", "length"]):
        assert main([*command, *more]) == 2
        error = capsys.readouterr().err
        assert f"the model {folder} comes with Python code of its own" in error and "--trust-remote-code" in error
        assert not marker.exists() and not (Path("run") / "config.json").exists()
    assert main([*command, "--trust-remote-code"]) == 2  # the code is no whole model, but it was run
    assert marker.exists() and "comes with Python code" not in capsys.readouterr().err


def test_no_function_that_loads_a_model_runs_its_code_unasked(received):
    from mopl.integrations.transformers import MultiObjectiveConfig, MultiObjectiveTrainer

    folder, marker = received
    conditioned(adapters=False).save_pretrained("tuned")
    record = json.loads(Path("tuned/mopl.json").read_text())
    Path("tuned/mopl.json").write_text(json.dumps(record | {"base_model": str(folder)}))
    ParameterMixture(build(), 2).save_pretrained("mixture")
    for name in ("config.json", "own_code.py"):
        (Path("mixture/architecture") / name).write_text((folder / name).read_text())
    arguments = MultiObjectiveConfig("out", use_cpu=True, report_to="none")
    for load in (
        lambda: HyperPromptModel.from_pretrained("tuned"),
        lambda: ParameterMixture.from_pretrained("mixture"),
        lambda: make(f"classifier:directory={folder}"),
        lambda: MultiObjectiveTrainer(str(folder), arguments, train_dataset=[]),
    ):
        with pytest.raises(PermissionError, match=r"Python code of its own.*trust_remote_code=True"):
            load()
    assert not marker.exists()
    with pytest.raises(Exception) as error:
        HyperPromptModel.from_pretrained("tuned", trust_remote_code=True)
    assert not isinstance(error.value, PermissionError) and marker.exists()


def test_a_resumed_run_imports_no_module_that_only_its_folder_names(tmp_path, monkeypatch, capsys):
    build().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "w{i} w{i + 1}"}}\n' for i in range(10)))
    rewards = ("sneaky_module:reward", "length:target=3")
    config = ClpConfig(str(tmp_path / "model"), str(tmp_path / "prompts.jsonl"), rewards=rewards, steps=1)
    run, marker = tmp_path / "run", tmp_path / "marker"
    run.mkdir()
    record = {
        "kind": "clp",
        "config": config.to_dict(),
        "data": {"objectives": ["reward", "length"], "fingerprint": "x"},
    }
    (run / "config.json").write_text(json.dumps(record))
    code = f"open({str(marker)!r}, 'w').close()\ndef reward(texts, prompts):\n    return [0.0 for _ in texts]\n"
    (run / "sneaky_module.py").write_text(code)
    monkeypatch.chdir(run)
    assert main(["align", "--run", ".", "--resume"]) == 2
    error = capsys.readouterr().err
    assert "the module sneaky_module" in error and str(run / "sneaky_module.py") in error
    assert "--rewards sneaky_module:reward length:target=3" in error and "--trust-rewards" in error
    assert not marker.exists() and "sneaky_module" not in sys.modules
    for asked in (["--trust-rewards"], ["--rewards", *rewards]):
        assert main(["align", "--run", ".", "--resume", *asked]) == 2
        assert marker.exists() and "the prompts of" in capsys.readouterr().err  # that was the invented fingerprint
        marker.unlink()
        sys.modules.pop("sneaky_module")
    assert main(["align", "--run", ".", "--resume", "--rewards", "length:target=3"]) == 2
    assert not marker.exists()


def test_rewards_of_mopl_need_no_option_on_resume():
    assert not is_module("length:target=20") and not is_module("sentiment") and is_module("mine:score")
    assert is_module("package.mine:Score.of")
    config = ClpConfig("model", "data", rewards=("sentiment", "length:target=20"), steps=1)
    record = {"kind": "clp", "config": config.to_dict(), "data": {"objectives": ["a", "b"], "fingerprint": "x"}}
    assert check_resume(record, {}, Path("run")).rewards == config.rewards
