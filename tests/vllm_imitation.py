"""A small HTTP server with the requests and the answers of vLLM's that rollouts use; the model is a tiny one.

Shapes as in vLLM's `vllm/entrypoints/openai/completion/protocol.py` and `models/serving.py`, read in 2026-11. It is no
proof that vLLM answers so.
"""

import contextlib
import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import peft
import torch
from tiny_language_models import build


class Imitation:
    """A server in a thread; `change` may alter an answer, `failures` are statuses that requests get first."""

    def __init__(self, *, processed: bool = True) -> None:
        self.base, self.processed = build(initializer_range=0.1), processed
        self.adapters: dict[str, object] = {}
        self.bodies: list[tuple[str, dict]] = []
        self.failures: list[int] = []
        self.change = lambda answer: answer
        self.owner = "vllm"
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_) -> None:
                pass

            def do_GET(self) -> None:
                cards = [{"id": name, "object": "model", "owned_by": outer.owner} for name in ("base", *outer.adapters)]
                self.answer(200, {"object": "list", "data": cards})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer._lock:
                    outer.bodies.append((self.path, body))
                    if outer.failures:
                        status = outer.failures.pop(0)
                        self.answer(status, {"error": {"message": "as told", "code": status}})
                        return
                    self.answer(*getattr(outer, self.path.removeprefix("/v1/"))(body))

            def answer(self, status: int, content) -> None:
                raw = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def load_lora_adapter(self, body):
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded.", "code": 400}}
        self.adapters[name] = peft.PeftModel.from_pretrained(copy.deepcopy(self.base), path).eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload_lora_adapter(self, body):
        del self.adapters[body["lora_name"]]
        return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    @torch.no_grad()
    def completions(self, body):
        model = self.base if body["model"] == "base" else self.adapters.get(body["model"])
        if model is None:
            message = f"The model `{body['model']}` does not exist."
            return 404, {"error": {"message": message, "type": "NotFoundError", "code": 404}}
        assert body["top_k"] == -1 and body["top_p"] == 1 and body["min_p"] == 0 and body["repetition_penalty"] == 1
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        choices = []
        for index in range(body["n"]):
            ids, values, tops = [], [], []
            while len(ids) < body["max_tokens"] and not (ids and ids[-1] in body.get("stop_token_ids", ())):
                logits = model(input_ids=torch.tensor([body["prompt"] + ids])).logits[0, -1].double()
                for token, bias in body.get("logit_bias", {}).items():
                    logits[int(token)] += bias
                sampled = (logits / body["temperature"]).log_softmax(-1)
                token = int(torch.multinomial(sampled.exp(), 1, generator=generator))
                told = sampled if self.processed else logits.log_softmax(-1)
                ids.append(token)
                values.append(float(told[token]))
                top = told.topk(body["logprobs"])
                tops.append(
                    {f"token_id:{t}": v for t, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)}
                )
            logs = {"tokens": [f"token_id:{t}" for t in ids], "token_logprobs": values, "top_logprobs": tops}
            choices.append({
                "index": index, "text": "", "logprobs": logs, "finish_reason": "stop", "token_ids": ids,
                "prompt_token_ids": body["prompt"],
            })  # fmt: skip
        return 200, self.change({"object": "text_completion", "model": body["model"], "choices": choices})


@contextlib.contextmanager
def imitating(**options) -> Iterator[Imitation]:
    made = Imitation(**options)
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        made.http.shutdown()
        made.http.server_close()
        thread.join(10)
