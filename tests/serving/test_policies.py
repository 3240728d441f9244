"""What a trainer has a server load: one policy after another, around a base that stays what it is."""

import json
import os
import pickle
import shutil

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("uvicorn")

from clp_problems import disturbed, language_model, settings
from safetensors.torch import load_file, save_file
from served_models import running
from tiny_language_models import tokenizer

from mopl.clp.policies import new_policy
from mopl.language_models.tokenization import ListTokenizer
from mopl.serving.policies import PolicyFolder


def cut(file):
    save_file({name: value[..., :1].contiguous() for name, value in load_file(file).items()}, file)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    "rank": ("lora-mixture", lambda folder: edit(folder / "first" / "adapter_config.json", r=7)),
    "second": ("lora-mixture", lambda folder: cut(folder / "second" / "adapter_model.safetensors")),
    "bias": ("lora-mixture", lambda folder: edit(folder / "first" / "adapter_config.json", bias="all")),
    "initial": (
        "lora-mixture",
        lambda folder: edit(folder / "second" / "adapter_config.json", init_lora_weights="olora"),
    ),
    "prompt": ("hyper-prompt", lambda folder: cut(folder / "hyper_prompt.safetensors")),
    "shares": ("attention", lambda folder: cut(next(folder.glob("*.safetensors")))),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    encoder = ListTokenizer(tokenizer(), max_length=None, append_eos=False)
    policies = PolicyFolder(folder, language_model(), encoder, name="base")
    for scope in {scope for scope, _ in DAMAGES.values()}:
        for name in (scope, f"{scope}-bad"):
            policy = new_policy(language_model(), settings(scope=scope), ("first", "second"), "clp")
            disturbed(policy).model.save_pretrained(folder / name)
    with running(policies.plain) as made:
        made.api.policies = policies
        yield made


def load(server, name):
    return server.http.post("/v1/load_policy", json={"name": name, "path": name})


