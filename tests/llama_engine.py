"""llama.cpp's own server, which the package xllamacpp holds as compiled code, run on the CPU.

What is asked goes through its HTTP interface on the loopback, as users ask it. It runs in a process of its own, this
file's: there it can be given up when it hangs, and its threads are in no process that forks.
"""

import json
import math
import os
import select
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

LIMIT = 120  # seconds for a start, or an answer


class Engine:
    """A GGUF model with LoRA adapters: keys, values and arithmetic in float32, no flash attention, one thread."""

    def __init__(self, model: Path, *adapters: Path, scales: tuple[float, ...] = (), length: int = 256):
        scaled = zip(map(str, adapters), scales or [1.0] * len(adapters), strict=True)
        command = [sys.executable, __file__, str(model), str(length), json.dumps(list(scaled))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            self._address = self._started()
        except BaseException:
            self.__exit__()
            raise

    def _started(self) -> str:
        said, end = b"", time.monotonic() + LIMIT
        out = self._process.stdout.fileno()
        while select.select([out], [], [], max(end - time.monotonic(), 0))[0]:
            part = os.read(out, 4096)
            said += part
            for line in said.splitlines(keepends=True):
                if line.startswith(b"listens at ") and line.endswith(b"\n"):
                    return line.split()[-1].decode()
            if not part:
                break
        raise RuntimeError(f"llama.cpp did not start in {LIMIT} s: {said.decode(errors='replace')[-2000:]}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.communicate()

    def ask(self, path: str, **body) -> dict:
        """Send a request, a GET where nothing is sent along."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"{self._address}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            return json.load(answer)

    def tokens(self, text: str, *, add: bool = False) -> list[int]:
        """Split a text, with the tokens that go in front where `add`; texts of special tokens become these."""
        return self.ask("/tokenize", content=text, add_special=add, parse_special=True)["tokens"]

    def logprobs(self, ids: list[int], most: int, scales: tuple[float, ...] | None = ()):
        """Return the `most` likeliest next tokens and their log-probabilities (most,)."""
        import torch

        # A whole character is made, whatever is likely: the server says nothing of the half of one, or of the end.
        made = [[self.tokens("a")[0], 1e4]]
        answer = self.complete(ids, 1, scales, n_probs=most, logit_bias=made)
        listed = answer["completion_probabilities"][0]["top_logprobs"]
        return [entry["id"] for entry in listed], torch.tensor([entry["logprob"] for entry in listed])

    def complete(self, ids: list[int] | str, most: int, scales: tuple[float, ...] | None = (), **options) -> dict:
        """Return the answer to a greedy request with the adapters at these scales; None: as the server began."""
        if scales is not None:
            options["lora"] = [{"id": i, "scale": scale} for i, scale in enumerate(scales)]
        return self.ask(
            "/completion", prompt=ids, n_predict=most, temperature=0.0, cache_prompt=False, **options,
        )  # fmt: skip

    def error(
        self, model, sequences: list[list[int]], scales: tuple[float, ...] | None = (), most: int | None = None
    ) -> float:
        """Return the largest difference in log-probability from `model(ids)`'s logits, as a part of their largest."""
        import torch

        worst, total = 0.0, self.ask("/v1/models")["data"][0]["meta"]["n_vocab"]
        for ids in sequences:
            with torch.no_grad():
                wanted = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            found, values = self.logprobs(ids, most or total, scales)
            kept = [i for i, token in enumerate(found) if token < len(wanted)]  # without tokens that it was given
            found, values = [found[i] for i in kept], values[kept].double()
            if len(wanted) < total:
                values = values.log_softmax(-1)
            seen = values > math.log(1e-30)  # the server has probabilities, in float32
            assert int(seen.sum()) > min(len(wanted), most or total) / 2
            difference = (values - wanted[found])[seen].abs().max()
            worst = max(worst, float(difference / wanted[found][seen].abs().max()))
        print(f"difference from llama.cpp {worst:.1e}, scales {scales}")  # of which docs/serving.md has the largest
        return worst


def serve(model: str, length: str, adapters: str) -> None:
    """Run the server until nobody holds the other end of this process's input."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = model
    options.n_ctx = options.n_batch = options.n_ubatch = int(length)
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.n_parallel, options.n_threads_http = 1, 1
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.check_tensors = True
    options.warmup = options.fit_params = options.ui = False
    options.cache_ram_mib = 0
    options.verbosity = 0
    options.lora_adapters = [  # as --lora-scaled has them, or --lora
        xllamacpp.CommonAdapterLoraInfo(path, scale) for path, scale in json.loads(adapters)
    ]
    server = xllamacpp.Server(options)
    print(f"\nlistens at {server.listening_address}", flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    serve(*sys.argv[1:])
