"""`mopl export --adapters` of runs and folders, and the model cards of all exports."""

import json
import random
import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from huggingface_hub import ModelCard
from tiny_language_models import build, tokenizer

from mopl.alignment import open_run
from mopl.conditioning import KLWeightCoefficients, LoraMixture, TuningRecord
from mopl.pareto import Front
from tests.commands.test_generate_and_export import make_run, printed, refused

IDS = torch.tensor([[7, 9, 11, 13, 8], [20, 21, 22, 23, 24]])


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A base model with a licence, a run that mixes adapters on it, and what its files must not speak of."""
    folder = tmp_path_factory.mktemp("places")
    build(num_hidden_layers=1).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: LICENSE\n---\n# A model\n")
    make_run(folder / "base", folder, conditioning="lora-mixture")
    return folder


@pytest.fixture(scope="module")
def exported(places: Path) -> Path:
    from mopl.cli import main

    assert main(["export", str(places / "run"), "--adapters", str(places / "out"), "--grid", "3"]) == 0
    return places / "out"


def paths_in(folder: Path, places: Path) -> list[str]:
    """The files that name a place of this machine."""
    words = [str(places).encode(), str(Path.home()).encode(), b"/tmp/"]
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    return [file.name for file in files if any(word in file.read_bytes() for word in words)]


@torch.no_grad()
def logits(model, **kwargs) -> torch.Tensor:
    return model(input_ids=IDS, **kwargs).logits


def test_the_card_s_own_program_gives_the_mixture_at_its_weights(places: Path, exported: Path, monkeypatch) -> None:
    text = (exported / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert '"BASE_MODEL"' in program and "folder of the base model, which has no public name" in text
    monkeypatch.chdir(exported)
    given: dict = {}
    exec(program.replace('"BASE_MODEL"', repr(str(places / "base"))), given)
    mixture = open_run(places / "run").load()
    with torch.no_grad():
        wanted = logits(mixture, weights=[given["weights"]["short"], given["weights"]["low"]])
        torch.testing.assert_close(logits(given["model"]), wanted, rtol=0, atol=1e-5)
    assert sorted(p.name for p in exported.iterdir()) == [
        "README.md", "front.png", "low", "mopl.json", "short", "w=0,1", "w=0.5,0.5", "w=1,0",
    ]  # fmt: skip
    assert not (exported / "short" / "README.md").exists()
    record = json.loads((exported / "short" / "adapter_config.json").read_text())
    assert record["target_modules"] == [f"{name}_proj" for name in ("down", "gate", "k", "o", "q", "up", "v")]


def test_no_file_of_a_folder_of_adapters_names_a_place(places: Path, exported: Path) -> None:
    assert not paths_in(exported, places)
    assert paths_in(places / "run", places)  # it would be seen


def test_the_card_says_what_the_run_recorded(places: Path, exported: Path) -> None:
    loaded = ModelCard.load(exported / "README.md")
    said = loaded.data.to_dict()
    assert said["license"] == "apache-2.0" and "license_link" not in said and "base_model" not in said
    assert said["library_name"] == "peft" and said["pipeline_tag"] == "text-generation" and "datasets" not in said
    assert (exported / "front.png").read_bytes().startswith(b"\x89PNG") and "](front.png)" in loaded.text
    front = Front.load(places / "run" / "front.json")
    rows = re.findall(r"^\| (0, 1|0\.5, 0\.5|1, 0) \| (.*) \|$", loaded.text, re.MULTILINE)
    assert [[float(x) for x in cells.split(" | ")] for _, cells in rows] == [
        [pytest.approx(x, abs=6e-5) for x in point.figures] for point in front.trained_points
    ]
    for wanted in (
        "| w1 | short | `short` |\n| w2 | low | `low` |", "| before training |", "Method: `weight-cos-dpo`",
        "| loss | listnet |", "| β | 0.1, 0.1 |", "| steps | 2 |", "| seed | 0 |", "rank 2, alpha 8", "torch ",
        "Data: “data”", "its files give as apache-2.0", "--max-lora-rank 8", "mean \\|log p - log p0\\|",
    ):  # fmt: skip
        assert wanted in loaded.text, wanted


def test_plain_exports_have_a_card_too(places: Path, tmp_path: Path, capsys) -> None:
    asked = [str(places / "run"), "--weights", "0.7", "0.3"]
    printed(capsys, "export", *asked, str(tmp_path / "model"))
    printed(capsys, "export", *asked, "--kind", "adapter", str(tmp_path / "adapter"))
    for kind, library in (("model", "transformers"), ("adapter", "peft")):
        loaded = ModelCard.load(tmp_path / kind / "README.md")
        assert loaded.data.to_dict()["library_name"] == library and loaded.data.to_dict()["license"] == "apache-2.0"
        assert "# short 0.7, low 0.3: one trade-off" in loaded.text and "| short | 0.7 |" in loaded.text
        assert "](front.png)" in loaded.text and (tmp_path / kind / "front.png").is_file()
        assert str(places) not in loaded.content and "/tmp/" not in loaded.content
        assert "| 0.5, 0.5 |" in loaded.text and "Another trade-off is another export" in loaded.text


def test_a_name_on_the_hub_is_kept_and_a_folder_is_none(tmp_path: Path, monkeypatch) -> None:
    from mopl._hub import public_name

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "own").mkdir(parents=True)
    kept = ["gpt2", "HuggingFaceTB/SmolLM2-135M"]
    assert [public_name(name) for name in kept] == kept
    gone = ["models/own", "/models/gone", "./gone", "a/b/c", "~/m", "", None, "has space", "a--b"]
    assert [public_name(name) for name in gone] == [None] * len(gone)


def test_a_folder_of_a_mixture_with_several_kl_weights(places: Path, tmp_path: Path, capsys) -> None:
    import peft

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(places / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    rule = KLWeightCoefficients(0.05, anchor=False)
    mixture = LoraMixture(base, 2, config=lora, coefficients=rule, record=TuningRecord(("helpful", "harmless")))
    mixture.save_pretrained(tmp_path / "tuned")
    common = ["export", str(tmp_path / "tuned"), "--adapters", str(tmp_path / "out")]
    assert "trained with several KL weights; choose one with --kl-weight" in refused(capsys, *common)
    assert "KL weight 0.2" in printed(capsys, *common, "--kl-weight", "0.2")
    record = json.loads((tmp_path / "out" / "mopl.json").read_text())
    assert record["kl_weight"] == 0.2 and record["objectives"] == ["helpful", "harmless"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "at the KL weight 0.2" in text and "No run is at hand" in text and "This card has no figures" in text
    assert not (tmp_path / "out" / "front.png").exists() and not paths_in(tmp_path / "out", tmp_path)
    error = refused(capsys, "generate", str(tmp_path / "out"), "--weights", "1", "0", "w1")
    assert "has adapters for servers; name the run or the model that they were exported from" in error


def test_runs_on_rewards(places: Path, tmp_path: Path, capsys) -> None:
    """A policy conditioned on the KL weight: the run's first one unless another is asked for."""
    from mopl.clp import ClpConfig, train_policies
    from mopl.clp import open_run as open_clp

    prompts = tmp_path / "prompts.jsonl"
    draw = random.Random(0)
    prompts.write_text("".join(json.dumps({"prompt": f"w{draw.randrange(50)} w{i}"}) + "\n" for i in range(20)))
    config = ClpConfig(
        str(places / "base"), str(prompts), rewards=("brevity:unit=characters", "length:target=9,unit=characters"),
        scope="lora-mixture", kl_weight=(0.1, 0.05), steps=1, prompts_per_step=2, samples_per_prompt=2,
        max_new_tokens=2, points=3, normalize="none", bootstrap=0, held_out=0.2, samples=1, lora_rank=2,
        learning_rate=0.05, device="cpu",
    )  # fmt: skip
    run = train_policies(config, tmp_path / "run", say=lambda text: None)
    printed(capsys, "export", str(run), "--adapters", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "mopl.json").read_text())["kl_weight"] == 0.1
    text = (tmp_path / "out" / "README.md").read_text()
    assert (
        "At the KL weight 0.1" in text and "| KL weight α | 0.1, 0.05 |" in text and "| scope | lora-mixture |" in text
    )
    assert not paths_in(tmp_path / "out", tmp_path)
    plain = open_clp(run).load(weights=[0.4, 0.6], kl_weight=0.07)
    printed(capsys, "export", str(run), "--kl-weight", "0.07", "--adapters", str(tmp_path / "other"))
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(places / "base", dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "other" / "brevity"), adapter_name="a")
    loaded.load_adapter(str(tmp_path / "other" / "length"), adapter_name="b")
    loaded.add_weighted_adapter(["a", "b"], [0.4, 0.6], "mixed", combination_type="cat")
    loaded.set_adapter("mixed")
    torch.testing.assert_close(logits(loaded.eval()), logits(plain), rtol=0, atol=1e-5)
    printed(capsys, "export", str(run), "--weights", "0.4", "0.6", str(tmp_path / "plain"))
    text = (tmp_path / "plain" / "README.md").read_text()
    assert "# brevity 0.4, length 0.6: one trade-off" in text and "KL weight: 0.1." in text
    assert "--kl-weight is 0.5 but clp" in refused(
        capsys, "export", str(run), "--kl-weight", "0.5", "--adapters", str(tmp_path / "third")
    )