def answer(server, name, **more):
    body = {"model": name, "prompt": [1, 7], "max_tokens": 4, "logprobs": 0, "seed": 3, "return_token_ids": True}
    said = server.http.post("/v1/completions", json=body | more).json()["choices"][0]
    return said["token_ids"], said["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_after_a_load_that_failed_all_is_as_it_was_and_the_next_policy_is_taken(server, damage):
    (scope, act), folder = DAMAGES[damage], server.api.policies.folder
    base = server.api.policies.plain.model
    kept = {name: value.clone() for name, value in base.state_dict().items()}
    modules = [(name, type(module)) for name, module in base.named_modules()]
    assert load(server, scope).status_code == 200
    good = answer(server, scope, weights=[0.25, 0.75])
    bad = folder / f"{scope}-bad"
    saved = {file: file.read_bytes() for file in bad.rglob("*") if file.is_file()}
    act(bad)
    refused = load(server, bad.name)
    for file, content in saved.items():
        file.write_bytes(content)
    assert refused.status_code == 400, refused.text
    assert modules == [(name, type(module)) for name, module in base.named_modules()]
    assert all(value.equal(kept[name]) for name, value in base.state_dict().items())
    assert answer(server, scope, weights=[0.25, 0.75]) == good, "what was there before answers"
    assert load(server, scope).status_code == 200
    assert answer(server, scope, weights=[0.25, 0.75]) == good
    assert load(server, bad.name).status_code == 200, "mended, it is taken"


class Ran:
    """Says in a file that a pickle was executed."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def adapter(folder):
    return folder / "second" / "adapter_model.safetensors"


def pickled(folder):
    adapter(folder).unlink()
    adapter(folder).with_suffix(".bin").write_bytes(pickle.dumps(Ran(folder.parent / "ran")))


def moved_out(outside, path):
    kept = outside / path.name
    os.replace(path, kept)
    path.symlink_to(kept)


TROUBLES = {
    "cut off": (lambda folder, outside: adapter(folder).write_bytes(adapter(folder).read_bytes()[:-9]), "safetensors"),
    "not a number": (
        lambda folder, outside: save_file(
            {name: value * float("nan") for name, value in load_file(adapter(folder)).items()}, adapter(folder)
        ),
        "NaN or infinite",
    ),
    "a folder": (lambda folder, outside: (adapter(folder).unlink(), adapter(folder).mkdir()), "a folder but must be"),
    "a pipe": (lambda folder, outside: (adapter(folder).unlink(), os.mkfifo(adapter(folder))), "is no file"),
    "a pickle": (lambda folder, outside: pickled(folder), "adapter_model.bin is neither JSON nor safetensors"),
    "code": (lambda folder, outside: (folder / "modeling.py").write_text("1"), "neither JSON nor safetensors"),
    "a link to a file": (lambda folder, outside: moved_out(outside, adapter(folder)), "is a link"),
    "a link to a folder": (lambda folder, outside: moved_out(outside, folder / "second"), "second is a link"),
    "missing": (lambda folder, outside: adapter(folder).unlink(), "holds no adapter_model.safetensors"),
    "another kind": (lambda folder, outside: edit(folder / "mopl.json", kind="TextPromptModel"), "is one of"),
    "no kind": (lambda folder, outside: edit(folder / "mopl.json", kind=None), "is one of"),
    "no objectives": (lambda folder, outside: edit(folder / "mopl.json", objectives=[]), "objectives"),
    "nested": (lambda folder, outside: (folder / "mopl.json").write_text("[" * 100_000), "mopl.json"),
    "an empty file": (lambda folder, outside: (folder / "mopl.json").write_text(""), "mopl.json"),
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_policy_that_cannot_be_loaded_changes_nothing(server, tmp_path, trouble):
    act, message = TROUBLES[trouble]
    folder = server.api.policies.folder
    assert load(server, "lora-mixture").status_code == 200
    good = answer(server, "lora-mixture", weights=[0.25, 0.75])
    bad = folder / "bad"
    shutil.copytree(folder / "lora-mixture", bad)
    try:
        act(bad, tmp_path)
        refused = load(server, "bad")
    finally:
        shutil.rmtree(bad)
    assert refused.status_code == 400 and message in refused.text and str(tmp_path) not in refused.text
    assert refused.json()["error"]["code"] == "policy_not_loaded" and not (folder / "ran").exists()
    assert answer(server, "lora-mixture", weights=[0.25, 0.75]) == good
    assert load(server, "attention").status_code == 200


@pytest.mark.parametrize("name", ["", "base@0.5,0.5", "two\nlines", "x" * 201])
def test_a_name_that_requests_could_not_give_is_refused(server, name):
    refused = server.http.post("/v1/load_policy", json={"name": name, "path": "attention"})
    assert refused.status_code == 400 and "must be 1 to 200 printable characters without @" in refused.text
    assert refused.json()["error"]["param"] == "name"


def test_a_policy_is_served_without_the_dropout_of_its_training(server):
    folder = server.api.policies.folder
    assert load(server, "lora-mixture").status_code == 200
    wanted = answer(server, "lora-mixture", weights=[0.25, 0.75])
    shutil.copytree(folder / "lora-mixture", folder / "dropout")
    try:
        for file in (folder / "dropout").rglob("adapter_config.json"):
            edit(file, lora_dropout=0.9)
        assert load(server, "dropout").status_code == 200
        assert answer(server, "dropout", weights=[0.25, 0.75]) == wanted
    finally:
        shutil.rmtree(folder / "dropout")


@pytest.mark.parametrize(
    "error", [PermissionError("not for you"), MemoryError(), KeyError("x"), BaseException("panic")]
)
def test_whatever_a_reader_raises_is_an_answer_and_the_server_goes_on(server, monkeypatch, error):
    assert load(server, "attention").status_code == 200

    def fail(*_):
        raise error

    monkeypatch.setattr("mopl.serving.policies.WeightedModel.from_pretrained", fail)
    refused = load(server, "lora-mixture")
    assert refused.status_code == 400 and "lora-mixture cannot be loaded: " in refused.text
    monkeypatch.undo()
    assert answer(server, "attention", weights=[0.5, 0.5])
    assert load(server, "lora-mixture").status_code == 200


def test_a_policy_lies_inside_of_the_folder_by_no_way_around(server, tmp_path):
    folder = server.api.policies.folder
    shutil.copytree(folder / "attention", tmp_path / "outside")
    links = {"out": tmp_path / "outside", "loop": folder / "loop"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    try:
        statuses = {
            path: load(server, path).status_code
            for path in ("out", "loop", "../policies/attention", "attention/../attention", "a\0b", "x" * 5000, "/etc")
        }
    finally:
        for name in links:
            (folder / name).unlink()
    assert statuses.pop("out") == statuses.pop("/etc") == statuses.pop("attention/../attention") == 403
    assert set(statuses.values()) <= {400, 403, 404} and server.engine.alive, statuses
