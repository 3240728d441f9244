"""`mopl generate` and `mopl export` on finished runs and on folders of models."""

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_language_models import VOCABULARY, build, lora, prompt, tokenizer

from mopl.cli import build_parser, main
from mopl.commands.tuned_model import load_reference, load_tuned_model
from mopl.conditioning import HyperPromptModel, ParameterMixture, TuningRecord
from mopl.language_models.generate import generate


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build(num_hidden_layers=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory) -> Path:
    """What `HyperPromptModel.save_pretrained` writes."""
    folder = tmp_path_factory.mktemp("tuned")
    model = lora(transformers.AutoModelForCausalLM.from_pretrained(base))
    record = TuningRecord(("helpful", "harmless"), beta=[0.1, 0.1])
    HyperPromptModel(model, prompt(), record=record).save_pretrained(folder)
    return folder


def make_run(base: Path, folder: Path, say=lambda text: None, **settings) -> Path:
    """A run of two steps."""
    from mopl.alignment import AlignConfig, align

    draw = random.Random(0)
    rows = []
    for _ in range(16):
        words = [[f"w{draw.randrange(50)}" for _ in range(3)] for _ in range(3)]
        labels = {"short": [0, 1], "low": [1, 0]}
        rows.append({"prompt": " ".join(words[0]), "responses": [" ".join(w) for w in words[1:]], "labels": labels})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = AlignConfig(
        str(base), str(data), steps=2, lists_per_batch=2, held_out=0.25, points=3, scales=(), bootstrap=0, samples=1,
        sample_tokens=2, max_length=32, warmup=0, device="cpu", virtual_tokens=2, prompt_rank=2, lora_rank=2,
        **settings,
    )  # fmt: skip
    return align(config, folder / "run", say=say)


