"""Damaged models, checkpoints, scores and caches: named in one line where they are needed, else made again."""

import json
import pickle
import shutil
import signal
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("moocore")

from damage import changed, complaint, fifo, paths, replaced, run, whole
from tiny_language_models import build, tokenizer

from mopl._records import DamagedFile
from mopl._tensor_files import load_state, read_tensors
from mopl.cli import main
from mopl.conditioning.saved_models import read_record
from mopl.experiments import run_fronts
from mopl.experiments.stages import Trained
from mopl.training import read_log

RANK = [
    "--data", "synthetic:queries=60,items=6,features=8,objectives=2", "--hidden", "8", "--base-hidden", "8", "--heads",
    "2", "--steps", "4", "--base-steps", "3", "--batch-size", "8", "--bootstrap", "10", "--points", "3",
]  # fmt: skip
ALIGN = [
    "--steps", "2", "--lists-per-batch", "4", "--points", "2", "--bootstrap", "10", "--samples", "1", "--sample-tokens",
    "3", "--held-out", "0.2", "--device", "cpu", "--max-length", "32",
]  # fmt: skip
CLP = [
    "--steps", "2", "--prompts-per-step", "2", "--samples-per-prompt", "2", "--max-new-tokens", "3", "--points", "2",
    "--normalize-prompts", "4", "--bootstrap", "10", "--held-out", "0.2", "--samples", "1", "--lora-rank", "2",
    "--device", "cpu", "--rewards", "length", "brevity",
]  # fmt: skip
W = ["--weights", "0.5", "0.5"]
ANSWER = [*W, "w1 w2", "--max-new-tokens", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a language model, data, prompts, and a finished run of each kind."""
    folder = tmp_path_factory.mktemp("damaged")
    build(initializer_range=0.1).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    rows = []
    for _ in range(20):
        words = random.integers(0, 40, (2, 3))
        rows.append({
            "prompt": f"w{random.integers(40)}", "responses": [" " + " ".join(f"w{w}" for w in each) for each in words],
            "labels": {"low": [float((each < 20).sum()) for each in words],
                       "even": [float((each % 2 == 0).sum()) for each in words]},
        })  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(20)))
    assert main(["rank", "--run", str(folder / "rank"), *RANK]) == 0
    assert main(["rank", "--run", str(folder / "soup"), *RANK, "--method", "dpo-soup"]) == 0
    model = ["--model", str(folder / "model")]
    data = ["--data", str(folder / "data.jsonl")]
    assert main(["align", *model, *data, "--run", str(folder / "align"), *ALIGN]) == 0
    assert main(["align", *model, *data, "--run", str(folder / "soups"), *ALIGN, "--method", "dpo-soup"]) == 0
    mixed = ["--conditioning", "lora-mixture"]
    assert main(["align", *model, *data, "--run", str(folder / "mixture"), *ALIGN, *mixed]) == 0
    prompts = ["--data", str(folder / "prompts.jsonl")]
    for name, scope in (("lora", "lora-mixture"), ("attention", "attention")):
        command = [
            "align",
            *model,
            *prompts,
            "--run",
            str(folder / name),
            *CLP,
            "--method",
            "clp",
            "--scope",
            {"lora": "lora-mixture"}.get(scope, scope),
        ]
        assert main(command) == 0
    return folder


def commands(place: Path, run: str) -> list[list[str]]:
    """Return commands that read the files of a run."""
    path = str(place / run)
    if run in ("rank", "soup"):
        return [["steer", path, *W], ["report", path], ["rank", "--run", path, "--resume"]]
    return [["generate", path, *ANSWER], ["report", path], ["align", "--run", path, "--resume"]]


def of_tensors(file: Path, other: Path) -> dict[str, bytes]:
    """Return damaged safetensors files, by what was done."""
    good, found = file.read_bytes(), {}
    size = int.from_bytes(good[:8], "little")
    head = json.loads(good[8 : 8 + size])
    name = next(key for key in head if key != "__metadata__")
    state = load_file(str(file))
    scratch = file.with_name("scratch")

    def saved(tensors: dict[str, torch.Tensor]) -> bytes:
        save_file(tensors, str(scratch), metadata=head.get("__metadata__"))
        content = scratch.read_bytes()
        scratch.unlink()
        return content

    def headed(header: dict[str, object]) -> bytes:
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + size :]

    found["empty"], found["half"], found["almost"] = b"", good[: len(good) // 2], good[:-1]
    found["random"], found["json"] = bytes(range(256)) * 10, b"{}"
    found["swapped"] = other.read_bytes()
    found["no such size"] = b"\xff" * 8 + good[8:]
    first = state[name]
    found["one missing"] = saved({key: value for key, value in state.items() if key != name})
    found["one more"] = saved({**state, "more": torch.zeros(2)})
    found["another shape"] = saved({**state, name: torch.zeros(*first.shape, 2)})
    found["larger"] = saved({**state, name: torch.zeros([2 * n for n in first.shape])})
    found["not a number"] = saved({**state, name: torch.full_like(first, float("nan"))})
    claimed = {**head[name], "shape": [n * 1000 for n in head[name]["shape"]]}
    found["header says another shape"] = headed({**head, name: claimed})
    found["header nested"] = headed({**head, name: {**head[name], "shape": [[1]]}})
    return found


def assert_named(file: Path, cases: dict[str, bytes | str], todo: list[list[str]], *, harmless: tuple[str, ...] = ()):
    """Damage a file in many ways: at least one of the commands must refuse each, and none may say anything else."""
    wrong = {}
    for what, content in cases.items():
        with replaced(file, content):
            found = [complaint(command, file) for command in todo]
            if not any(found) and what not in harmless and all(run(command)[0] == 0 for command in todo):
                found = ["nobody noticed"]
        wrong |= {f"{what} {i}": text for i, text in enumerate(found) if text is not None}
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())


# The file, a file of another model, and which of the commands of its run reads it.
TENSORS = [
    ("rank/model.safetensors", "rank/base/model.safetensors", 0),
    ("rank/base/model.safetensors", "rank/model.safetensors", 2),
    ("rank/reference.safetensors", "rank/base/model.safetensors", 0),
    ("soup/models/w-1-0/model.safetensors", "rank/model.safetensors", 0),
    ("align/model/hyper_prompt.safetensors", "align/model/adapter_model.safetensors", 0),
    ("align/model/adapter_model.safetensors", "align/model/hyper_prompt.safetensors", 0),
    ("align/reference/test.safetensors", "rank/reference.safetensors", 2),
    ("soups/models/w-0-1/adapter_model.safetensors", "soups/models/w-0-1/hyper_prompt.safetensors", 0),
    ("soups/models/w-1-0/hyper_prompt.safetensors", "rank/model.safetensors", 0),
    ("mixture/model/low/adapter_model.safetensors", "align/model/hyper_prompt.safetensors", 0),
    ("lora/model/brevity/adapter_model.safetensors", "align/model/adapter_model.safetensors", 0),
    ("attention/model/parameter_mixture.safetensors", "align/model/adapter_model.safetensors", 0),
]


@pytest.mark.parametrize(("name", "other", "which"), TENSORS)
@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_damaged_tensors_are_named(place, name, other, which, thorough):
    cases = of_tensors(place / name, place / other)
    few = ("almost", "swapped", "not a number") if which == 0 else ("swapped",)
    cases = cases if thorough else {what: cases[what] for what in few}
    assert_named(place / name, cases, [commands(place, name.split("/")[0])[which]])


RECORDS = [
    ("rank/model.json", 0), ("rank/base/model.json", 2), ("soup/models/w-1-0/model.json", 0),
    ("rank/evaluation.json", 1), ("align/model/mopl.json", 0), ("align/model/adapter_config.json", 0),
    ("mixture/model/mopl.json", 0), ("align/samples.json", 1), ("align/config.json", 0), ("align/front.json", 0),
    ("lora/model/mopl.json", 0), ("lora/rewards.json", 2), ("lora/config.json", 0), ("attention/model/mopl.json", 0),
]  # fmt: skip
MODELS = ("model.json", "mopl.json", "adapter_config.json", "rewards.json")  # whose every key is damaged


@pytest.mark.parametrize(("name", "which"), RECORDS)
def test_damaged_records_are_named(place, name, which):
    cases: dict[str, bytes | str] = dict(whole((place / name).read_bytes()))
    few = ("half", "null", "deep") if which == 0 else ("null",)
    assert_named(place / name, {what: cases[what] for what in few}, [commands(place, name.split("/")[0])[which]])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "which"), [record for record in RECORDS if record[0].endswith(MODELS)])
def test_every_key_of_a_record_may_be_anything(place, name, which):
    """Nothing but a line that names the file comes of it, or work as before where the key is not needed."""
    file, wrong = place / name, {}
    command = commands(place, name.split("/")[0])[which]
    for path in paths(json.loads(file.read_text())):
        for new in (None, 10**18, "x") if path else ():
            with replaced(file, changed(file.read_text(), path, new)):
                # Another word may be right by its type, and another place or model by its name.
                wrong[f"{path} {new}"] = complaint(command, file, named=new != "x")
    wrong = {what: text for what, text in wrong.items() if text is not None}
    assert not wrong, "\n".join(f"{what}: {text}" for what, text in wrong.items())


@pytest.mark.parametrize("name", ["align", "lora"])
def test_every_setting_of_a_language_model_run_may_be_anything(place, name):
    file, wrong = place / name / "config.json", {}
    for path in paths(json.loads(file.read_text())):
        for new in ([[1]], 10**18) if path else ():
            with replaced(file, changed(file.read_text(), path, new)):
                try:
                    run_fronts(place / name)
                except ValueError as error:
                    wrong |= {} if str(file) in str(error) else {f"{path} {new}": str(error)}
    assert not wrong


def test_a_finished_training_says_how_long_it_took_or_is_named(place):
    file = place / "rank" / "base" / "training.json"
    assert Trained.read(file.parent).steps == 3
    for content, said in (
        ('{"steps": 3}', "seconds is missing"), ('{"steps": -1, "seconds": 1}', "steps is -1 but must be int >= 0"),
        ('{"steps": 3, "seconds": NaN}', "seconds is NaN but must be float >= 0"),
        ("[]", "it is a list of 0 but must be object"),
    ):  # fmt: skip
        with (
            replaced(file, content),
            pytest.raises(DamagedFile, match="--resume then trains that model again") as raised,
        ):
            Trained.read(file.parent)
        assert str(raised.value).startswith(f"{file}: {said}")


@pytest.fixture
def stopped(place, tmp_path, monkeypatch) -> Path:
    """A ranking run that was stopped between two checkpoints' steps."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run"
    shutil.copytree(place / "rank", path)
    for name in ("front.json", "training.json", "model.safetensors"):
        (path / name).unlink()
    from mopl.ranking import methods

    before, calls = methods.ListSource.__call__, []

    def stop(self, step, part, parts):
        calls.append(step)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return before(self, step, part, parts)

    with monkeypatch.context() as patch:
        patch.setattr(methods.ListSource, "__call__", stop)
        assert main(["rank", "--run", str(path), "--resume"]) == 130
    return path


def test_damaged_checkpoints_are_named(place, stopped):
    (folder,) = (stopped / "checkpoints").glob("step-*")
    command = ["rank", "--run", str(stopped), "--resume"]
    file = folder / "model.safetensors"
    cases = of_tensors(file, place / "rank" / "base" / "model.safetensors")
    assert_named(file, {what: cases[what] for what in ("half", "swapped", "not a number")}, [command])
    file = folder / "optimizer.pt"
    good = torch.load(file, weights_only=True)
    state = good["optimizer"]["state"]
    content = file.read_bytes()

    def saved(value: object) -> bytes:
        torch.save(value, folder / "scratch")
        made = (folder / "scratch").read_bytes()
        (folder / "scratch").unlink()
        return made

    assert_named(file, {
        "empty": b"", "half": content[: len(content) // 2], "random": bytes(range(256)) * 9, "list": saved([1]),
        "code": pickle.dumps(print), "no optimizer": saved({}), "no groups": saved({"optimizer": {"state": {}}}),
        "other groups": saved({**good, "optimizer": {**good["optimizer"], "param_groups": []}}),
        "other shapes": saved({**good, "optimizer": {**good["optimizer"], "state": {
            number: {**values, "exp_avg": torch.zeros(3, 5)} for number, values in state.items()}}}),
        "no best step": saved({**good, "selection": {**good["selection"], "step": 2, "kept": {}}}),
        "best step": saved({**good, "selection": {**good["selection"], "waited": "long"}}),
    }, [command])  # fmt: skip
    file = folder / "state.json"
    text = file.read_text()
    assert_named(file, {
        "empty": b"", "null": b"null", "no step": changed(text, ("step",), remove=True),
        "another step": changed(text, ("step",), 1), "seconds": changed(text, ("seconds",), "NaN"),
        "settings": changed(text, ("config",), []), "flag": changed(text, ("save_frozen",), "yes"),
    }, [command])  # fmt: skip
    log = stopped / "log.jsonl"
    lines = log.read_text()
    assert_named(log, {"line": "{\n" + lines, "list": "[]\n" + lines, "step": '{"step": []}\n' + lines}, [command])
    with replaced(log, "{\n"), pytest.raises(DamagedFile, match=r"log.jsonl: line 1: it is not JSON"):
        read_log(log)
    assert run(command)[0] == 0


def test_a_damaged_cache_is_made_again_with_a_note(tmp_path):
    from mopl.ranking.array_cache import ArrayCache

    source = tmp_path / "data.txt"
    source.write_text("1 qid:1 1:2\n")
    cache = ArrayCache(source, tmp_path / "cache")
    cache.save({"x": np.arange(100)})
    (folder,) = (tmp_path / "cache").iterdir()
    generator = np.random.default_rng(0)
    for trial in range(60):
        file = folder / ("x.npy", "stamp.json")[trial % 2]
        good = file.read_bytes()
        bad = bytearray(good)
        for place in generator.integers(0, len(bad), 4):
            bad[place] ^= 1 << int(generator.integers(8))
        file.write_bytes(bytes(bad) if trial % 3 else bytes(bad[: int(generator.integers(len(bad)))]))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = cache.load(["x"])
        if found is not None and not np.array_equal(found["x"], np.arange(100)):
            pytest.fail("damaged numbers were taken")
        assert found is not None or not said or "the data is parsed again" in str(said[0].message)
        file.write_bytes(good)
    fifo(folder / "x.npy")
    with pytest.warns(UserWarning, match="pipe or a device.*parsed again"):
        assert cache.load(["x"]) is None


def test_a_damaged_cache_of_measured_kernels_is_left_out_with_a_note(tmp_path):
    choice = pytest.importorskip("mopl.ops.linear_logprob.choice")
    file = tmp_path / "linear_logprob.json"
    for content in ("[]", '{"key": 1}', "[" * 100_000, "\0"):
        file.write_text(content)
        choice._choices.cache_clear()
        with pytest.warns(UserWarning, match=r"linear_logprob.json: .*it is measured again"):
            assert choice._choices(file) == {}
    choice._choices.cache_clear()


def test_damaged_rollouts_are_named(tmp_path):
    from mopl.clp.rollout import Rollout, RolloutStore

    rollout = Rollout(
        0, [[1]], [[2]], ["w"], ["w"], torch.zeros(1, 2), torch.ones(1, 2) / 2, torch.ones(1), torch.ones(1)
    )
    content = msgspec.structs.asdict(rollout)
    content["alpha"] = content.pop("kl_weight")  # the files keep their first name
    file = tmp_path / "step.pt"
    torch.save(content, file)
    assert RolloutStore._read(file).texts == ["w"]
    for wrong in (
        [],
        {},
        {**content, "more": 1},
        {**content, "rewards": None},
        {**content, "weights": torch.ones(2, 2)},
    ):
        torch.save(wrong, file)
        with pytest.raises(DamagedFile, match=r"step.pt: .*--resume then goes on from an older one"):
            RolloutStore._read(file)


def test_an_adapter_outside_of_the_folder_is_refused(place):
    file = place / "align" / "model" / "mopl.json"
    for name in ("../../lora/model/brevity", "/tmp", "a\0b"):
        with replaced(file, changed(file.read_text(), ("adapter",), name)):
            with pytest.raises(DamagedFile, match="is not inside of the folder"):
                read_record(file.parent, "HyperPromptModel")


def test_tensors_that_share_their_memory_are_loaded_and_others_are_missed(tmp_path):
    from safetensors.torch import save_model

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight

    saved, file = Tied(), tmp_path / "m.safetensors"
    save_model(saved, str(file))
    loaded = Tied()
    load_state(loaded, file)
    assert torch.equal(loaded.two.weight, saved.one.weight)
    save_file({"one.weight": saved.one.weight.detach()}, str(file))
    with pytest.raises(DamagedFile, match=r"it lacks 'two.weight'"):
        load_state(loaded, file)
    with pytest.raises(DamagedFile, match=r"is \(2, 2\) but must be \(2, 3\)"):
        read_tensors(file, {"one.weight": (2, 3)})
