"""`mopl align` from the command line to the report: what lands on disk, what it promises, what a stop costs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("moocore")

from damage import error_of
from launching import launch_mopl

from mopl import steering
from mopl.alignment import AlignConfig, align, config, open_run, score_sequences
from mopl.alignment.recipe import RunInterrupted
from mopl.alignment.stages import Stages
from mopl.cli import build_parser, main
from mopl.conditioning import HyperPromptModel
from mopl.experiments import run_fronts
from mopl.experiments.cos_dpo import model_folder
from mopl.language_models.data import PreferenceData, PreferenceList
from mopl.losses.pairwise import LOSS_TYPES
from mopl.pareto import Front
from mopl.training import TrainingDiverged, read_log

VOCABULARY = 32
TINY = [
    "--steps", "4", "--lists-per-batch", "6", "--points", "3", "--bootstrap", "10", "--samples", "2", "--sample-tokens",
    "4", "--checkpoint-every", "2", "--log-every", "2", "--held-out", "0.2", "--device", "cpu", "--max-length", "32",
]  # fmt: skip


def write_model(folder: Path, name: str = "model", *, seed: int = 0, words: int = VOCABULARY - 4) -> Path:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(words))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / name)
    torch.manual_seed(seed)
    settings = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(folder / name)
    return folder / name


def write_data(file: Path, count: int = 30, *, size: int = 3, seed: int = 0, scale: float = 1.0) -> Path:
    """Lists of random words; one objective counts words below w9, the other those from w9 to w17."""
    random = np.random.default_rng(seed)
    with file.open("w") as lines:
        for _ in range(count):
            drawn = random.integers(0, VOCABULARY - 4, (size, 3))
            labels = {"low": drawn < 9, "middle": (drawn >= 9) & (drawn < 18)}
            row = {
                "prompt": " ".join(f"w{w}" for w in random.integers(0, VOCABULARY - 4, 3)),
                "responses": [" " + " ".join(f"w{w}" for w in words) for words in drawn],
                "labels": {name: [scale * float(x) for x in hits.sum(1)] for name, hits in labels.items()},
            }
            lines.write(json.dumps(row) + "\n")
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("align")
    write_model(folder)
    write_data(folder / "data.jsonl")
    return folder


def arguments(place, run, *more):
    return [
        "align",
        "--model",
        str(place / "model"),
        "--data",
        str(place / "data.jsonl"),
        "--run",
        str(run),
        *TINY,
        *more,
    ]


@pytest.fixture(scope="module")
def run(place):
    """One run of every method, made from the command line."""
    path = place / "all"
    assert main(arguments(place, path, "--method", "all")) == 0
    return path


def tiny(place, **changes):
    return AlignConfig(**{
        "model": str(place / "model"), "data": str(place / "data.jsonl"), "steps": 3, "lists_per_batch": 4, "points": 2,
        "bootstrap": 0, "samples": 1, "sample_tokens": 3, "device": "cpu", "checkpoint_every": 1, "max_length": 32,
        **changes,
    })  # fmt: skip


def quiet(text):
    pass


# ---------------------------------------------------------------- the parser


def test_the_pair_losses_are_those_of_bradley_terry_that_have_a_loss_of_one_list():
    assert config.PAIR_LOSSES == tuple(name for name in LOSS_TYPES if not name.startswith("aot"))


def test_help_has_examples_that_parse_and_needs_no_torch(capsys):
    with pytest.raises(SystemExit):
        main(["align", "--help"])
    help = capsys.readouterr().out.split("examples:")[1].replace("\\\n", "")  # a command may go on in the next line
    examples = re.findall(r"^ {4}\S.*", help, re.MULTILINE)
    assert len(examples) >= 5
    for example in examples:
        words = example.replace("accelerate launch --num_processes 2 -m mopl", "mopl").split()
        build_parser().parse_args(words[words.index("mopl") + 1 :])
    code = "import sys; from mopl.cli import main; main(['align', '--help'])"
    code = (
        f"import sys, contextlib\ntry:\n    exec({code!r})\nexcept SystemExit:\n    assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["align"], "--model is missing; pass --model and --data, or --demo"),
        (["align", "--model", "m", "--data", "d", "--beta", "0"], "beta is 0 but must be positive and finite"),
        (["align", "--model", "m", "--data", "d", "--loss", "kto"], "--loss is 'kto' but must be one of"),
        (["align", "--model", "m", "--data", "none.jsonl"], "there is no directory m, and no model of that name could"),
        (["align", "--resume"], "--resume needs the run to continue"),
        (["align", "--run", "none", "--resume"], "there is no run at none"),
    ],
)  # fmt: skip
def test_errors_are_one_line_with_a_remedy_and_leave_nothing_behind(tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(given, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--data", "none.jsonl"], "there is no file or directory"),
        (["--model", "./mode"], "there is no model ./mode; name a directory"),
        (["--objectives", "low", "middle", "--beta", "1", "1", "1"], "beta has 3 entries but there are 2 objectives"),
        (["--objectives", "low", "middle", "--teachers", "a", "--method", "distill"], "but there are 2 objectives"),
    ],
)
def test_what_can_be_known_before_data_are_read_is_said_then(place, tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    if "--data" not in given:
        monkeypatch.setattr("mopl.alignment.recipe.load_data", lambda config: pytest.fail("data were read"))
    assert message in error_of(arguments(place, "run", *given), capsys)


def test_a_training_that_diverges_says_what_to_do_about_its_run(place, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"run stays as it is: .* --overwrite .*--resume takes no other"):
        align(tiny(place, learning_rate=1e30), tmp_path / "run", say=quiet)
    assert (tmp_path / "run" / "config.json").is_file()


# ---------------------------------------------------------------- a whole run


def test_a_run_holds_everything_that_it_promises(run):
    for name in ("config.json", "log.jsonl", "table.txt", "front.png", "report.html", "reference/train.safetensors",
                 "reference/test.safetensors", "base/front.json"):  # fmt: skip
        assert (run / name).is_file(), name
    assert sorted(path.name for path in (run / "models").iterdir()) == [
        "modpo-0-1", "modpo-0.5-0.5", "modpo-1-0", "w-0-1", "w-0.5-0.5", "w-1-0",
    ]  # fmt: skip
    base = Front.load(run / "base" / "front.json")
    for method in config.METHODS:
        front = Front.load(run / method / "front.json")
        answering = front.parameters * 3 // 5 if method == "mo-dpo" else front.parameters  # without its two experts
        assert front.inference_parameters == base.inference_parameters + answering
        assert front.maximise is False and front.objectives == ["low", "middle"] and front.parameters > 0
        assert len([p for p in front.points if p.scale == 1.0]) == 3 and len(front.points) == 9
        samples = json.loads((run / method / "samples.json").read_text())
        assert [len(entry["responses"]) for entry in samples] == [3, 3] and samples[0]["method"] == method
        evaluation = json.loads((run / method / "evaluation.json").read_text())
        torch.testing.assert_close(
            torch.tensor(evaluation["losses"]), torch.tensor([p.auxiliary for p in front.points[:3]])
        )
        assert evaluation["spearman"].keys() == {"loss", "accuracy"} and len(evaluation["log_ratio"]["quartiles"]) == 3
    # No frozen model, and no checkpoints of what is finished.
    assert not list(run.rglob("checkpoints")) and not list(run.rglob("model.safetensors"))
    stages = {record["stage"] for record in read_log(run / "log.jsonl")}
    assert {"weight-cos-dpo", "temperature-cos-dpo", "w 0.5-0.5", "modpo 0.5-0.5"} <= stages
    last = read_log(run / "log.jsonl")[-1]
    assert {"loss", "learning_rate", "gradient_norm", "log_ratio"} <= last.keys()


def test_the_untrained_model_is_the_first_front_and_sets_the_reference_point(run):
    fronts = run_fronts(run)
    (point,) = fronts[0].points
    assert fronts[0].method == "base" and point.main == 0.0
    assert point.auxiliary == pytest.approx([np.log(3)] * 2)
    assert fronts[1].reference_point == pytest.approx([1.1 / np.log(2) * np.log(3)] * 2)
    (inside,) = {tuple(front.reference_point) for front in fronts}
    assert all(x < y for x, y in zip(point.auxiliary, inside, strict=True))


def test_terminal_output_ends_with_the_table_and_what_to_do_next(run, capsys):
    assert main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.strip() in (run / "table.txt").read_text()
    assert all(word in out.split("\n---")[0] for word in ("deviation", "from the", "reference", "(nats) ↓"))
    page = (run / "report.html").read_text()
    assert "held-out loss" in page and all(method in page for method in config.METHODS)
    samples = open_run(run).samples(run_fronts(run)[1:])
    assert samples["dpo-soup"][0][0]["prompt"] in page


def scores_of(model, run, weights=None, beta=None):
    ids = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 11, 12, 2]])
    labels = ids.masked_fill(torch.arange(5) < 2, -100)
    options = {} if weights is None else {"weights": torch.tensor(weights)}
    if beta is not None:
        options["beta"] = torch.tensor(beta)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return score_sequences(model, batch, **options).scores


def test_open_run_loads_every_method_for_its_weights(run):
    opened = open_run(run)
    assert opened.objectives == ("low", "middle") and opened.methods == config.METHODS
    assert opened.grid.tolist() == [[0, 1], [0.5, 0.5], [1, 0]] and len(opened.tokenizer) == VOCABULARY
    w = [0.5, 0.5]
    reference = scores_of(opened.base_model(), run)
    seen = {}
    for method in opened.methods:
        model = opened.load(method, w)
        assert (
            isinstance(model, HyperPromptModel) and not model.training and model.record.objectives == opened.objectives
        )
        beta = opened.beta if opened.takes_beta(method) else None
        seen[method] = scores_of(model, run, w, beta)
        assert not torch.equal(seen[method], reference)
        with model.reference():
            torch.testing.assert_close(scores_of(model, run, w, beta), reference)
    assert len({tuple(scores.tolist()) for scores in seen.values()}) == len(seen)
    conditioned = opened.load()
    assert not torch.equal(scores_of(conditioned, run, [1.0, 0.0]), scores_of(conditioned, run, [0.0, 1.0]))
    # At a vertex a soup is that expert, and so is dpo-ls.
    torch.testing.assert_close(
        scores_of(opened.load("dpo-soup", [1.0, 0.0]), run, w), scores_of(opened.load("dpo-ls", [1.0, 0.0]), run, w)
    )
    with pytest.raises(ValueError, match=r"none for 0\.2 0\.8; the nearest is 0 1"):
        opened.load("dpo-ls", [0.2, 0.8])
    with pytest.raises(ValueError, match="pass weights, one for each of low, middle"):
        opened.load("mo-dpo")
    with pytest.raises(ValueError, match="has no ppo"):
        opened.load("ppo")


def test_a_soup_is_the_average_of_the_trained_parameters(run):
    opened = open_run(run)
    from safetensors.torch import load_file

    folders = [model_folder(run, "dpo-soup", w) for w in ((1, 0), (0, 1))]
    files = ("adapter_model.safetensors", "hyper_prompt.safetensors")
    experts = [load_file(folder / files[0]) | load_file(folder / files[1]) for folder in folders]
    mixed = steering.soup(experts, [0.3, 0.7])
    model = opened.load("dpo-soup", [0.3, 0.7])
    torch.testing.assert_close(model.hyper_prompt.prefix.detach(), mixed["prefix"])
    key = next(name for name in mixed if name.endswith("lora_B.weight"))
    own = dict(model.model.named_parameters())
    (value,) = (p for name, p in own.items() if name.replace(".default", "") == key)
    torch.testing.assert_close(value.detach(), mixed[key])


def test_front_json_is_what_the_loaded_model_gives_on_the_held_out_lists(run):
    from mopl.alignment.recipe import load_data
    from mopl.language_models.tokenization import tokenize
    from mopl.losses import listwise_dpo

    opened = open_run(run)
    held_out = load_data(opened.config)["test"]
    base, model = opened.base_model(), opened.load("weight-cos-dpo")
    losses, w = [], [1.0, 0.0]
    for item in tokenize(held_out, opened.list_tokenizer):
        found = []
        for each, options in ((model, {"weights": torch.tensor(w)}), (base, {})):
            rows = [torch.tensor(np.concatenate([item.prompt, r]))[None] for r in item.responses]
            logits = [each(row, torch.ones_like(row), **options).logits.log_softmax(-1)[0, :-1] for row in rows]
            first = len(item.prompt) - 1
            found.append(torch.stack([
                x[first:].gather(-1, row[0, first + 1 :, None]).sum() for x, row in zip(logits, rows, strict=True)
            ]))  # fmt: skip
        losses.append(
            listwise_dpo(found[0][None], torch.tensor(item.labels)[None], reference=found[1][None], beta=0.1,
                         normalize="softmax", reduction="none").detach()
        )  # fmt: skip
    front = Front.load(run / "weight-cos-dpo" / "front.json")
    (point,) = (p for p in front.points if p.weights == w and p.scale == 1.0)
    assert point.auxiliary == pytest.approx(torch.cat(losses).mean(0).tolist(), rel=1e-4)
    assert len(losses) == 6 and not any(p.requires_grad for p in model.parameters())


def test_a_finished_run_is_kept_unless_asked_and_its_settings_bind(place, run, capsys):
    message = error_of(arguments(place, run, "--method", "all"), capsys)
    assert "--resume" in message and "--overwrite" in message
    before = {path: path.stat().st_mtime_ns for path in run.rglob("front.json")}
    assert main(["align", "--run", str(run), "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("front.json")} == before
    capsys.readouterr()
    assert "beta was (0.1,), is (0.2,)" in error_of(["align", "--run", str(run), "--resume", "--beta", "0.2"], capsys)


def lines_of(place, **changes):
    """The rows of the data, the third one changed."""
    rows = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
    rows[2].update(changes)
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_equal_labels_stop_a_run_that_begins_and_none_that_goes_on():
    """Earlier versions allowed them; held-out lists are few, and need not differ."""
    lists = [PreferenceList("p", ("a", "b"), {"low": [1, 2], "equal": [1, 1]})]
    splits = {name: types.SimpleNamespace(data=PreferenceData(lists)) for name in ("train", "test")}
    stages = Stages.__new__(Stages)
    stages.splits, stages.config = splits, types.SimpleNamespace(teachers=())
    with pytest.raises(ValueError, match="objective 'equal' prefers nothing: in none of the 1 training lists"):
        stages.check(begins=True)
    with pytest.raises(AttributeError):  # what is checked next is not there
        stages.check(begins=False)
    differ = PreferenceData([PreferenceList("p", ("a", "b"), {"low": [1, 2], "equal": [1, 2]})])
    splits["train"] = types.SimpleNamespace(data=differ)
    with pytest.raises(AttributeError):
        stages.check(begins=True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "nowhere"], "there is no directory nowhere"),
        (["--model", "./nowhere"], "there is no model ./nowhere"),
        (["--model", "{place}"], "holds no model: it has no config.json"),
        (["--data", "nowhere.txt"], "there is no file or directory nowhere.txt"),
        (["--lora-targets", "nosuch"], "nosuch"),
        (["--reference", "./nosuch"], "there is no model ./nosuch"),
        (["--objectives", "low", "absent"], "has no labels in any of the"),
        (["--objectives", "low", "equal"], "objective 'equal' prefers nothing: in none of the"),
        (["--objectives", "low,middle"], "give each name as a word of its own: low middle"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(place, tmp_path, capsys, more, message):
    data = tmp_path / "data.jsonl"
    third = {"low": [1, 2, 3], "middle": [0, 1, 0], "absent": [1, None, 2], "equal": [1, None, 1]}
    data.write_text(lines_of(place, labels=third))
    given = arguments(place, tmp_path / "run", "--data", str(data), "--objectives", "low", "middle")
    given += [word.format(place=place) for word in more]
    assert message in error_of(given, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": {"low": [1e39, 1, 1]}}, "label is too large (line 3"),
        ({"labels": {"low": [1, 2]}}, "--on-error skip"),
        (b"\xff\xfe\x00", "data.jsonl is no UTF-8 text"),
    ],
)
def test_unusable_rows_are_named_with_their_file(place, tmp_path, capsys, content, message):
    data = tmp_path / "data.jsonl"
    data.write_bytes(lines_of(place, **content).encode() if isinstance(content, dict) else content)
    assert message in error_of(arguments(place, tmp_path / "run", "--data", str(data)), capsys)


def test_generation_refuses_what_is_no_sampling(run, capsys):
    for more, message in (
        (["--temperature", "0"], "temperature is 0 but must be positive"),
        (["--top-p", "2"], "--top-p is 2 but must be above 0 and at most 1"),
        (["--chat"], "leave out --chat"),
    ):
        assert message in error_of(["generate", str(run), "--weights", "0.5", "0.5", "w1", *more], capsys)


def test_prompts_without_room_are_refused_and_no_samples(place, run, tmp_path, capsys):
    given = ["generate", str(run), "--weights", "0.5", "0.5"]
    assert "pass --max-new-tokens 54 or less" in error_of([*given, "w1 w2", "--max-new-tokens", "55"], capsys)
    assert "shorten the prompt" in error_of([*given, "w1 " * 60], capsys)
    rows = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
    long = [{**row, "prompt": f"{row['prompt']} " + "w1 " * (45 if i % 2 else 1)} for i, row in enumerate(rows)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    settings = tiny(place, data=str(tmp_path / "long.jsonl"), max_length=56, sample_tokens=20, samples=30)
    path = align(settings, tmp_path / "run", say=quiet)
    prompts = [entry["prompt"] for entry in json.loads((path / "samples.json").read_text())]
    assert prompts and all(len(prompt.split()) < 10 for prompt in prompts)


def test_a_model_that_has_moved_and_broken_files_are_named(place, tmp_path, capsys):
    write_model(tmp_path, "old")
    path = align(tiny(place, model=str(tmp_path / "old")), tmp_path / "run", say=quiet)
    (tmp_path / "old").rename(tmp_path / "new")
    capsys.readouterr()
    for target in (path, path / "model"):
        given = ["generate", str(target), "--weights", "0.5", "0.5", "w1", "--max-new-tokens", "2"]
        assert "name its new place with --base-model" in error_of(given, capsys)
        assert main([*given, "--base-model", str(tmp_path / "new")]) == 0
        capsys.readouterr()
    given = ["generate", str(path), "--weights", "0.5", "0.5", "w1", "--base-model", str(tmp_path / "new")]
    (path / "model" / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in error_of(given, capsys)
    (path / "config.json").write_text("{")
    assert "config.json: it is not JSON" in error_of(given, capsys)


# ---------------------------------------------------------------- other ways


def test_an_interrupted_run_continues_to_the_same_bits(place, tmp_path, ctrl_c):
    settings = tiny(place, steps=4, method="dpo-soup")
    whole = align(settings, tmp_path / "whole", say=quiet)
    seen = []

    def stop_in_the_second_expert(text):
        if text.startswith("w 1-0"):  # the first of the two is done
            seen.append(text)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunInterrupted, match=r"mopl align --run .* --resume"):
        align(settings, tmp_path / "cut", say=stop_in_the_second_expert)
    assert seen and not (tmp_path / "cut" / "front.json").exists()
    align(settings, tmp_path / "cut", resume=True, say=quiet)
    for name in ("models/w-0-1", "models/w-1-0"):
        for file in ("adapter_model.safetensors", "hyper_prompt.safetensors"):
            assert (whole / name / file).read_bytes() == (tmp_path / "cut" / name / file).read_bytes()
    one, two = (json.loads((path / "front.json").read_text())["points"] for path in (whole, tmp_path / "cut"))
    assert one == two


@pytest.mark.slow
def test_ctrl_c_in_a_shell_exits_130_and_resume_gives_the_same_bits(place, tmp_path):
    given = arguments(place, tmp_path / "cut", "--steps", "60", "--checkpoint-every", "3", "--samples", "0")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mopl.cli", *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    folder, deadline = tmp_path / "cut" / "model" / "checkpoints", time.time() + 120
    while time.time() < deadline and not list(folder.glob("step-*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err
    assert main(["align", "--run", str(tmp_path / "cut"), "--resume"]) == 0
    whole = [word if word != str(tmp_path / "cut") else str(tmp_path / "whole") for word in given]
    assert main(whole) == 0
    one, two = ((tmp_path / name / "model" / "adapter_model.safetensors").read_bytes() for name in ("cut", "whole"))
    assert one == two


def test_weights_in_words_train_evaluate_and_answer(place, tmp_path):
    path = align(tiny(place, conditioning="text", steps=8, learning_rate=1e-2), tmp_path / "text", say=quiet)
    opened = open_run(path)
    assert opened.text_prompt().render([0.5, 0.5]) == "[low: 0.50, middle: 0.50]\n"
    model = opened.load()
    assert not isinstance(model, HyperPromptModel) and json.loads((path / "model" / "mopl.json").read_text())["kind"]
    assert opened.config.reference == "precomputed" and len(opened.methods) == 1
    points = Front.load(path / "front.json").points
    assert points[0].main > 0


def test_another_model_can_be_the_reference_if_it_knows_the_same_tokens(place, tmp_path):
    other = write_model(tmp_path, "other", seed=5)
    path = align(tiny(place, reference=str(other)), tmp_path / "run", say=quiet)
    from safetensors.torch import load_file

    own = align(tiny(place), tmp_path / "own", say=quiet)
    a, b = (load_file(each / "reference" / "test.safetensors")["scores"] for each in (path, own))
    assert not torch.equal(a, b)
    assert json.loads((path / "model" / "mopl.json").read_text())["reference"] == str(other)
    foreign = write_model(tmp_path, "foreign", words=40)
    with pytest.raises(ValueError, match="another vocabulary"):
        align(tiny(place, reference=str(foreign)), tmp_path / "fails", say=quiet)


def test_pairs_train_with_pair_losses_and_packed_batches(tmp_path, place):
    write_data(tmp_path / "pairs.jsonl", size=2)
    settings = tiny(place, data=str(tmp_path / "pairs.jsonl"), loss="ipo", reference="self", packing=True, points=3)
    path = align(settings, tmp_path / "run", say=quiet)
    assert not (path / "reference" / "train.safetensors").exists()
    front = Front.load(path / "front.json")
    base = Front.load(path / "base" / "front.json").points[0].auxiliary
    assert base == pytest.approx([25.0 * share for share in _untied(tmp_path / "pairs.jsonl", open_run(path))])
    assert all(np.isfinite(point.auxiliary).all() for point in front.points)


def _untied(file, opened):
    """Share of held-out pairs that each objective has a preference on; IPO's loss of the others is 0."""
    from mopl.alignment.recipe import load_data

    held_out = load_data(opened.config)["test"]
    labels = np.stack([held_out.label_array(i) for i in range(len(held_out))])
    return (labels[:, :, 0] != labels[:, :, 1]).mean(0)


