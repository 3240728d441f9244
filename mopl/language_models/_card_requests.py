"""How an export is asked, for its card: PEFT, transformers, and what servers take by their documentation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from shlex import quote

from mopl.conditioning.adapter_files import VLLM_RANKS

_SCALED = """from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, AutoTokenizer

base, folder = {base}, "."  # the base model, and this directory
weights = {weights}  # the sum is 1

tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
for i, place in enumerate(weights):
    if i == 0:
        model = PeftModel.from_pretrained(model, f"{{folder}}/{{place}}", adapter_name="a0")
    else:
        model.load_adapter(f"{{folder}}/{{place}}", adapter_name=f"a{{i}}")
model.base_model.set_adapter([f"a{{i}}" for i in range(len(weights))])
for layer in model.modules():  # again for each other trade-off
    if isinstance(layer, LoraLayer):
        for i, weight in enumerate(weights.values()):
            layer.set_scale(f"a{{i}}", weight)
model.eval()
"""
_ONE = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, folder = {base}, "."  # the base model, and this directory
tokenizer = AutoTokenizer.from_pretrained(folder)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
"""
_PLAIN = """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this directory
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
"""


def requests_of_adapters(
    places: Sequence[str], grid: Sequence[str], base: str, grid_rank: int, lora_bias: bool
) -> list[str]:
    """Return how a trade-off is asked of adapters, each of which has a scale, as Markdown."""
    weights = example(len(places))
    chosen = dict(zip(places, weights, strict=True))
    said = [
        "### PEFT",
        _code("python", _SCALED.format(base=json.dumps(base), weights=json.dumps(chosen, ensure_ascii=False))),
    ]
    if lora_bias:
        return [*said, "The adapters have biases (`lora_bias`), which PEFT adds and the servers that are known do not."]
    scaled = ",".join(f"{place}.gguf:{weight:g}" for place, weight in chosen.items())
    scales = json.dumps([{"id": i, "scale": weight} for i, weight in enumerate(weights)])
    files = "\n".join(
        f"python convert_lora_to_gguf.py --base {quote(base)} --outfile {quote(f'{place}.gguf')} {quote(place)}"
        for place in places
    )
    said += [
        "### llama.cpp",
        "A scale for each adapter, in each request. The files are best made of the run, whose tokenizer is then "
        "checked, too, and the folder says how to ask:",
        _code("sh", "mopl export RUN --gguf DIR\n"),
        "Without it, by llama.cpp's own programs (`--base` is the folder of the base model's files, and base.gguf that "
        "model as GGUF, by `convert_hf_to_gguf.py`):",
        _code(
            "sh",
            f"{files}\nllama-server -m base.gguf --lora-scaled {quote(scaled)}\n"
            f'curl http://127.0.0.1:8080/completion -d \'{{"prompt": "Hello", "lora": {scales}}}\'\n',
        ),
        "### vLLM, LoRAX",
        "These take one adapter in a request, without a scale, so a trade-off is an adapter of its own there.",
    ]
    if not grid:
        return [
            *said,
            "This directory has none: `mopl export` writes those of a grid with `--grid N`, and mopl's page about "
            "serving has a resolver for vLLM that makes any other one from these files when a request names it.",
        ]
    name = grid[len(grid) // 2]
    asked = (
        "curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{name}", "prompt": "Hello"}}\'\n'
    )
    return [
        *said,
        _vllm(f"vllm serve {quote(base)}", grid_rank, json.dumps({"name": name, "path": name}), asked),
        f'In LoRAX: `"parameters": {{"adapter_id": "/path/to/{name}", "adapter_source": "local"}}`. mopl\'s page '
        "about serving has a resolver for vLLM that makes any other trade-off when a request names it.",
    ]


def requests_of_adapter(base: str, rank: int, prompt: bool, text: str | None) -> list[str]:
    """Return how the adapter of one trade-off is used, as Markdown."""
    said = [_code("python", _ONE.format(base=json.dumps(base)))]
    if prompt:
        return [*said, "It is a prompt (PEFT's prompt tuning), for PEFT. Pad batches on the right."]
    return [*said, _vllm(f"vllm serve {quote(base)} --tokenizer .", rank, "tuned=."), *_words(text)]