def test_methods_without_a_mixture_are_refused(places: Path, tmp_path: Path, capsys) -> None:
    run = make_run(places / "base", tmp_path, method="dpo-soup")
    error = refused(capsys, "export", str(run), "--adapters", str(tmp_path / "out"))
    assert "dpo-soup has a model of its own for each trade-off" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--adapters", "x", "--weights", "1", "0"], "--weights is for one; leave out one of them"),
        (["RUN", "y", "--adapters", "x"], "'y' is one place too many; leave it out"),
        (["RUN", "--adapters", "x", "--kind", "adapter"], "--kind adapter is for one"),
        (["RUN", "--adapters", "x", "--keep-tied"], "--keep-tied is about"),
        (["RUN", "--adapters", "x", "--beta", "1", "1"], "take no β; leave out --beta"),
        (["RUN", "--weights", "1", "0", "x", "--grid", "3"], "--grid 3 is for --adapters"),
        (["RUN", "x"], "--weights is missing; pass one for each objective, or write all trade-offs"),
        (["RUN", "--weights", "1", "0"], "there is no DIR to write to"),
        (["RUN", "--adapters", "RUN"], "exists and is not an empty directory"),
        (["RUN", "--adapters", "x", "--kl-weight", "0.1"], "leave it out"),
        (["RUN", "--adapters", "x", "--method", "dpo-ls"], "has no dpo-ls"),
        (
            ["RUN", "--adapters", "x", "--grid", "0"],
            "--grid 0: points is 0 but a lattice of 2 objectives has at least 2",
        ),
        (["RUN", "--adapters", "x", "--grid", "100000000"], "--grid is 100000000 but must be at most 10,000"),
        (["nowhere", "--adapters", "x"], "neither a run of mopl align nor a model"),
    ],
)
def test_wrong_combinations_are_errors_of_one_line(
    places: Path, arguments: list[str], message: str, capsys, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(places / "run") if argument == "RUN" else argument for argument in arguments]
    assert message in refused(capsys, "export", *given)
    assert not list(tmp_path.iterdir())
