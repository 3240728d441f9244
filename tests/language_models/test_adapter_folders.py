"""`--model FOLDER` with a PEFT adapter: the run starts from the adapted model, and that is its reference."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_language_models import build, prompt, tokenizer

from mopl.alignment.runs import open_run
from mopl.cli import main
from mopl.conditioning import HyperPromptModel
from mopl.language_models.export import export
from mopl.language_models.generate import generate
from mopl.language_models.models import load_causal_lm, load_tokenizer
from mopl.pareto import Front

TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "lora": lambda: peft.LoraConfig(r=2, **TARGETS),
    "rank-stabilised": lambda: peft.LoraConfig(r=2, use_rslora=True, **TARGETS),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **TARGETS),
    "whole head": lambda: peft.LoraConfig(r=2, modules_to_save=["lm_head"], **TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
                                  task_type="CAUSAL_LM"),
}  # fmt: skip


def save_adapter(folder: Path, base: Path, config, named: str | None = None):
    torch.manual_seed(3)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.peft_config["default"].base_model_name_or_path = str(base) if named is None else named
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    build(initializer_range=0.1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(6, 18).view(2, 6)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_of_an_adapter_is_its_base_with_the_adapter_merged(tmp_path, base, kind):
    expected = logits(save_adapter(tmp_path / "adapter", base, KINDS[kind]()))
    model = load_causal_lm(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(load_causal_lm(str(base))), atol=1e-2)
    assert not hasattr(model, "peft_config") and model.name_or_path == str(tmp_path / "adapter")
    assert load_tokenizer(str(tmp_path / "adapter")).get_vocab() == tokenizer().get_vocab()


def test_an_adapter_of_a_tied_head_leaves_the_embeddings_as_they_were(tmp_path):
    base, config = tmp_path / "base", peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    build(initializer_range=0.1, tie_word_embeddings=True).save_pretrained(base)
    expected = logits(save_adapter(tmp_path / "adapter", base, config))
    model = load_causal_lm(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load_causal_lm(str(tmp_path / "merged"))), expected, rtol=1e-4, atol=1e-5)


def test_a_base_that_cannot_be_found_is_named_beside_the_adapter(tmp_path, base):
    save_adapter(tmp_path / "adapter", base, KINDS["lora"](), named=str(tmp_path / "gone"))
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(OSError, match=r"adapter holds a PEFT adapter of the base model .*gone, which cannot be"):
            load(str(tmp_path / "adapter"))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for name, message in ((None, "names no base model"), (str(tmp_path / "adapter"), "is a PEFT adapter too")):
        text = json.dumps({**settings, "base_model_name_or_path": name})
        (tmp_path / "adapter" / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_causal_lm(str(tmp_path / "adapter"))
    save_adapter(tmp_path / "prompt", base, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="of kind PromptTuning, which cannot be merged"):
        load_causal_lm(str(tmp_path / "prompt"))


def test_the_adapter_of_a_conditioned_model_is_no_model_alone(tmp_path, base):
    torch.manual_seed(0)
    model = peft.get_peft_model(build(), KINDS["lora"]())
    HyperPromptModel(model, prompt()).save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="holds a HyperPromptModel, whose adapter is a part of what it does"):
        load_causal_lm(str(tmp_path / "tuned"))


def test_trainers_are_given_an_adapter_as_a_model_and_not_as_a_folder(tmp_path, base):
    from mopl.integrations.transformers import MultiObjectiveConfig, MultiObjectiveTrainer

    save_adapter(tmp_path / "adapter", base, KINDS["lora"]())
    with pytest.raises(ValueError, match=r"holds a PEFT adapter of .*AutoPeftModelForCausalLM"):
        MultiObjectiveTrainer(
            str(tmp_path / "adapter"), MultiObjectiveConfig("out", use_cpu=True, report_to="none"), train_dataset=[]
        )


def rows(path: Path) -> Path:
    lines = [
        {"prompt": f"w{i} w{i + 1}", "responses": ["w1 w2", "w30 w31"], "labels": {"a": [0, 1], "b": [1, 0]}}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_run_starts_from_the_adapter_resumes_and_answers_by_it(tmp_path, base, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapted = save_adapter(tmp_path / "adapter", base, KINDS["lora"]())
    data = rows(tmp_path / "data.jsonl")
    command = [
        "align", "--model", "adapter", "--data", str(data), "--steps", "4", "--lists-per-batch", "4", "--points", "3",
        "--device", "cpu", "--bootstrap", "10", "--samples", "1", "--sample-tokens", "3", "--log-every", "1",
        "--held-out", "0.2", "--reference", "self", "--learning-rate", "0.01",
    ]  # fmt: skip
    assert main([*command, "--run", "run"]) == 0
    front = Front.load(tmp_path / "run" / "base" / "front.json")
    assert all(value == pytest.approx(math.log(2), abs=1e-6) for value in front.points[0].auxiliary)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first = next(line for line in log if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=0.02)  # the prompt alone starts beside the reference
    run = open_run("run")
    torch.testing.assert_close(logits(run.base_model()), logits(adapted), rtol=1e-4, atol=1e-5)
    # The reference at generation is the start, too: far towards it answers are the adapted model's.
    model = HyperPromptModel.from_pretrained("run/model")
    with model.reference():
        torch.testing.assert_close(logits(model), logits(adapted), rtol=1e-4, atol=1e-5)
    assert generate(model, run.list_tokenizer, "w3 w4", [0.5, 0.5], scale=2.0, max_new_tokens=3)
    assert main(["export", "run", "--weights", "0.5", "0.5", "plain"]) == 0
    (tmp_path / "run" / "table.txt").unlink()
    assert main(["align", "--run", "run", "--resume"]) == 0
    # Another adapter in its place is another reference.
    shutil.rmtree(tmp_path / "adapter")
    save_adapter(tmp_path / "adapter", base, KINDS["rank-stabilised"]())
    for file in ("front.json", "base/front.json"):
        (tmp_path / "run" / file).unlink()
    capsys.readouterr()
    assert main(["align", "--run", "run", "--resume"]) == 2
    assert "holds log-probabilities of another model" in capsys.readouterr().err


def test_a_policy_on_rewards_starts_from_the_adapter(tmp_path, base, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_adapter(tmp_path / "adapter", base, KINDS["lora"]())
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "w{i} w{i + 1}"}}\n' for i in range(10)))
    command = (
        "align --method clp --scope lora-mixture --model adapter --data prompts.jsonl --rewards length:target=3 "
        "--steps 1 --prompts-per-step 2 --samples-per-prompt 2 --max-new-tokens 4 --normalize none --log-every 1 "
        "--eval-prompts 2 --normalize-prompts 2 --bootstrap 5 --held-out 0.2 --device cpu --lora-rank 2 --run run"
    ).split()
    assert main(command) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[0]["kl"] == pytest.approx(0.0, abs=1e-5)  # the first rollout is of the reference itself
    capsys.readouterr()
    assert main(["generate", "run", "--weights", "1", "--scale", "2", "--max-new-tokens", "2", "w1"]) == 0
    assert main(["align", "--run", "run", "--resume"]) == 0
    shutil.rmtree(tmp_path / "adapter")
    save_adapter(tmp_path / "adapter", base, KINDS["rank-stabilised"]())
    capsys.readouterr()
    assert main(["align", "--run", "run", "--resume"]) == 2
    assert "adapter is another model than when run began (its parameters differ)" in capsys.readouterr().err


@pytest.mark.parametrize("conditioned", [False, True])
def test_an_adapter_of_a_merged_adapter_is_not_exported(tmp_path, base, conditioned):
    # Loaders would put it onto the base of the first adapter, or onto that adapter unmerged.
    save_adapter(tmp_path / "adapter", base, KINDS["lora"]())
    model = load_causal_lm(str(tmp_path / "adapter"))
    if conditioned:
        model = HyperPromptModel(model, prompt())
    else:
        model = peft.get_peft_model(model, KINDS["lora"]())
    with pytest.raises(ValueError, match=r"started from .*adapter, itself a PEFT adapter.* pass kind='model'"):
        export(model.eval(), tokenizer(), [0.2, 0.8] if conditioned else None, tmp_path / "made", kind="adapter")
    assert not (tmp_path / "made").exists()
