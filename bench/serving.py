"""What `mopl serve` gives to many clients at once: tokens a second beside those of `generate` on the same prompts.

    OMP_NUM_THREADS=1 python -m bench.serving [--shape 135m] [--tokens 32] [--json FILE]

Random weights in the shape of SmolLM2-135M, float32, with virtual tokens and an adapter (`HyperPromptModel`); each
request has weights of its own. Server and clients are one process, and the clients speak HTTP. The limit is `generate`
with all prompts in one batch: what is missing to it is what the server costs.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # some virtual machines trap on AMX
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx
import peft
import tokenizers
import transformers

from bench.guided import SHAPES, build
from bench.measuring import about
from mopl._files import write_file
from mopl.conditioning import HyperPrompt, HyperPromptModel
from mopl.language_models.generate import generate
from mopl.language_models.tokenization import ListTokenizer
from mopl.serving.api import Api
from mopl.serving.engine import Engine
from mopl.serving.model import ServedModel
from mopl.serving.server import Server, bound_socket, url_of

CLIENTS = (1, 4, 16)


def words() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of numbered words."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 49152)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="</s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def measure(shape: str, tokens: int) -> dict[str, float]:
    """Return tokens a second by the clock, of `generate` and of the server with some clients at once."""
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    base = peft.get_peft_model(build(shape), config)
    model = HyperPromptModel(base, HyperPrompt(2, 8, 4, SHAPES[shape][0])).eval()
    encoder = ListTokenizer(words(), max_length=None, append_eos=False)
    most = max(CLIENTS)
    weights = [[i / most, 1 - i / most] for i in range(most)]
    prompts = [" ".join(f"w{3 + 97 * i + j}" for j in range(32)) for i in range(most)]
    never = {"2": -100}  # that an answer ends early
    rates = {}
    for _ in range(2):  # the first is for warming up
        start = time.perf_counter()
        generate(model, encoder, prompts, weights, max_new_tokens=tokens, batch_size=most, eos_token_id=None)
        rates["generate, 16 in a batch"] = most * tokens / (time.perf_counter() - start)
    at, started = bound_socket("127.0.0.1", 0), threading.Event()
    engine = Engine(ServedModel(model, encoder, ("a", "b"), name="bench"), max_batch=most)
    server = Server(Api(engine, log=False), at, started=started.set)
    thread = threading.Thread(target=server.run)
    thread.start()
    started.wait()
    with httpx.Client(base_url=url_of(at), timeout=600) as client:

        def ask(i: int) -> int:
            body = {
                "prompt": prompts[i], "weights": weights[i], "temperature": 0, "max_tokens": tokens,
                "logit_bias": never,
            }  # fmt: skip
            return client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"]

        for clients in CLIENTS:
            with ThreadPoolExecutor(clients) as pool:
                start = time.perf_counter()
                made = sum(pool.map(ask, range(clients)))
                rates[f"served, {clients} clients"] = made / (time.perf_counter() - start)
    server.stop()
    thread.join()
    return {name: round(rate, 1) for name, rate in rates.items()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    rates = measure(given.shape, given.tokens)
    for name, rate in rates.items():
        print(f"{name:>24}  {rate:8.1f} tokens/s")
    if given.json:
        record = {"about": about(), "shape": given.shape, "tokens": given.tokens, "tokens_per_second": rates}
        write_file(Path(given.json), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