def requests_of_model(virtual_tokens: int, text: str | None) -> list[str]:
    """Return how a plain model is used, as Markdown."""
    said = [_code("python", _PLAIN), _code("sh", "vllm serve .\n"), *_words(text)]
    if virtual_tokens:
        said.append(
            f"{virtual_tokens} tokens, which hold the trade-off, stand in front of each text; the tokenizer writes "
            "them by itself. A text that the chat template has written must be tokenised with "
            "`add_special_tokens=False`. transformers never generates these tokens; in other servers rule them out "
            "with `logit_bias`, by the ids in mopl.json."
        )
    return said


def requests_of_gguf(base: str, places: Sequence[str], front: str | None, stop: str | None) -> list[str]:
    """Return how GGUF files are asked of llama.cpp, as Markdown."""
    chat = '"messages": [{"role": "user", "content": "Hello"}]'
    ended = "" if stop is None else f', "stop": [{json.dumps(stop)}]'
    if not places:
        said = [_code("sh", f"llama-server -m {quote(base)}\n" + _curl("v1/chat/completions", f"{chat}{ended}"))]
        if front is not None:
            said.append(
                "The trade-off is in tokens that the chat template writes in front of each chat. A prompt without the "
                "template (`/completion`, `/v1/completions`) must begin with them, or it is answered without the "
                "trade-off. As JSON:"
            )
            said.append(_json(front))
    else:
        weights = example(len(places))
        lora = json.dumps([{"id": i, "scale": weight} for i, weight in enumerate(weights)])
        scaled = ",".join(f"{place}:{weight:g}" for place, weight in zip(places, weights, strict=True))
        said = [
            "A scale for each adapter, in each request: `id` counts the adapters as the command line names them, and "
            "one that a request leaves out has the scale 0. A request without `lora` has the scales of the command "
            "line, so let these be a trade-off, too (those of `--lora` are 1 each).",
            _code(
                "sh",
                f"llama-server -m {quote(base)} --lora-scaled {quote(scaled)}\n"
                + _curl("v1/chat/completions", f'{chat}, "lora": {lora}{ended}')
                + _curl("completion", f'"prompt": "Hello", "lora": {lora}{ended}'),
            ),
            "Requests of different scales are not computed in one batch.",
        ]
    if stop is not None:
        said.append("An answer ends in a text, which a GGUF file cannot say: name it in `stop`. As JSON:")
        said.append(_json(stop))
    said.append(
        f"`llama-quantize {quote(base)} small.gguf Q4_K_M` makes a smaller file"
        + ("; the adapters fit that, too." if places else ".")
    )
    return said


def _curl(path: str, body: str) -> str:
    return f"curl http://127.0.0.1:8080/{path} -H 'Content-Type: application/json' -d {quote('{' + body + '}')}\n"


def example(objectives: int) -> list[float]:
    """Return weights that show which is whose: different ones, of the sum 1."""
    if objectives == 1:
        return [1.0]
    total = objectives * (objectives + 1) / 2
    shares = [round((objectives - i) / total, 2) for i in range(objectives)]
    return [*shares[:-1], round(1 - sum(shares[:-1]), 2)] if objectives > 2 else [0.7, 0.3]


def _vllm(serve: str, rank: int, module: str, asked: str = "") -> str:
    """Return how vLLM is started with an adapter, or why it is not: its --max-lora-rank takes some ranks alone."""
    most = next((each for each in VLLM_RANKS if each >= rank), None)
    if most is None:
        return f"The rank is {rank}, and vLLM takes {VLLM_RANKS[-1]} at most."
    return _code("sh", f"{serve} --enable-lora --max-lora-rank {most} --lora-modules {quote(module)}\n{asked}")


def _words(text: str | None) -> list[str]:
    if text is None:
        return []
    return ["The trade-off is told in words, which the tokenizer of this directory writes in front of each text."]


def _json(text: str) -> str:
    """Return a text that others wrote in one line of code, which nothing in it can end."""
    return _code("json", json.dumps(text, ensure_ascii=False) + "\n")


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}```"