def printed(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# ---------------------------------------------------------------- folders


def test_generate_prints_what_the_function_gives(tuned: Path, capsys, monkeypatch) -> None:
    model, words = HyperPromptModel.from_pretrained(tuned), tokenizer()
    options = {"max_new_tokens": 5}
    wanted = generate(model, words, ["w1 w2", "w3"], [0.7, 0.3], scale=2.0, **options)
    common = ["generate", str(tuned), "--max-new-tokens", "5", "--device", "cpu"]
    found = printed(capsys, *common, "--weights", "0.7", "0.3", "w1 w2", "w3", "--scale", "2")
    assert found == f"> w1 w2\n{wanted[0].text}\n\n> w3\n{wanted[1].text}\n"
    assert printed(capsys, *common, "w1 w2", "--scale", "2", "--weights", "0.7", "0.3") == wanted[0].text + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\n"))
    assert printed(capsys, *common, "--scale=2", "--weights", "0.7", "0.3", "-") == wanted[0].text + "\n"

    lines = printed(
        capsys, *common, "--weights", "0.7", "0.3", "--scale", "2", "--candidates", "3", "--rerank", "resample",
        "--seed", "1", "--json", "w1 w2",
    ).splitlines()  # fmt: skip
    answer = generate(
        model, words, "w1 w2", [0.7, 0.3], scale=2.0, candidates=3, rerank="resample", seed=1, **options
    )[0]  # fmt: skip
    record = json.loads(lines[0])
    assert len(lines) == 1 and record["text"] == answer.text and record["prompt"] == "w1 w2"
    assert [one["text"] for one in record["candidates"]] == [one.text for one in answer.candidates]
    assert sum(one["share"] for one in record["candidates"]) == pytest.approx(1.0)
    sampled = generate(model, words, "w1 w2", [1.0, 0.0], temperature=2.0, top_p=0.9, seed=4, **options)[0]
    arguments = ["--weights", "1", "0", "--temperature", "2", "--top-p", "0.9", "--seed", "4", "--raw"]
    assert printed(capsys, *common, *arguments, "w1 w2") == sampled.text + "\n"


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model of another size with embeddings that are padded."""
    folder = tmp_path_factory.mktemp("large")
    build(vocabulary=VOCABULARY + 2, num_hidden_layers=2, hidden_size=24).save_pretrained(folder)
    tokenizer(chat=True).save_pretrained(folder)
    return folder


def test_a_run_guides_a_larger_model(base: Path, tuned: Path, large: Path, capsys, tmp_path: Path) -> None:
    model, words, options = HyperPromptModel.from_pretrained(tuned), tokenizer(), {"max_new_tokens": 5}
    larger = transformers.AutoModelForCausalLM.from_pretrained(large)
    options = {**options, "guided_model": larger}
    common = ["generate", str(tuned), "--max-new-tokens", "5", "--device", "cpu", "--weights", "0.7", "0.3"]
    common += ["--guided-model", str(large)]
    for scale in (1.0, 0.5):
        wanted = generate(model, words, ["w1 w2", "w3"], [0.7, 0.3], scale=scale, **options)
        found = printed(capsys, *common, "w1 w2", "w3", "--scale", str(scale))
        assert found == f"> w1 w2\n{wanted[0].text}\n\n> w3\n{wanted[1].text}\n"
    alone = generate(larger, words, ["w1 w2", "w3"], max_new_tokens=5)
    assert [one.text for one in alone] != [one.text for one in wanted]
    sampled = ["--candidates", "3", "--seed", "1", "--json", "w1 w2"]
    answer = generate(model, words, "w1 w2", [0.7, 0.3], candidates=3, seed=1, **options)[0]
    record = json.loads(printed(capsys, *common, *sampled))
    assert [one["guided_log_prob"] for one in record["candidates"]] == [
        one.guided_log_prob for one in answer.candidates
    ]
    # A model of one trade-off has another one for its reference, which is loaded at scale 1, too.
    run = make_run(base, tmp_path, method="dpo-soup")
    own = ["generate", str(run), "--max-new-tokens", "4", "--weights", "0.7", "0.3", "w1 w2", "--device", "cpu"]
    assert printed(capsys, *own, "--guided-model", str(base)) == printed(capsys, *own)

    other = tmp_path / "other"
    larger.save_pretrained(other)
    changed = tokenizer()
    changed.add_tokens(["w77"])
    changed.save_pretrained(other)
    error = refused(capsys, *common[:-1], str(other), "w1")
    assert f"the tokenizer of {other} has another vocabulary ({VOCABULARY + 1} tokens)" in error
    assert "nowhere" in refused(capsys, *common[:-1], "nowhere", "w1")


def test_export_writes_what_transformers_loads(tuned: Path, capsys, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    said = printed(capsys, "export", str(tuned), "--weights", "0.7", "0.3", str(folder))
    assert "helpful 0.7, harmless 0.3" in said and f"vllm serve {folder}" in said
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    made = transformers.AutoTokenizer.from_pretrained(folder)
    model = HyperPromptModel.from_pretrained(tuned)
    with torch.no_grad():
        wanted = model(torch.tensor([tokenizer()("w1 w2")["input_ids"]]), weights=torch.tensor([0.7, 0.3])).logits
        given = plain(torch.tensor([made("w1 w2")["input_ids"]])).logits[:, 5:, : wanted.shape[-1]]
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    assert json.loads((folder / "mopl.json").read_text())["origin"] == str(tuned)
    assert "not an empty directory" in refused(capsys, "export", str(tuned), "--weights", "0.7", "0.3", str(folder))
    error = refused(capsys, "generate", str(folder), "--weights", "0.5", "0.5", "w1")
    assert "exported at weights 0.7 0.3 and has no others" in error


def test_a_mixture_of_parameters_answers_and_is_exported_as_the_model_of_one_trade_off(
    base: Path, capsys, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    record = TuningRecord(("helpful", "harmless"))
    mixture = ParameterMixture(plain, 2, scope="full", record=record)
    with torch.no_grad():
        for values in mixture.parameters():
            values += 0.3 * torch.randn_like(values)
    folder, weights = tmp_path / "tuned", ["--weights", "0.7", "0.3"]
    mixture.save_pretrained(folder)
    tokenizer().save_pretrained(folder)  # as trainers do, where it is taken from
    one, options = mixture.merge([0.7, 0.3]).eval(), {"max_new_tokens": 5}
    reference = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    asked = ["w1 w2", "w3", *weights, "--max-new-tokens", "5", "--device", "cpu"]
    for scale in (1.0, 2.0):
        wanted = generate(one, tokenizer(), ["w1 w2", "w3"], scale=scale, reference=reference, **options)
        found = printed(capsys, "generate", str(folder), *asked, "--scale", str(scale))
        assert found == f"> w1 w2\n{wanted[0].text}\n\n> w3\n{wanted[1].text}\n"
    printed(capsys, "export", str(folder), *weights, str(tmp_path / "plain"))
    assert json.loads((tmp_path / "plain" / "mopl.json").read_text())["base_model"] == str(base)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        given = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(ids).logits
        torch.testing.assert_close(given, one(ids).logits)
    assert "--weights has 3 numbers" in refused(capsys, "generate", str(folder), "w1", "--weights", "0", "0", "1")


def test_what_was_trained_in_float32_from_a_16_bit_model_stays_float32_as_does_its_reference(capsys, tmp_path: Path):
    build(num_hidden_layers=1).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    mixture = ParameterMixture(plain, 2, scope="full", record=TuningRecord(("helpful", "harmless")))
    torch.manual_seed(0)
    with torch.no_grad():
        for values in mixture.parameters():
            values += 0.01 * torch.randn_like(values)
    mixture.save_pretrained(tmp_path / "tuned")
    tokenizer().save_pretrained(tmp_path / "tuned")
    weights = ["--weights", "0.7", "0.3"]
    printed(capsys, "export", str(tmp_path / "tuned"), *weights, str(tmp_path / "plain"))
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    for name, value in mixture.merge([0.7, 0.3]).named_parameters():
        torch.testing.assert_close(written.get_parameter(name), value, atol=1e-6, rtol=1e-6)
    arguments = build_parser().parse_args(["generate", str(tmp_path / "tuned"), "w1", *weights, "--scale", "2"])
    one = load_tuned_model(arguments)
    assert one.model.dtype == load_reference(one).dtype == torch.float32


def test_a_kind_that_no_module_defines_is_refused_by_name(tuned: Path, capsys, tmp_path: Path) -> None:
    record = json.loads((tuned / "mopl.json").read_text()) | {"kind": "FifthModel", "module": "their_models"}
    (tmp_path / "mopl.json").write_text(json.dumps(record))
    error = refused(capsys, "generate", str(tmp_path), "--weights", "0.5", "0.5", "w1")
    assert "FifthModel" in error and "import the module their_models first" in error


# ---------------------------------------------------------------- runs


def test_a_run_answers_and_is_exported(base: Path, capsys, tmp_path: Path) -> None:
    run = make_run(base, tmp_path, method="temperature-cos-dpo")
    common = [str(run), "--weights", "0.7", "0.3"]
    plain = printed(capsys, "generate", *common, "--max-new-tokens", "4", "w1 w2")
    beta = ["--max-new-tokens", "4", "w1 w2", "--beta", "0.1", "0.1"]
    assert plain == printed(capsys, "generate", *common, *beta)
    with pytest.warns(FutureWarning, match="--objective-temperature is called --beta now") as warned:
        old = ["--objective-temperature" if argument == "--beta" else argument for argument in beta]
        assert plain == printed(capsys, "generate", *common, *old)
    assert len([w for w in warned if "--beta" in str(w.message)]) == 1
    printed(capsys, "export", *common, str(tmp_path / "plain"))
    record = json.loads((tmp_path / "plain" / "mopl.json").read_text())
    assert record["objectives"] == ["short", "low"] and record["objective_temperature"] == [0.5, 0.5]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert "has no dpo-ls" in refused(capsys, "generate", *common, "--method", "dpo-ls", "w1")
    error = refused(capsys, "generate", str(run), "--weights", "0.2", "0.3", "0.5", "w1")
    assert "3 numbers but there are 2 objectives: short, low" in error


@pytest.mark.parametrize("settings", [{"method": "dpo-soup"}, {"conditioning": "text"}], ids=["soup", "words"])
def test_other_kinds_of_models(base: Path, capsys, tmp_path: Path, settings: dict) -> None:
    run = make_run(base, tmp_path, **settings)
    common = [str(run), "--weights", "0.7", "0.3"]
    answer = printed(capsys, "generate", *common, "--max-new-tokens", "4", "--scale", "1.5", "w1 w2")
    assert answer == printed(capsys, "generate", *common, "--max-new-tokens", "4", "--scale", "1.5", "w1 w2")
    printed(capsys, "export", *common, str(tmp_path / "plain"))
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    batch = made("w1 w2", return_tensors="pt", return_token_type_ids=False)
    given = model.generate(**batch, do_sample=False, max_new_tokens=4)[0, batch["input_ids"].shape[1] :]
    direct = printed(capsys, "generate", *common, "--max-new-tokens", "4", "w1 w2")
    assert made.decode(given, skip_special_tokens=True) == direct.removesuffix("\n")


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "order",
    [
        ["RUN", "--weights", "0.7", "0.3", "one", "two"],
        ["RUN", "one", "--weights", "0.7", "0.3", "two"],
        ["--weights", "0.7", "0.3", "RUN", "--scale", "2", "one", "--chat", "two"],
        ["--scale=2", "RUN", "--weights", "0.7", "0.3", "--", "one", "two"],
    ],
)
def test_prompts_may_stand_anywhere(order: list[str]) -> None:
    parsed = build_parser().parse_args(["generate", *order])
    assert (parsed.run, parsed.weights, parsed.prompts) == ("RUN", [0.7, 0.3], ["one", "two"])
    parsed = build_parser().parse_args(["export", "RUN", "--weights", "0.7", "0.3", "DIR"])
    assert (parsed.run, parsed.weights, parsed.directory) == ("RUN", [0.7, 0.3], "DIR")


def test_help_says_where_scale_is_exact_and_loads_nothing_heavy(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "exact on whole responses" in text and "approximate per token" in text
    assert "one pass of MODEL and two of RUN's model" in text
    code = "import sys; from mopl.cli import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "--weights", "1", "0", "w1"], "neither a run of mopl align nor a model"),
        (["generate", "nowhere", "--weights", "1", "0"], "there is no prompt"),
        (
            ["generate", "TUNED", "w1"],
            "--weights is missing; pass one number for each objective: --weights 0.5 0.5 (help",
        ),
        (["export", "nowhere", "--weights", "1", "0", "x"], "nor a model: there is no such directory"),
        (["generate", "TUNED", "--weights", "1", "w1"], "1 number but there are 2 objectives: helpful, harmless"),
        (
            ["generate", "TUNED", "--weights", "0.9", "0.9", "w1"],
            "of the sum 1.8, but must sum to 1; pass --weights 0.5 0.5",
        ),
        (["generate", "TUNED", "--weights", "1", "0", "--method", "dpo-ls", "w1"], "leave out --method"),
        (["generate", "TUNED", "--weights", "1", "0", "--scale", "-1", "w1"], "scale is"),
        (["generate", "TUNED", "--weights", "1", "0", "--chat", "w1"], "no chat template"),
        (["generate", "BASE", "--weights", "1", "0", "w1"], "a plain language model, which takes no weights"),
    ],
)
def test_errors_are_one_line(
    base: Path, tuned: Path, arguments: list[str], message: str, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    names = {"TUNED": str(tuned), "BASE": str(base)}
    assert message in refused(capsys, *(names.get(argument, argument) for argument in arguments))
