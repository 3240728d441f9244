"""What a trainer has a server load: one policy after another, around a base that stays what it is."""

import json

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
def test_after_a_load_that_failed_the_base_is_what_it_was_and_the_next_policy_is_taken(server, damage):
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
    plain = answer(server, "base")
    assert plain != good
    assert load(server, scope).status_code == 200
    assert answer(server, scope, weights=[0.25, 0.75]) == good
    assert load(server, bad.name).status_code == 200, "mended, it is taken"