def test_a_changed_model_or_changed_data_is_refused_on_resume(tmp_path):
    write_model(tmp_path)
    write_data(tmp_path / "data.jsonl")
    path = align(tiny(tmp_path), tmp_path / "run", say=quiet)
    write_model(tmp_path, seed=9)
    with pytest.raises(ValueError, match="log-probabilities of another model"):
        align(tiny(tmp_path), path, resume=True, say=quiet)
    write_data(tmp_path / "data.jsonl", seed=4)
    with pytest.raises(ValueError, match=r"the data of .* is not what it was"):
        align(tiny(tmp_path), path, resume=True, say=quiet)


def test_sequences_longer_than_the_model_are_refused_before_anything_is_written(tmp_path, place):
    long = {"prompt": "w1 " * 40, "responses": ["w1 " * 20, "w2 " * 20], "labels": {"low": [1, 0]}}
    (tmp_path / "long.jsonl").write_text(
        "".join(json.dumps({**long, "prompt": f"w{i} " * 40}) + "\n" for i in range(4))
    )
    with pytest.raises(ValueError, match="knows 64 positions; pass max_length=56 or less"):
        align(tiny(place, data=str(tmp_path / "long.jsonl"), max_length=200, points=1), tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists()


def test_the_demo_brings_model_data_and_settings_and_options_still_count(place, tmp_path, monkeypatch, capsys):
    demo = types.ModuleType("mopl.alignment.demo")
    made = {
        "model": str(place / "model"), "data": str(place / "data.jsonl"), "objectives": ("middle", "low"),
        "steps": 2, "lists_per_batch": 4, "points": 2, "samples": 0, "bootstrap": 0, "beta": (0.3,),
    }  # fmt: skip
    demo.describe_answers = lambda path, say: say(f"judged {path}")
    demo.prepare = lambda directory, say: (say(f"made in {directory}"), made)[1]
    monkeypatch.setitem(sys.modules, "mopl.alignment.demo", demo)
    monkeypatch.chdir(tmp_path)
    assert main(["align", "--demo", "--beta", "0.7", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "made in runs/align-demo-data" in out
    opened = open_run("runs/align-demo")
    assert opened.objectives == ("middle", "low") and opened.config.beta == (0.7,) and opened.config.steps == 2
    (hint,) = (line for line in out.splitlines() if line.startswith("  mopl generate"))
    assert hint.strip().split("    ")[0] == "mopl generate runs/align-demo --weights 0.5 0.5 PROMPT"
    assert out.splitlines()[-2] == "judged runs/align-demo" and out.splitlines()[-1].startswith("open runs/align-demo/")

    kept = Path("runs/align-demo/front.json").read_bytes()  # the same command again has nothing left to do
    assert main(["align", "--demo", "--beta", "0.7", "--device", "cpu"]) == 0
    assert "2 steps in" not in capsys.readouterr().out and Path("runs/align-demo/front.json").read_bytes() == kept


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("reference", ["self", "precomputed"])
def test_two_processes_make_the_run_of_one(place, tmp_path, reference):
    given = arguments(place, tmp_path / "two", "--reference", reference, "--learning-rate", "0.01")
    done = launch_mopl(*given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("weight-cos-dpo: 4 steps") == 1  # one process speaks
    assert main(arguments(place, tmp_path / "one", "--reference", reference, "--learning-rate", "0.01")) == 0
    one, two = (Front.load(tmp_path / name / "front.json").tensors() for name in ("one", "two"))
    torch.testing.assert_close(two[2], one[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two[1], one[1], rtol=1e-2, atol=1e-3)
    assert float(one[1].max()) > 0.01  # something was learned
